"""What the device itself can do for the shapes: their matrix products, copies of memory, attention by each kernel."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_clock import seconds_of
from benchmarks.gpu_shapes import Shape
from benchmarks.gpu_step import Row
from core.config import ModelConfig

HEAD_BYTES = 2 * 2**30
"""Of a chunk of logits, which the product of the output head computes at once."""
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def products_of(config: ModelConfig, tokens: int) -> dict[tuple[int, int, int], str]:
    """(rows, in, out) of the products of a layer and of the head, and what they are of."""
    hidden, ffn, vocabulary = config.hidden_size, config.ffn_size, config.vocabulary
    query, key_value = (heads * config.head_size for heads in (config.num_attention_heads, config.query_groups))
    head_rows = min(tokens, max(128, HEAD_BYTES // (2 * vocabulary) // 128 * 128))
    found = [
        ("query", tokens, hidden, query),
        ("key or value", tokens, hidden, key_value),
        ("query, key and value at once", tokens, hidden, query + 2 * key_value),
        ("attention's output", tokens, query, hidden),
        ("up", tokens, hidden, ffn),
        ("down", tokens, ffn, hidden),
        ("head", head_rows, hidden, vocabulary),
    ]
    if config.activation == "swiglu":
        found.append(("gate and up at once", tokens, hidden, 2 * ffn))
    names: dict[tuple[int, int, int], str] = {}
    for name, *size in found:
        rows, inputs, outputs = size
        names.setdefault((rows, inputs, outputs), name)
    return names


def measure_products(shapes: list[Shape], square: int, enough: float) -> list[Row]:
    """TFLOP/s in bfloat16 of every product of the shapes, forward and both backward, and of a square one."""
    device = _device()
    sizes = {(square, square, square): "square"}
    for shape in shapes:
        for size, name in products_of(shape.config, shape.rows[0] * shape.seq_length).items():
            sizes.setdefault(size, f"{shape.name}: {name}")
    found = []
    for (rows, inputs, outputs), title in sizes.items():
        x, weight, gradient = (_random(device, *size) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
        passes = {
            "forward": partial(torch.mm, x, weight.t()),
            "input_gradient": partial(torch.mm, gradient, weight),
            "weight_gradient": partial(torch.mm, gradient.t(), x),
        }
        row: Row = {"part": "products", "title": title, "rows": rows, "inputs": inputs, "outputs": outputs}
        for name, action in passes.items():
            row[name] = 2e-12 * rows * inputs * outputs / seconds_of(action, device, enough=enough)
        found.append(row)
    return found


def measure_copy(size: int, enough: float) -> list[Row]:
    """TB/s of a copy on the device of `size` bytes, counting those that are read and those that are written."""
    device = _device()
    source = torch.ones(size, dtype=torch.uint8, device=device)
    seconds = seconds_of(partial(torch.empty_like(source).copy_, source), device, enough=enough)
    return [{"part": "copy", "title": f"{size / 2**20:g} MiB", "terabytes": 2e-12 * size / seconds}]


def measure_attention(shapes: list[Shape], enough: float) -> list[Row]:
    """Milliseconds and TFLOP/s of causal attention for the shapes' heads, by each kernel that takes them.

    Only scores that a query sees are counted: 2 * rows * heads * seq^2 * head_dim operations forward, and 2.5 times as
    many backward, where scores are computed again.
    """
    found, sizes = [], set[tuple[int, ...]]()
    for shape in shapes:
        config = shape.config
        heads = config.num_attention_heads, config.query_groups, config.head_size
        if (shape.rows[0], shape.seq_length, *heads) not in sizes:
            sizes.add((shape.rows[0], shape.seq_length, *heads))
            found += list(_attention_by_kernel(shape, enough))
    return found


def _attention_by_kernel(shape: Shape, enough: float) -> Iterator[Row]:
    device, config, rows, length = _device(), shape.config, shape.rows[0], shape.seq_length
    heads, groups, width = config.num_attention_heads, config.query_groups, config.head_size
    # As layers have it: heads after positions in memory.
    query, key, value = (
        _random(device, rows, length, count, width).transpose(1, 2).requires_grad_()
        for count in (heads, groups, groups)
    )
    gradient = torch.ones_like(query)
    operations = 2e-12 * rows * heads * length**2 * width

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads != groups)

    def both() -> None:
        torch.autograd.grad(forward(), (query, key, value), gradient)

    for name, backend in BACKENDS.items():
        title = f"{shape.name}: {rows} x {length}, {heads} heads, {groups} groups, {width} wide"
        row: Row = {"part": "attention", "title": title, "kernel": name}
        try:
            with sdpa_kernel(backend):
                with torch.no_grad():
                    seconds = seconds_of(forward, device, enough=enough)
                row |= {"forward_ms": 1000 * seconds, "forward": operations / seconds}
                seconds = seconds_of(both, device, enough=enough)
                row |= {"both_ms": 1000 * seconds, "both": 3.5 * operations / seconds}
        except RuntimeError as error:  # of memory, too
            row["note"] = str(error).strip().partition("\n")[0][:80]
        yield row
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(device: torch.device, *size: int) -> torch.Tensor:
    return torch.randn(size, device=device, dtype=torch.bfloat16)
