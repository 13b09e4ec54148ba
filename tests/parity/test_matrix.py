"""Layouts against one process: the selection of `make test`; the whole matrix is `make parity`."""

from pathlib import Path

import numpy as np
import pytest

from tests.parity.layouts import MODELS, cases, configuration, of_each_kind, pipeline_selection, selection
from tests.parity.matrix import PAGE, configurations
from verification.local_ranks import run_ranks
from verification.parity import describe_layout, one_process, parity_rank, ragged_batches, run_layout, verify

PIPELINE = (
    "gpt2",
    {"pp": 4, "pp_schedule": "zb", "tp": 1, "dp_replicate": 1, "dp_shard": 2, "tied": True, "recompute": "none",
     "micro_batches": "fewest", "layers": "even", "dropout": 0.2, "optimizer": "adamw"},
)  # fmt: skip

# Of the first step's loss and gradient norm, and of its gradients; a factor of two is an error of at least a half.
TOLERANCES = {"fp32": (1e-6, 5e-5), "bf16": (3e-2, 0.2), "fp16": (4e-3, 0.03)}


def identity(value):
    model_name, case = value
    return f"{model_name} {describe_layout(configuration(model_name, case))}".replace(" ", "-")


@pytest.mark.parametrize("entry", selection() + pipeline_selection(), ids=identity)
def test_the_layout_computes_what_one_process_does(entry):
    assert verify(configuration(*entry)).verdict == "equal"


@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("entry", [*of_each_kind(), PIPELINE], ids=identity)
def test_other_precisions_stay_close(entry, precision):
    numbers, gradients = TOLERANCES[precision]
    config = configuration(*entry, precision)
    found = verify(config, limit=np.inf, steps=1)
    assert found.verdict == "equal", "replicas, and initial weights bit for bit"
    assert max(found.loss, found.gradient_norm) <= numbers
    assert found.gradient <= gradients
    # Adam's first step is the learning rate, to either side where a gradient is rounding alone.
    assert found.weight <= 2.1 * config.optimizer.lr


@pytest.mark.parametrize("model_name", MODELS)
def test_the_reference_exercises_every_parameter_and_the_clipping(model_name):
    config = configuration(model_name, cases(model_name)[0])
    reference = run_ranks(1, parity_rank, one_process(config), ragged_batches(config))[0]
    assert not reference.faults
    for step in reference.steps:
        assert step.gradient_norm > config.optimizer.clip_grad
        for name, gradient in step.gradients.items():
            assert np.abs(gradient).max() > (0 if name.endswith("key.bias") else 1e-4), name
    for name, weight in reference.weights.items():
        assert not np.array_equal(weight, reference.initial_weights[name]), name


REPLICATED = [
    ("gpt2", {"tp": 2, "dp_replicate": 2, "dp_shard": 1, "sequence": True}),
    ("gpt2", {"tp": 2, "dp_replicate": 1, "dp_shard": 2, "sequence": False}),
    ("gpt2", {"tp": 2, "dp_replicate": 2, "dp_shard": 1, "sequence": True, "optimizer": "muon"}),
    ("llama", {"tp": 4, "dp_replicate": 1, "dp_shard": 1, "sequence": True}),
]


def long_run(rank, world_size, config, batches):
    trajectory = run_layout(config, batches)
    return trajectory and trajectory.faults


@pytest.mark.parametrize(
    ("model_name", "case"),
    [*REPLICATED[:1], *(pytest.param(*entry, marks=pytest.mark.slow) for entry in REPLICATED[1:])],
)
def test_after_twenty_bf16_steps_replicas_are_bit_identical(model_name, case):
    usual = {"tied": True, "recompute": "none", "accumulation": 1, "dropout": 0.2, "optimizer": "adamw"}
    config = configuration(model_name, usual | case, "bf16")
    assert run_ranks(4, long_run, config, ragged_batches(config, 20))[0] == []


def test_the_page_is_of_this_matrix():
    """`make parity` writes it; a layout that is added and not run is missing there."""
    page = Path(PAGE).read_text(encoding="utf-8")
    for config in configurations():
        assert f"| {config.name} | {describe_layout(config)} |" in page
    assert "not equal" not in page
