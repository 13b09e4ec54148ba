"""`kilotron parity`: what is scaled down and what stays, exit codes, and the table."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tools.parity
import verification.parity
from core.config import ModelConfig
from data.config import DataConfig
from parallel.config import ParallelConfig
from settings.checks.rules import check_relations
from settings.checks.values import check_choices, check_ranges
from settings.compose import compose
from settings.config import RunConfig, TrainConfig
from settings.resolve import resolve
from tools.cli import main
from tools.parity import table
from verification.parity import Comparison
from verification.scale_down import RANKS, scale_down, smaller_layout

SMALL = ["model=tiny", "model.num_layers=1", "parallel.tp=2", "world_size=2", "train.global_batch_size=2"]


def resolved(*words):
    return resolve(tools.parity.without_data(compose(words)), {})


def problems(config):
    return [*check_ranges(config), *check_choices(config), *check_relations(config)]


def test_an_equal_layout_exits_0_and_says_so(capsys):
    assert main(["parity", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "model.hidden_size              144 -> 48" in said
    assert "train.precision                fp32 -> fp64" in said
    header, row = said.splitlines()[-2:]
    assert header.split()[:3] == ["layout", "loss", "worst"]
    assert row.startswith("tp=2 sequence tied  ")
    assert row.endswith("  equal")


def test_a_layout_that_is_not_equal_exits_1_and_names_what_is_off(capsys, monkeypatch):
    found = Comparison(1e-3, 0.5, "final_norm.weight", 1e-3, 0.1, "head.weight", ("loss is off by 1.0e-03",))
    monkeypatch.setattr(verification.parity, "verify", lambda _: found)
    assert main(["parity", *SMALL]) == 1
    assert capsys.readouterr().out.endswith("final_norm.weight  1.0e-03        1.0e-01       loss is off by 1.0e-03\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tiny", "parallel.tp=2", "world_size=3"], "must divide 3"),
        (["model=llama3_8b", "parallel.tp=3", "world_size=6"], "try parallel.tp=2"),
        (["model=tiny", "parallel.tq=2", "world_size=2"], "parallel.tp"),
        (["model=tiny"], "say which layout, such as world_size=4 parallel.tp=2"),
    ],
)
def test_an_illegal_configuration_exits_78(words, message, capsys):
    assert main(["parity", *words]) == 78
    assert message in capsys.readouterr().err


def test_nothing_is_asked_of_data_or_checkpoints():
    words = ["model=gpt2_small", "data.path=not/here", "checkpoint.load=nor/this", "world_size=2", "data.split=[1,0,0]"]
    assert resolved(*words, "train.eval_interval=5").world_size == 2


def test_the_structure_of_a_large_model_stays():
    large = resolved("model=llama3_8b", "parallel.tp=2", "world_size=4", "optimizer.eps=1e-15", "train.recompute=full")
    small = scale_down(large)
    assert (small.model.num_attention_heads, small.model.num_query_groups) == (32, 8)
    assert small.model.ffn_hidden_size / small.model.hidden_size == 14336 / 4096
    assert (small.model.hidden_size, small.model.num_layers, small.seq_length) == (128, 2, 16)
    kept = ("normalization", "activation", "position_embedding", "rope_theta", "bias", "tie_embeddings", "dropout")
    assert all(getattr(small.model, name) == getattr(large.model, name) for name in kept)
    assert small.model.init_std == pytest.approx(0.02 * math.sqrt(32), rel=0.01)
    assert small.parallel == large.parallel
    assert (small.train.recompute, small.train.precision, small.optimizer.eps) == ("full", "fp64", 1e-8)


def test_stages_that_are_uneven_stay_so():
    words = ["model=tiny", "parallel.pp=2", "world_size=2"]
    for counts, wanted in (("[8,4]", [2, 1]), ("[6,6]", [1, 1]), ("null", [1, 1])):
        small = scale_down(resolved(*words, f"parallel.layers_per_stage={counts}"))
        assert (small.layers_per_stage, small.model.num_layers) == (wanted, sum(wanted))
        assert problems(small) == []


def test_a_window_stays_shorter_than_the_sequence():
    words = ["model=qwen3_8b", "world_size=2"]
    assert scale_down(resolved(*words)).model.sliding_window is None
    small = scale_down(resolved(*words, "model.sliding_window=4096"))
    assert (small.model.sliding_window, small.seq_length, small.model.qk_norm) == (8, 16, True)


def test_accumulation_stays_where_it_was():
    words = ["model=tiny", "world_size=4", "train.global_batch_size=64"]
    assert scale_down(resolved(*words)).accumulation_steps == 1
    assert scale_down(resolved(*words, "train.micro_batch_size=4")).accumulation_steps == 2


def test_a_growing_batch_stays_small_and_names_of_parameters_that_go_are_forgotten():
    words = ["world_size=2", "train.batch_schedule=0:8 1M:64", "train.micro_batch_size=2", "optimizer=muon"]
    small = scale_down(resolved(*words, "optimizer.groups=['block.layers.11.*:lr_scale=0.5']"))
    assert (small.train.global_batch_size, small.batches.sizes, small.accumulation_steps) == (8, [8], 2)
    assert (small.optimizer.name, small.optimizer.groups) == ("muon", [])


@pytest.mark.parametrize(
    ("tp", "replicate", "shard", "wanted"),
    [
        (2, 1, 2, (1, 2)),
        (2, 8, 8, (2, 2)),
        (1, 64, 1, (8, 1)),
        (1, 4, 64, (2, 4)),
        (4, 2, 2, (1, 2)),
        (8, 4, 16, (1, 1)),
        (16, 2, 2, (1, 1)),
        (1, 3, 3, (2, 3)),
    ],
)
def test_large_worlds_lose_replicas_then_shards(tp, replicate, shard, wanted):
    small = smaller_layout(ParallelConfig(tp=tp, dp_replicate=replicate, dp_shard=shard))
    assert (small.dp_replicate, small.dp_shard) == wanted


@given(
    st.sampled_from([1, 2, 3, 4, 8, 16]),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 6), st.sampled_from(["one", "ranks", "heads"])),
    st.sampled_from([None, 2, 5, 64]),
    st.tuples(st.integers(1, 90), st.integers(1, 300)),
    st.integers(1, 100),
    st.sampled_from([True, False, None]),
    st.sampled_from(["learned", "rope", "none"]),
    st.tuples(st.integers(1, 4), st.integers(1, 3)),
)
def test_what_is_legal_is_legal_in_small(tp, dp, heads, head_dim, widths, seq, sequence, positions, batch):
    per_rank, groups = heads
    count = tp * per_rank
    seq = seq if sequence is False else seq * tp
    model = ModelConfig(
        num_layers=3, hidden_size=count * widths[0], num_attention_heads=count, head_dim=head_dim,
        num_query_groups={"one": 1, "ranks": tp, "heads": count}[groups], ffn_hidden_size=tp * widths[1],
        vocab_size=2000, max_position_embeddings=seq, position_embedding=positions, init_std=1e-6,
    )  # fmt: skip
    layout = ParallelConfig(tp=tp, dp_replicate=dp[0], dp_shard=dp[1], sequence=sequence)
    train = TrainConfig(micro_batch_size=batch[0], global_batch_size=layout.dp * batch[0] * batch[1])
    config = RunConfig(
        world_size=tp * layout.dp, model=model, data=DataConfig(corpus="sample"), parallel=layout, train=train
    )
    assume(not problems(config))
    small = scale_down(config)
    assert problems(small) == []
    assert small.world_size <= max(RANKS, tp)
    assert small.model.hidden_size <= max(4 * count, model.hidden_size)
    assert small.model.ffn_hidden_size <= model.ffn_hidden_size
    assert (small.accumulation_steps > 1) == (config.accumulation_steps > 1)
    assert small.seq_length <= 2 * 16


def test_a_table_stands_in_columns():
    assert table([["a", "b"], ["long", "c"]]) == "a     b\nlong  c"
