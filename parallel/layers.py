"""The layers that hold weight matrices: linear and embedding, with the initial values they are drawn from."""

import torch
import torch.nn.functional as F
from torch import nn

from parallel.initialization import Constant, InitialValue, Normal


class Linear(nn.Module):
    """y = x W^T + b.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether b exists; it starts at zero.
        init_std: standard deviation W is drawn with.
    """

    def __init__(self, in_features: int, out_features: int, *, bias: bool, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.initial_values: dict[str, InitialValue] = {"weight": Normal(init_std)}
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            self.initial_values["bias"] = Constant(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A table of vectors, looked up by index.

    Args:
        num_embeddings: rows.
        hidden_size: width of a row.
        init_std: standard deviation the table is drawn with.
    """

    def __init__(self, num_embeddings: int, hidden_size: int, *, init_std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, hidden_size))
        self.initial_values: dict[str, InitialValue] = {"weight": Normal(init_std)}

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices `[...]` to vectors `[..., hidden]`."""
        return F.embedding(indices, self.weight)
