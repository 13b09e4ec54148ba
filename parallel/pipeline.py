"""Pipeline parallelism: the stages of this rank, run by the schedules of torch.distributed.pipelining."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.config import ParallelConfig
from parallel.data_parallel import Batch, DataParallel, Scaling, before_backward, run_fsdp_post_backward
from parallel.mesh import ParallelMesh
from parallel.schedule_timeline import Action
from parallel.stages import SPLIT_BACKWARD, V_SHAPED, rank_of_stage, stages_of_rank
from parallel.tensor import DeferredGradients, local

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
Observer = Callable[[Action], AbstractContextManager[None]]
"""Surrounds every action of a schedule."""


class ObservedStage(PipelineStage):
    """A stage that says what it does, and with zero > 1 talks to data-parallel ranks every micro-batch.

    With zero 1 torch's schedules gather weights and reduce gradients once a step. Else they see no FSDP.
    """

    def __init__(
        self, observer: Callable[[], Observer], zero: int, module: nn.Module, *arguments: Any, **settings: Any
    ) -> None:
        super().__init__(module if zero == 1 else _Opaque(module), *arguments, **settings)
        self._observer, self._zero, self._module = observer, zero, module

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **settings: Any) -> Any:
        """The forward pass of a micro-batch."""
        with self._observer()(Action("F", self.stage_index, fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **settings)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **settings: Any) -> None:
        """The backward pass of a micro-batch, whole or for its input alone."""
        kind = "B" if settings.get("full_backward", True) else "I"
        if self._zero > 1 and isinstance(self._module, FSDPModule):
            last = settings["last_backward"]
            # Micro-batches that are still on their way forward share FSDP's notes of what to gather next.
            self._module.set_is_last_backward(last)
            before_backward(self._module, self._zero, last=last)
        with self._observer()(Action(kind, self.stage_index, bwd_chunk_id)):
            super().backward_one_chunk(bwd_chunk_id, *arguments, **settings)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **settings: Any) -> None:
        """What its backward pass put off."""
        with self._observer()(Action("W", self.stage_index, bwd_chunk_id)):
            super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **settings)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch before 2.13 greets a neighbour on the same rank as well, which gloo cannot.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Opaque(nn.Module):
    """A module whose type cannot be seen."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **settings: Any) -> Any:
        return self.module(*arguments, **settings)


