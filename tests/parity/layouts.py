"""The layouts that are compared with one process: every mesh of up to eight ranks, the options spread over them."""

import math
import random
from dataclasses import replace
from functools import cache
from itertools import cycle, product
from typing import Any

from core.config import ModelConfig
from data.config import DataConfig
from parallel.config import ParallelConfig
from parallel.stages import SPLIT_BACKWARD, supports_micro_batches
from settings.config import OptimizerConfig, RunConfig, TrainConfig
from tests.parity.covering import Case, covering_array, pairs

LARGEST_WORLD = 8
SEED = 11
IN_MAKE_TEST = 20

# Vocabularies are odd: over eight ranks the first leaves padding on the last rank, the second nothing else.
MODELS = {
    "gpt2": ModelConfig(
        num_layers=2, hidden_size=32, num_attention_heads=8, ffn_hidden_size=72, vocab_size=67,
        max_position_embeddings=27, activation="gelu_tanh", init_std=0.2,
    ),
    "llama": ModelConfig(
        num_layers=3, hidden_size=40, num_attention_heads=8, num_query_groups=2, head_dim=4, ffn_hidden_size=48,
        vocab_size=33, max_position_embeddings=16, normalization="rmsnorm", activation="swiglu",
        position_embedding="rope", rope_scaling="llama3", rope_original_length=16, qk_norm=True, sliding_window=5,
        bias=False, init_std=0.2,
    ),
}  # fmt: skip
SEQ_LENGTH = {"gpt2": 24, "llama": 16}

# A dimension more is one entry here; `kind` names those above one.
DIMENSIONS: dict[str, tuple[int, ...]] = {
    "tp": (1, 2, 4, 8),
    "dp_replicate": tuple(range(1, LARGEST_WORLD + 1)),
    "dp_shard": tuple(range(1, LARGEST_WORLD + 1)),
}
OPTIONS: dict[str, tuple[Any, ...]] = {
    "sequence": (True, False),
    "zero": (3, 2, 1),
    "tied": (True, False),
    "recompute": ("none", "selective", "full"),
    "accumulation": (1, 3),
    "dropout": (0.0, 0.2),
    "optimizer": ("adamw", "muon"),
}


PIPELINE_RANKS = (2, 3, 4, 8)
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb", "zbv", "dualpipev")
PIPELINE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "tied": (True, False),
    "sequence": (True, False),
    "recompute": ("none", "selective", "full"),
    "micro_batches": ("fewest", "more"),
    "layers": ("even", "uneven"),
    "dropout": (0.0, 0.2),
    "optimizer": ("adamw", "muon"),
}
PIPELINES_IN_MAKE_TEST = 10


def meshes() -> list[Case]:
    """Every mesh of two to LARGEST_WORLD ranks, by the sizes of its dimensions."""
    found = [dict(zip(DIMENSIONS, sizes, strict=True)) for sizes in product(*DIMENSIONS.values())]
    return [mesh for mesh in found if 1 < math.prod(mesh.values()) <= LARGEST_WORLD]


def kind(mesh: Case) -> str:
    """What a mesh is composed of."""
    return " * ".join(name for name in ("pp", *DIMENSIONS) if mesh.get(name, 1) > 1)


def has(mesh: Case, option: str) -> bool:
    """Whether an option changes anything on a mesh."""
    needed = {"sequence": mesh["tp"], "zero": mesh["dp_replicate"] * mesh["dp_shard"]}
    return needed.get(option, 2) > 1


@cache
def cases(model_name: str) -> list[Case]:
    """The layouts of a model: sizes and options.

    All pairs of options occur, and of an option and a kind of mesh, and of an option and a size of tp.
    """
    found = meshes()
    kinds = [{"kind": kind(mesh), "tp": mesh["tp"]} for mesh in found]
    seed = SEED + list(MODELS).index(model_name)
    chosen = covering_array(kinds, OPTIONS, lambda index, option: has(found[index], option), seed)
    return [found[index] | case for index, case in chosen]


