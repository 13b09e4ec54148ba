"""`make parity`: every layout of the matrix against one process; the figures go to docs/parity.md."""

import os
import sys
from itertools import groupby
from pathlib import Path

import torch

from settings.config import RunConfig
from tests.parity.covering import Case
from tests.parity.layouts import LARGEST_WORLD, MODELS, SEQ_LENGTH, configuration, matrix, pipeline_matrix
from verification.parity import LIMIT, STEPS, Comparison, describe_layout, verify

PAGE = Path(__file__).resolve().parents[2] / "docs" / "parity.md"
INTRODUCTION = """\
# Parity: every layout computes what one process does

`make parity` writes this page. Each line is one layout of ranks on gloo, compared with one process that takes the whole
batch at once, in float64, over {steps} optimizer steps on ragged data: documents of many lengths, tokens that count in
the loss spread very unevenly, and in the first step a data-parallel rank without any. All is gathered and compared:

- the loss and the gradient norm of every step, by relative error;
- every gradient of every step, before clipping, by max|a-b| / max(max|b|, 1e-3 * global gradient norm); the page names
  the worst;
- every weight after the last step, by max|a-b| / max(1, max|b|);
- initial weights, and what several ranks hold alike, bit for bit.

A layout is *equal* where nothing is off by more than {limit:g}. The layouts are every mesh of {least} to {most} ranks;
the options are spread over them so that every two meet, and each meets every kind of mesh and every size of `tp`. Then
come pipelines: every mesh with 2, 3, 4 or 8 pipeline ranks under every schedule, with as many layers as the line says.
A few layouts with compiled layers follow. They run here alone, since a compiler takes its time; `make test` follows the
same layers up to the graph that the compiler would get.
What the harness would find is tested as well:
`tests/parity/test_planted_bugs.py` plants bugs of the usual kinds, and each is caught.

Your own configuration, scaled down: `kilotron parity model=llama3_8b parallel.tp=2 world_size=4`.

{count} layouts, torch {torch}. The worst of all: loss {loss:.1e}, gradient {gradient:.1e}, gradient norm {norm:.1e},
weight {weight:.1e}.
"""
HEADER = """
## {title}

| model | layout | loss | worst gradient | of | gradient norm | worst weight | verdict |
|---|---|---|---|---|---|---|---|
"""


COMPILED: list[tuple[str, Case]] = [
    (
        model_name,
        {"tp": 2, "dp_replicate": 1, "dp_shard": 2, "sequence": sequence, "zero": 3, "tied": True,
         "recompute": recompute, "accumulation": 1, "dropout": 0.2, "optimizer": "adamw"},
    )
    for model_name, sequence, recompute in (
        ("gpt2", True, "none"), ("gpt2", False, "full"), ("llama", True, "selective"), ("llama", True, "full")
    )
] + [
    (
        "gpt2",
        {"pp": 2, "pp_schedule": schedule, "tp": 2, "dp_replicate": 1, "dp_shard": 1, "sequence": True, "tied": True,
         "recompute": "none", "micro_batches": "fewest", "layers": "even", "dropout": 0.2, "optimizer": "adamw"},
    )
    for schedule in ("gpipe", "1f1b", "interleaved")
]  # fmt: skip


def configurations() -> list[RunConfig]:
    """What the page is of, model by model: the matrix, and a few layouts whose layers are compiled."""
    plain, compiled = ([configuration(*entry) for entry in matrix() + pipeline_matrix()],
                       [configuration(*entry, compiled=True) for entry in COMPILED])  # fmt: skip
    return sorted(plain + compiled, key=lambda config: list(MODELS).index(config.name))


def main() -> int:
    """Runs all layouts, writes the page, and returns 0 where all are equal."""
    entries = configurations()
    found = []
    for number, config in enumerate(entries, start=1):
        model_name = config.name
        comparison = verify(config)
        found.append((model_name, describe_layout(config), comparison))
        print(f"{number}/{len(entries)} {model_name} {describe_layout(config)}: {comparison.verdict}", flush=True)
    PAGE.write_text(page(found), encoding="utf-8")
    unequal = sum(not comparison.equal for _, _, comparison in found)
    print(f"{len(found) - unequal} of {len(found)} layouts are equal; see {os.path.relpath(PAGE)}")
    return 1 if unequal else 0


def page(found: list[tuple[str, str, Comparison]]) -> str:
    """The page's text, of (model, layout, comparison)."""
    all_of_them = [comparison for _, _, comparison in found]
    text = INTRODUCTION.format(
        steps=STEPS,
        limit=LIMIT,
        least=2,
        most=LARGEST_WORLD,
        count=len(found),
        torch=torch.__version__.partition("+")[0],
        loss=max(one.loss for one in all_of_them),
        gradient=max(one.gradient for one in all_of_them),
        norm=max(one.gradient_norm for one in all_of_them),
        weight=max(one.weight for one in all_of_them),
    )
    for model_name, lines in groupby(found, key=lambda line: line[0]):
        text += HEADER.format(title=describe_model(model_name))
        for _, layout, one in lines:
            figures = f"{one.loss:.1e} | {one.gradient:.1e} | {one.gradient_name} | {one.gradient_norm:.1e}"
            verdict = "equal" if one.equal else f"not equal: {one.verdict}"
            text += f"| {model_name} | {layout} | {figures} | {one.weight:.1e} | {verdict} |\n"
    return text


def describe_model(name: str) -> str:
    """What the model of a table has."""
    model = MODELS[name]
    words = [
        f"{model.num_layers} layers",
        model.normalization,
        model.activation,
        f"{model.position_embedding} positions",
    ]
    words += [f"{model.rope_scaling} scaling"] if model.rope_scaling else []
    words += ["normalised queries and keys"] if model.qk_norm else []
    words += [f"a window of {model.sliding_window} in {SEQ_LENGTH[name]} positions"] if model.sliding_window else []
    words += [
        f"{model.num_attention_heads} heads",
        f"{model.query_groups} key/value heads",
        f"vocabulary {model.vocabulary}",
    ]
    return f"{name}: {', '.join(words)}, {'biases' if model.bias else 'no biases'}"


if __name__ == "__main__":
    sys.exit(main())
