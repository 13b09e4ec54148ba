"""The harness finds what it is there for: every planted bug is caught, and named; without it the layout is equal."""

from functools import cache

import pytest

from tests.parity import planted_bugs
from tests.parity.layouts import DIMENSIONS, configuration
from verification.local_ranks import run_ranks
from verification.parity import compare, one_process, parity_rank, ragged_batches, run_layout, verify

LAYOUTS = {
    "tensor": ("gpt2", {"tp": 2, "sequence": False}),
    "sequence": ("gpt2", {"tp": 2, "sequence": True, "dropout": 0.2}),
    "groups": ("llama", {"tp": 4, "sequence": False}),
    "replicas": ("gpt2", {"dp_replicate": 2, "dp_shard": 2, "accumulation": 3, "dropout": 0.2}),
    "composed": ("llama", {"tp": 2, "sequence": True, "dp_replicate": 2, "zero": 1}),
    "pipeline": ("gpt2", {"pp": 2, "pp_schedule": "1f1b", "tied": True, "micro_batches": "fewest", "layers": "uneven"}),
    "v": ("gpt2", {"pp": 2, "pp_schedule": "zbv", "tied": True, "micro_batches": "fewest", "layers": "uneven"}),
    "muon": ("gpt2", {"tp": 2, "dp_shard": 2, "optimizer": "muon"}),
}
CAUGHT = [  # (bug, layout, what the verdict says of it)
    ("norm_gradient_not_summed", "sequence", "step 1: gradient of block.layers.1.mlp_norm.weight: replicas differ"),
    ("row_bias_gradient_not_summed", "sequence", "step 1: gradient of block.layers.0.mlp.down.bias: replicas differ"),
    ("key_gradient_not_summed", "groups", "step 1: gradient of block.layers.2.attention.key.weight: replicas differ"),
    ("query_norm_gradient_not_summed", "groups", "gradient of block.layers.1.attention.query_norm.weight: replicas"),
    ("gradient_scaled_by_ranks", "tensor", "step 1: gradient of embedding.word.weight is off by"),
    ("bias_on_every_rank", "tensor", "step 2: gradient of block.layers."),
    ("loss_divided_by_local_tokens", "replicas", "loss is off by"),
    ("gradients_averaged_over_ranks", "replicas", "gradient norm is off by 7.5e-01"),
    ("replicas_never_meet", "replicas", "step 1: gradient of embedding.word.weight: replicas differ"),
    ("shards_swapped", "sequence", "loss is off by"),
    ("wrong_rotary_offset", "composed", "step 1: gradient of block.layers."),
    ("positions_of_the_first_shard", "sequence", "loss is off by"),
    ("dropout_by_place_in_the_batch", "replicas", "loss is off by"),
    ("norm_counted_twice", "composed", "gradient norm is off by"),
    ("replicas_counted_twice", "replicas", "gradient norm is off by 4.1e-01"),
    ("norm_of_own_shard", "tensor", "gradient norm is off by"),
    ("initial_weight_drawn_per_rank", "tensor", "initial weight of block.layers.0.mlp.up.weight differs"),
    ("initial_weight_drawn_per_rank", "replicas", "initial weight of block.layers.0.mlp.up.weight: replicas differ"),
    ("muon_of_own_shard", "muon", "step 2: gradient of"),
    ("micro_batch_scaled_twice", "pipeline", "step 1: gradient of"),
    ("tied_gradient_not_exchanged", "pipeline", "step 1: gradient of embedding.word.weight: replicas differ"),
    ("tied_gradient_not_exchanged", "v", "step 1: gradient of embedding.word.weight: replicas differ"),
    ("tied_gradient_counted_twice", "pipeline", "gradient norm is off by"),
    ("tied_gradient_counted_twice", "v", "gradient norm is off by"),
    ("stage_with_a_layer_too_few", "pipeline", "initial weight of block.layers.3.attention_norm.weight: no rank holds"),
    ("padding_not_masked", "groups", "loss is off by"),
]


def build(layout):
    model_name, case = LAYOUTS[layout]
    usual = dict.fromkeys(DIMENSIONS, 1) | {"tied": False, "recompute": "none", "accumulation": 1, "dropout": 0.0}
    usual["optimizer"] = "adamw"
    return configuration(model_name, usual | case)


@cache
def reference(layout):
    """What one process finds, on the same batches."""
    config = build(layout)
    batches = ragged_batches(config)
    return batches, run_ranks(1, parity_rank, one_process(config), batches)[0]


def rank_with_bug(rank, world_size, bug, config, batches):
    getattr(planted_bugs, bug)()
    return run_layout(config, batches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_bug_these_layouts_are_equal(layout):
    assert verify(build(layout)).verdict == "equal"


@pytest.mark.parametrize(("bug", "layout", "words"), CAUGHT)
def test_the_bug_is_caught_and_named(bug, layout, words):
    config, (batches, expected) = build(layout), reference(layout)
    found = compare(expected, run_ranks(config.world_size, rank_with_bug, bug, config, batches)[0])
    assert not found.equal
    assert words in found.verdict