def configuration(model_name: str, case: Case, precision: str = "fp64", *, compiled: bool = False) -> RunConfig:
    """The resolved run of a case."""
    sizes = {name: case[name] for name in DIMENSIONS}
    options = {name: case[name] for name in ("pp", "pp_schedule", "virtual_stages", "layers_per_stage") if name in case}
    layout = ParallelConfig(**sizes, **options, sequence=case.get("sequence"), zero=case.get("zero"))
    micro_batch_size = 2 if layout.dp < 4 else 1
    model = replace(MODELS[model_name], tie_embeddings=case["tied"], dropout=case["dropout"])
    accumulation = case.get("accumulation", 1)
    if layout.pp > 1:
        model = replace(model, num_layers=layout.stages + 2 * (case["layers"] == "uneven"))
        legal = [
            count for count in range(1, 6 * layout.pp) if supports_micro_batches(layout.pp_schedule, layout.pp, count)
        ]
        accumulation = legal[0] if case["micro_batches"] == "fewest" else legal[2]
    return RunConfig(
        name=model_name,
        seed=SEED,
        world_size=layout.pp * math.prod(sizes.values()),
        model=model,
        data=DataConfig(corpus="sample", seq_length=SEQ_LENGTH[model_name]),
        parallel=layout,
        optimizer=OptimizerConfig(name=case["optimizer"], lr=1e-2, clip_grad=0.5),
        train=TrainConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=layout.dp * micro_batch_size * accumulation,
            precision=precision,
            recompute=case["recompute"],
            compile=compiled,
            initial_loss_scale=256.0,
        ),
    )


@cache
def pipeline_matrix() -> list[tuple[str, Case]]:
    """Every mesh with pipeline stages with every schedule, the models and all pairs of options spread over them."""
    shuffle = random.Random(SEED).shuffle
    options = [case for _, case in covering_array([{}], PIPELINE_OPTIONS, lambda *_: True, SEED)]
    plain = [dict.fromkeys(DIMENSIONS, 1), *meshes()]
    found = [
        {"pp": pp} | mesh for pp in PIPELINE_RANKS for mesh in plain if pp * math.prod(mesh.values()) <= LARGEST_WORLD
    ]
    rows = [mesh | {"kind": kind(mesh), "pp_schedule": schedule} for mesh in found for schedule in SCHEDULES]
    models, cases_of_options = list(MODELS) * len(rows), options * len(rows)
    models, cases_of_options = models[: len(rows)], cases_of_options[: len(rows)]
    shuffle(models)
    shuffle(cases_of_options)
    zeros = cycle((3, 2, 1))
    for row in rows:
        if has(row, "zero") and row["pp_schedule"] not in SPLIT_BACKWARD:
            row["zero"] = next(zeros)
    return [(model, row | case) for model, row, case in zip(models, rows, cases_of_options, strict=True)]


def matrix() -> list[tuple[str, Case]]:
    """All layouts of all models."""
    return [(model_name, case) for model_name in MODELS for case in cases(model_name)]


def selection(number: int = IN_MAKE_TEST) -> list[tuple[str, Case]]:
    """Some layouts of the matrix that cover every kind of mesh with every model, then as many pairs as they can."""
    return _select(matrix(), number, "kind", ("kind", "tp", *OPTIONS))


def pipeline_selection(number: int = PIPELINES_IN_MAKE_TEST) -> list[tuple[str, Case]]:
    """The same of those with pipeline stages, and every schedule."""
    return _select(pipeline_matrix(), number, "pp_schedule", ("kind", "pp", "tp", "pp_schedule", *PIPELINE_OPTIONS))


def _select(
    remaining: list[tuple[str, Case]], number: int, first: str, names: tuple[str, ...]
) -> list[tuple[str, Case]]:
    remaining, chosen = list(remaining), []
    kinds: set[tuple[str, str]] = set()
    covered: set[Any] = set()

    def traits(entry: tuple[str, Case]) -> set[Any]:
        model_name, case = entry
        return pairs({"model": model_name} | {name: case[name] for name in case if name in names})

    def gain(entry: tuple[str, Case]) -> tuple[bool, int]:
        return (entry[0], entry[1][first]) not in kinds, len(traits(entry) - covered)

    while remaining and len(chosen) < number:
        best = max(remaining, key=gain)
        remaining.remove(best)
        chosen.append(best)
        kinds.add((best[0], best[1][first]))
        covered |= traits(best)
    return chosen


def of_each_kind() -> list[tuple[str, Case]]:
    """One layout of each kind of mesh, the models in turn."""
    kinds = dict.fromkeys(kind(mesh) for mesh in meshes())
    chosen = []
    for index, wanted in enumerate(kinds):
        model_name = list(MODELS)[index % len(MODELS)]
        chosen.append(next(entry for entry in selection() if entry[0] == model_name and entry[1]["kind"] == wanted))
    return chosen
