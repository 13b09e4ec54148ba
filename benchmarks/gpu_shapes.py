"""The models and batches that the GPU benchmark times, at full size and at a tiny one for trying the benchmark out."""

from dataclasses import dataclass, replace

from core.config import ModelConfig
from settings.compose import compose

TRAINER_STEPS = {"full": 120, "tiny": 12}
"""Steps of the run that the trainer's part takes."""


@dataclass(frozen=True)
class Shape:
    """A model, its batches, and which figures are taken of it unless the command line says otherwise."""

    name: str
    config: ModelConfig
    seq_length: int
    rows: tuple[int, ...]
    """Rows of a micro-batch; the next number is taken only where the memory does not suffice for the one before."""
    peer_rows: int
    """Rows that transformers takes at once; it accumulates until it has as many as Kilotron."""
    goal: float
    """Model FLOPs utilisation to reach with compiled layers, 0 to 1."""
    accumulate: tuple[int, ...] = (1,)
    """Micro-batches a step."""
    modes: tuple[str, ...] = ("compiled",)
    also: tuple[str, ...] = ()
    """Variants that belong to the shape's own figures."""


def shapes(*, tiny: bool) -> dict[str, Shape]:
    """Every shape by its name; `tiny` ones keep what the models consist of, but no dimension."""
    preset = compose(["model=gpt2_small"]).model
    llama = compose(["model=llama3_8b"]).model
    one_billion = replace(llama, num_layers=16, hidden_size=2048, ffn_hidden_size=8192, tie_embeddings=True)
    both = ("compiled", "eager")
    found = [
        Shape("gpt2_small", replace(preset, vocab_size=50_304), 1024, (128, 96, 64), 32, 0.45, modes=both),
        Shape("gpt2_50257", preset, 1024, (128, 96, 64), 32, 0.45, also=("unaligned",)),
        Shape("llama_1b", one_billion, 2048, (16, 12, 8), 4, 0.55, modes=both),
        Shape("llama_8b_wide", replace(llama, num_layers=8), 4096, (4, 2, 1), 1, 0.60, (1, 4)),
    ]
    return {shape.name: _tiny(shape) if tiny else shape for shape in found}


def _tiny(shape: Shape) -> Shape:
    grouped = shape.config.query_groups != shape.config.num_attention_heads
    config = replace(
        shape.config,
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2 if grouped else None,
        vocab_size=503 if shape.config.vocabulary % 64 else 512,
        max_position_embeddings=64,
    )
    return replace(shape, config=config, seq_length=32, rows=(4,), peer_rows=2, modes=shape.modes[:1])
