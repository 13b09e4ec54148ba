"""Tensor parallelism: linear and embedding layers whose weights are shared out over ranks (arXiv:1909.08053).

A column-parallel layer is followed by a row-parallel one; between them each rank works on its part of the heads or of
the MLP alone. With sequence parallelism (arXiv:2205.05198) what lies between such pairs is on shards of the sequence.
With one rank each layer is the plain one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from parallel.collectives import (
    copy_to_ranks,
    gather_sequence,
    start_gather,
    start_sum,
    start_sum_scatter,
    sum_over_ranks,
    sum_scatter_sequence,
)
from parallel.initialization import Constant, InitialValue, Normal


class TensorParallel:
    """The ranks that share each weight matrix; layers are given it to make their parameters and to communicate.

    Args:
        mesh: of these ranks, in one dimension; None: this rank alone.
        sequence: whether norms, residuals and dropout are on shards of the sequence.
    """

    def __init__(self, mesh: DeviceMesh | None = None, *, sequence: bool = False) -> None:
        self.mesh = mesh
        self.size = 1 if mesh is None else mesh.size()
        self.rank = 0 if mesh is None else mesh.get_local_rank()
        self.sequence = sequence and self.size > 1

    @property
    def group(self) -> dist.ProcessGroup:
        """What to communicate over. Raises RuntimeError where the rank is alone."""
        if self.mesh is None:
            raise RuntimeError("a rank alone has no one to communicate with")
        return self.mesh.get_group()

    def parameter(self, *shape: int, shard: int | None = None) -> nn.Parameter:
        """An uninitialised parameter of this whole shape: cut along dimension `shard`, or whole on every rank."""
        if self.mesh is None:
            return nn.Parameter(torch.empty(shape))
        local = list(shape)
        if shard is not None:
            if shape[shard] % self.size:
                raise ValueError(f"{self.size} ranks do not divide dimension {shard} of {list(shape)}")
            local[shard] //= self.size
        placement = Replicate() if shard is None else Shard(shard)
        return nn.Parameter(DTensor.from_local(torch.empty(local), self.mesh, [placement], run_check=False))

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum what the ranks found, each a part of `[batch, seq, hidden]`, into the residual stream's layout."""
        if self.size == 1:
            return x
        return sum_scatter_sequence(x, self.group) if self.sequence else sum_over_ranks(x, self.group)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """Give every rank the whole `[batch, seq, hidden]` of the residual stream, to find its part of a result."""
        if self.size == 1:
            return x
        return gather_sequence(x, self.group) if self.sequence else copy_to_ranks(x, self.group)

    def sequence_shard(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What of `x`, whole along dimension `dim`, the residual stream holds on this rank."""
        return x.chunk(self.size, dim)[self.rank] if self.sequence else x

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Without sequence parallelism for a while: a token that is generated cannot be cut."""
        before, self.sequence = self.sequence, False
        try:
            yield
        finally:
            self.sequence = before


def local(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that lies on this rank; its gradient becomes this part of the parameter's gradient."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W, and so the columns of y, shared out.

    Layers that read the same input are computed together, by `column_parallel`.

    Args:
        out_features: width of the whole output.
        parts: into how many equal parts the output can be cut, key/value heads for instance; null: any number. With
            fewer parts than ranks, W is whole on every rank, and neighbours compute the same part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        init_std: float,
        tensor: TensorParallel,
        parts: int | None = None,
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.deferred: DeferredGradients | None = None
        self.local_rows: slice | None = None
        """The rows that this rank computes with, of a matrix that is whole on every rank."""
        if parts is not None and parts < tensor.size:
            part, rows = tensor.rank * parts // tensor.size, out_features // parts
            self.local_rows = slice(part * rows, (part + 1) * rows)
        self.partial_gradient = self.local_rows is not None
        shard = 0 if self.local_rows is None else None
        self.weight = tensor.parameter(out_features, in_features, shard=shard)
        self.initial_values: dict[str, InitialValue] = {"weight": Normal(init_std)}
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = tensor.parameter(out_features, shard=shard)
            self.initial_values["bias"] = Constant(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, in]` (a shard of the sequence with sequence parallelism) to `[batch, seq, out / ranks]`."""
        return column_parallel(x, [self])[0]

    def own(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows of weight and bias that this rank computes with."""
        weight, bias = local(self.weight), None if self.bias is None else local(self.bias)
        if self.local_rows is None:
            return weight, bias
        return weight[self.local_rows], None if bias is None else bias[self.local_rows]


def column_parallel(x: torch.Tensor, layers: Sequence[ColumnParallelLinear]) -> tuple[torch.Tensor, ...]:
    """Several column-parallel layers of one input, which is gathered, and whose gradient is summed, once for all.

    `[batch, seq, in]` (a shard of the sequence with sequence parallelism) to a `[batch, seq, out / ranks]` each.
    """
    tensor, deferred = layers[0].tensor, layers[0].deferred
    if tensor.size == 1 and deferred is None:
        return tuple(F.linear(x, *layer.own()) for layer in layers)
    group = tensor.group if tensor.size > 1 else None
    return _products(x, group, tensor.sequence, layers)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W shared out: each rank has its part of x and adds a summand of y.

    Args:
        in_features: width of the whole input.
    """

    local_rows: slice | None = None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, init_std: float, tensor: TensorParallel
    ) -> None:
        super().__init__()
        self.tensor = tensor
        self.deferred: DeferredGradients | None = None
        self.weight = tensor.parameter(out_features, in_features, shard=1)
        self.initial_values: dict[str, InitialValue] = {"weight": Normal(init_std)}
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = tensor.parameter(out_features)
            self.initial_values["bias"] = Constant(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, in / ranks]` to `[batch, seq, out]` (a shard of the sequence with sequence parallelism)."""
        y = F.linear(x, *self.own()) if self.deferred is None else _products(x, None, False, [self])[0]
        if self.tensor.size == 1:
            return y
        y = self.tensor.reduce(y)
        return y if self.bias is None else y + local(self.bias)

    def own(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's columns of the weight, and the bias where it is not added to a sum over ranks."""
        return local(self.weight), self.bias if self.tensor.size == 1 else None


class DeferredGradients:
    """Puts off the products that give the gradients of a module's matrices, while gradients of inputs go on.

    From then on a backward pass leaves these products here, biases' sums with them, for `take` to hand out.
    """

    def __init__(self, module: nn.Module) -> None:
        self._waiting: list[Callable[[], None]] = []
        for layer in module.modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                layer.deferred = self

    def add(self, layers: "Layers", product: Callable[[], "Gradients"]) -> None:
        """Put off what gives the gradients of layers' weights and biases."""
        self._waiting.append(lambda: _add_gradients(layers, torch.no_grad()(product)()))

    def take(self) -> Callable[[], None]:
        """What runs all that was put off since the last call."""
        products, self._waiting = self._waiting, []

        def run() -> None:
            for product in products:
                product()

        return run


Layers = Sequence[ColumnParallelLinear | RowParallelLinear]
Gradients = list[torch.Tensor | None]
"""Those of weights and biases in turns, as `own` gives them."""


def _products(
    x: torch.Tensor, group: dist.ProcessGroup | None, sequence: bool, layers: Layers
) -> tuple[torch.Tensor, ...]:
    parameters = [parameter for layer in layers for parameter in layer.own()]
    deferred = layers[0].deferred
    defer = None if deferred is None else partial(deferred.add, layers)
    return cast(tuple[torch.Tensor, ...], _Products.apply(x, group, sequence, defer, *parameters))


class _Products(torch.autograd.Function):
    """Products of one input with several weights; communication runs beside the products of the backward pass.

    Only the shard of the input is kept under sequence parallelism: it is gathered again for the weights' gradients.
    Without a group nothing is communicated. `defer` takes what gives the weights' gradients, rather than these.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: dist.ProcessGroup | None,
        sequence: bool,
        defer: Callable[[Callable[[], Gradients]], None] | None,
        *parameters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        weights, biases = cast(Sequence[torch.Tensor], parameters[::2]), parameters[1::2]
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.sequence, ctx.defer = group, sequence, defer
        ctx.with_bias = [bias is not None for bias in biases]
        whole = start_gather(x, group)() if group is not None and sequence else x
        return tuple(F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        group, sequence, defer, with_bias = ctx.group, ctx.sequence, ctx.defer, ctx.with_bias
        gathering = start_gather(x, group) if sequence and defer is None else None
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        of_input = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            of_input.flatten(0, -2).addmm_(gradient.flatten(0, -2), weight)
        reducing = None if group is None else (start_sum_scatter if sequence else start_sum)(of_input, group)
        found: Gradients = [None for _ in gradients for _ in range(2)]
        if defer is None:
            found = _of_parameters(x if gathering is None else gathering(), gradients, with_bias)
        else:
            defer(lambda: _of_parameters(start_gather(x, group)() if sequence else x, gradients, with_bias))
        return of_input if reducing is None else reducing(), None, None, None, *found


def _of_parameters(whole: torch.Tensor, gradients: Sequence[torch.Tensor], with_bias: Sequence[bool]) -> Gradients:
    found: Gradients = []
    for gradient, has_bias in zip(gradients, with_bias, strict=True):
        rows = gradient.flatten(0, -2)
        found += [rows.t() @ whole.flatten(0, -2), rows.sum(0) if has_bias else None]
    return found


def _add_gradients(layers: Layers, gradients: Sequence[torch.Tensor | None]) -> None:
    parameters = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    local_rows = [layer.local_rows for layer in layers for _ in range(2)]
    for parameter, gradient, rows in zip(parameters, gradients, local_rows, strict=True):
        if parameter is None or gradient is None:
            continue
        if rows is not None:
            gradient, part = torch.zeros_like(local(parameter)), gradient
            gradient[rows] = part
        gradient = gradient.to(parameter.grad_dtype or gradient.dtype)  # FSDP of torch 2.15 accumulates in another
        if isinstance(parameter, DTensor):
            gradient = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements, run_check=False)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


class VocabParallelEmbedding(nn.Module):
    """A table of token vectors whose rows are shared out, padded with rows of zero where ranks do not divide them.

    An output head that is not tied to the embedding is such a table too; it is read by the loss.

    Args:
        num_embeddings: rows without padding.
    """

    def __init__(self, num_embeddings: int, hidden_size: int, *, init_std: float, tensor: TensorParallel) -> None:
        super().__init__()
        self.tensor = tensor
        self.num_embeddings = num_embeddings
        padded = -(-num_embeddings // tensor.size) * tensor.size
        self.weight = tensor.parameter(padded, hidden_size, shard=0)
        self.initial_values: dict[str, InitialValue] = {"weight": Normal(init_std)}
        self.logical_shapes = {"weight": torch.Size((num_embeddings, hidden_size))}
        self.local_rows = padded // tensor.size
        self.first_row = tensor.rank * self.local_rows

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Ids `[batch, seq]` to `[batch, seq, hidden]` (a shard of the sequence with sequence parallelism)."""
        weight = local(self.weight)
        if self.tensor.size == 1:
            return F.embedding(indices, weight)
        own = indices - self.first_row
        elsewhere = (own < 0) | (own >= self.local_rows)
        vectors = F.embedding(own.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.tensor.reduce(vectors)

    @property
    def own_tokens(self) -> int:
        """How many of this rank's rows are no padding."""
        return min(self.local_rows, max(0, self.num_embeddings - self.first_row))


class Embedding(nn.Module):
    """A table of vectors that is whole on every rank.

    Args:
        num_embeddings: rows.
        hidden_size: width of a row.
        init_std: standard deviation the table is drawn with.
    """

    def __init__(self, num_embeddings: int, hidden_size: int, *, init_std: float, tensor: TensorParallel) -> None:
        super().__init__()
        self.weight = tensor.parameter(num_embeddings, hidden_size)
        self.initial_values: dict[str, InitialValue] = {"weight": Normal(init_std)}

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices `[...]` to vectors `[..., hidden]`."""
        return F.embedding(indices, local(self.weight))