class StageModules(nn.Module):
    """The stages that one rank has, as one module, in which parameters keep their names."""

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Those of every stage."""
        for stage in self.stages:
            yield from stage.named_modules(memo, prefix, remove_duplicate)


class Pipeline(DataParallel):
    """This rank's stages of a model whose micro-batches pass from rank to rank.

    Args:
        stages: the modules of this rank's stages, sharded by data parallelism.
        activation_meta: what a stage hands on for the input of a micro-batch: a tensor on the meta device.
        tied: name of a weight that the first and the last stage have in common; None where nothing is tied.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        config: ParallelConfig,
        mesh: ParallelMesh,
        device: torch.device,
        activation_meta: Callable[[torch.Tensor], torch.Tensor],
        tied: str | None,
    ) -> None:
        """Collective."""
        super().__init__(StageModules(stages), config.zero_stage)
        self._config, self._mesh, self._device = config, mesh, device
        self._activation_meta = activation_meta
        self._indices = stages_of_rank(mesh.pp_rank, config.pp, config.stages_per_rank, config.pp_schedule)
        self._modules = dict(zip(self._indices, stages, strict=True))
        self._deferred: dict[int, DeferredGradients] = {}
        if config.pp_schedule in SPLIT_BACKWARD:
            self._deferred = {index: DeferredGradients(module) for index, module in self._modules.items()}
        self._schedules: dict[tuple[int, torch.Size], Any] = {}
        self.observer: Observer = lambda _: nullcontext()
        self._scaling: Scaling = lambda loss: loss
        self._losses: dict[int, torch.Tensor] = {}
        self._tied = tied
        # At an error it prints the whole schedule, on every rank.
        logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
        apart = tied is not None and config.pp_schedule not in V_SHAPED
        self._ends = mesh.embedding_group() if apart else None

    @property
    def tied_duplicates(self) -> list[nn.Parameter]:
        """The last stage's copy of a tied weight."""
        return self._copies()[-1:] if self._mesh.has_loss else []

    def forward_backward(self, batches: Sequence[Batch], scaling: Scaling) -> torch.Tensor:
        """Add to every parameter's `grad`; returns the losses `[micro_batches]` in float64, on ranks without the last
        stage zeros."""
        self._scaling, self._losses = scaling, {}
        inputs = torch.cat([inputs for inputs, _ in batches])
        others = {name: torch.cat([others[name] for _, others in batches]) for name in batches[0][1]}
        schedule = self._schedule(len(batches), batches[0][0])
        # The schedule hands the loss function a part of `target` for each micro-batch: its number.
        schedule.step(
            *([inputs] if 0 in self._indices else []),
            target=torch.arange(len(batches)) if self._mesh.has_loss else None,
            return_outputs=False,
            **others,
        )
        self._sum_tied_gradients()
        return self._in_order(len(batches))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> torch.Tensor:
        """The losses `[micro_batches]` in float64, on ranks without the last stage zeros.

        Micro-batches go through the stages of a rank in groups, so that every pair of ranks sends and receives in the
        same order; torch's zero-bubble schedules cannot go forward only.
        """
        self._losses = {}
        together = 1 if len(self._indices) == 1 else self._config.pp
        for start in range(0, len(batches), together):
            group = range(start, min(start + together, len(batches)))
            stage_outputs: dict[int, torch.Tensor] = {}
            for index in self._indices:
                self._forward_group(index, batches, group, stage_outputs)
        return self._in_order(len(batches))

    def _forward_group(
        self, index: int, batches: Sequence[Batch], group: range, stage_outputs: dict[int, torch.Tensor]
    ) -> None:
        """Take micro-batches of a group through one stage; `stage_outputs` passes between stages of one rank.

        All are received before the first is computed, and all computed before the first is sent. NCCL has one queue for
        a pair of ranks, for both directions: where a rank sends in between, a receive of its neighbour may wait behind
        a send that waits for that very receive.
        """
        source, target = (self._rank_of(index + step) for step in (-1, 1))
        own = self._mesh.pp_rank
        if source not in (None, own):
            for number in group:
                stage_outputs[number] = torch.empty_like(self._activation_meta(batches[number][0]), device=self._device)
                dist.recv(stage_outputs[number], group=self._mesh.pipeline_group, group_src=source)
        for number in group:
            inputs, others = batches[number]
            output = self._modules[index](inputs if source is None else stage_outputs[number], **others)
            if target is None:
                self._losses[number] = output.double()
            else:
                stage_outputs[number] = output.contiguous()
        if target in (None, own):
            return
        messages = [stage_outputs[number] for number in group]
        sending = [dist.isend(message, group=self._mesh.pipeline_group, group_dst=target) for message in messages]
        for work in sending:
            if work is not None:
                work.wait()

    def _rank_of(self, stage: int) -> int | None:
        in_range = 0 <= stage < self._config.stages
        return rank_of_stage(stage, self._config.pp, self._config.pp_schedule) if in_range else None

    def _schedule(self, micro_batches: int, inputs: torch.Tensor) -> Any:
        """The schedule for so many micro-batches with inputs of this shape; made once for each."""
        key = micro_batches, inputs.shape
        if key not in self._schedules:
            stages = [self._stage(index, module, inputs) for index, module in self._modules.items()]
            kind = SCHEDULES[self._config.pp_schedule]
            single = self._config.pp_schedule in ("gpipe", "1f1b")
            self._schedules[key] = kind(
                stages[0] if single else stages, micro_batches, loss_fn=self._scaled_loss, scale_grads=False
            )
        return self._schedules[key]

    def _stage(self, index: int, module: nn.Module, inputs: torch.Tensor) -> ObservedStage:
        hidden = self._activation_meta(inputs)
        is_first, is_last = index == 0, index == self._config.stages - 1
        return ObservedStage(
            lambda: self.observer,
            self.zero,
            module,
            index,
            self._config.stages,
            self._device,
            input_args=inputs.to("meta") if is_first else hidden,
            output_args=torch.empty((), dtype=torch.promote_types(hidden.dtype, torch.float32), device="meta")
            if is_last
            else hidden,
            group=self._mesh.pipeline_group,
            dw_builder=partial(self._defer_weight_gradients, index) if index in self._deferred else None,
        )

    def _defer_weight_gradients(self, index: int) -> Callable[[], None]:
        """What computes the gradients that the last backward pass of a stage put off."""
        products = self._deferred[index].take()

        def run() -> None:
            products()
            run_fsdp_post_backward(self._modules[index])

        return run

    def _scaled_loss(self, loss: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        self._losses[int(number)] = loss.detach().double()
        return self._scaling(loss)

    def _in_order(self, micro_batches: int) -> torch.Tensor:
        if not self._losses:
            return torch.zeros(micro_batches, dtype=torch.float64, device=self._device)
        return torch.stack([self._losses[number] for number in range(micro_batches)])

    def _sum_tied_gradients(self) -> None:
        """Give both copies of a tied weight the gradient of both uses."""
        gradients = [local(copy.grad) for copy in self._copies() if copy.grad is not None]
        if self._ends is not None:
            dist.all_reduce(gradients[0], group=self._ends)
        elif len(gradients) == 2:
            gradients[0] += gradients[1]
            gradients[1].copy_(gradients[0])

    def _copies(self) -> list[nn.Parameter]:
        """This rank's copies of a tied weight, that of the first stage first."""
        return [parameter for name, parameter in self.model.named_parameters() if name == self._tied]
