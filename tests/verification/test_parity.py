"""The parity harness' own arithmetic: putting shards together, comparing, and the data it feeds."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import ModelConfig
from data.batches import BatchReader
from data.config import DataConfig
from parallel.config import ParallelConfig
from parallel.sharding import Box
from settings.config import OptimizerConfig, RunConfig, TrainConfig
from verification.parity import (
    StepRecord,
    Trajectory,
    compare,
    describe_layout,
    local_rows,
    one_process,
    put_together,
    ragged_batches,
)


def config(dp_replicate=1, dp_shard=2, tp=1, micro=2, accumulation=2, seq=16, seed=3):
    return RunConfig(
        seed=seed,
        world_size=dp_replicate * dp_shard * tp,
        model=ModelConfig(vocab_size=67, max_position_embeddings=seq),
        data=DataConfig(seq_length=seq),
        parallel=ParallelConfig(dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp),
        train=TrainConfig(micro_batch_size=micro, global_batch_size=dp_replicate * dp_shard * micro * accumulation),
    )


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(1, 3), st.randoms())
def test_shards_and_their_replicas_are_put_together_in_any_order(lengths, columns, random):
    whole = np.random.default_rng(0).normal(size=(sum(lengths), columns))
    starts = np.cumsum([0, *lengths])
    pieces = [
        (Box((start, 0), (length, columns)), whole[start : start + length].copy())
        for start, length in zip(starts, lengths, strict=False)
    ] * 2
    random.shuffle(pieces)
    found, faults = put_together(whole.shape, pieces)
    assert not faults
    assert found.tobytes() == whole.tobytes()


def test_a_replica_that_differs_in_one_bit_is_a_fault():
    one = np.array([1.0, 2.0])
    other = one.copy()
    other[1] = np.nextafter(2.0, 3.0)
    assert put_together((2,), [(Box((0,), (2,)), one), (Box((0,), (2,)), other)])[1] == ["replicas differ"]
    # equal as numbers, but not as bits
    zeros = [(Box((1,), (1,)), np.array([0.0])), (Box((0,), (2,)), np.array([1.0, -0.0]))]
    assert put_together((2,), zeros)[1] == ["replicas differ"]
    overlap = [(Box((0,), (2,)), np.array([1.0, 2.0])), (Box((1,), (2,)), np.array([2.0, 3.0]))]
    assert put_together((3,), overlap)[0].tolist() == [1.0, 2.0, 3.0]


def test_what_no_rank_holds_is_a_fault_and_no_number():
    whole, faults = put_together((2, 2), [(Box((0, 1), (2, 1)), np.ones((2, 1)))])
    assert faults == ["no rank holds 2 of 4 elements"]
    assert np.isnan(whole[:, 0]).all()
    assert put_together((3,), [])[1] == ["no rank holds 3 of 3 elements"]


def trajectory(steps=3):
    weights = {"large": np.array([100.0, -3.0]), "small": np.array([1e-9])}
    gradients = {"large": np.array([2.0, 1.0]), "small": np.array([1e-9])}
    return Trajectory(dict(weights), [StepRecord(4.0, 2.0, dict(gradients)) for _ in range(steps)], dict(weights), [])


def step(found, number, **changes):
    found.steps[number] = replace(found.steps[number], **changes)


def test_what_is_equal_is_equal():
    found = compare(trajectory(), trajectory())
    assert (found.equal, found.verdict) == (True, "equal")
    assert (found.loss, found.gradient, found.gradient_norm, found.weight) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("error", [0.9e-10, 1.1e-10])
def test_each_difference_is_measured_by_its_own_scale(error):
    for kind in ("loss", "norm", "gradient", "small gradient", "weight", "small weight"):
        found = trajectory()
        if kind == "loss":
            step(found, 1, loss=4.0 * (1 + error))
        elif kind == "norm":
            step(found, 2, gradient_norm=2.0 * (1 - error))
        elif kind == "gradient":
            step(found, 0, gradients=found.steps[0].gradients | {"large": np.array([2.0, 1.0 + 2 * error])})
        elif kind == "small gradient":
            small = np.array([1e-9 + 2e-3 * error])  # a thousandth of the norm
            step(found, 0, gradients=found.steps[0].gradients | {"small": small})
        elif kind == "weight":
            found.weights["large"] = np.array([100.0, -3.0 + 100 * error])
        else:
            found.weights["small"] = np.array([1e-9 + error])
        assert compare(trajectory(), found).equal == (error < 1e-10), kind


def test_the_gradient_named_is_of_the_first_step_that_is_wrong():
    found = trajectory()
    step(found, 1, gradients=found.steps[1].gradients | {"small": np.array([1e-3])})
    step(found, 2, gradients={"large": np.array([9.0, 9.0]), "small": np.array([1.0])})
    assert compare(trajectory(), found).verdict == "step 2: gradient of small is off by 5.0e-01"
    assert compare(trajectory(), found).gradient_name == "small"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_not_equal(value):
    for change in ("loss", "gradient_norm"):
        found = trajectory()
        step(found, 0, **{change: value})
        assert not compare(trajectory(), found).equal
    found = trajectory()
    step(found, 0, gradients=found.steps[0].gradients | {"small": np.array([value])})
    assert "gradient of small is off by inf" in compare(trajectory(), found).verdict
    found = trajectory()
    found.weights["large"] = np.array([value, -3.0])
    assert "weight large is off by inf" in compare(trajectory(), found).verdict


def test_names_shapes_and_initial_bits_count():
    found = trajectory()
    del found.steps[0].gradients["small"]
    assert "gradient of small is off by inf" in compare(trajectory(), found).verdict
    found = trajectory()
    found.weights["large"] = np.array([100.0])
    assert "weight large is off by inf" in compare(trajectory(), found).verdict
    found = trajectory()
    found.initial_weights["small"] = np.nextafter(found.initial_weights["small"], 1.0)
    assert compare(trajectory(), found, limit=1.0).verdict == "initial weight of small differs"
    found = trajectory()
    found.initial_weights["more"] = np.zeros(1)
    assert compare(trajectory(), found).verdict == "parameters differ: more"
    found = replace(trajectory(), faults=["weight of large: replicas differ", "weight of small: replicas differ"])
    assert compare(trajectory(), found).verdict == "weight of large: replicas differ; and 1 more like it"


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 24), st.integers(0, 9)
)
def test_data_is_ragged_and_never_without_a_token_that_counts(replicate, shard, micro, accumulation, seq, seed):
    given_config = config(replicate, shard, 1, micro, accumulation, seq, seed)
    dp = given_config.parallel.dp
    batches = ragged_batches(given_config)
    again = ragged_batches(given_config)
    for index, (batch, same) in enumerate(zip(batches, again, strict=True)):
        rows = given_config.train.global_batch_size
        assert batch.input_ids.shape == batch.labels.shape == (rows, seq)
        assert batch.sample_indices.tolist() == list(range(index * rows, (index + 1) * rows))
        assert (batch.labels != -100).any()
        assert batch.labels.tobytes() == same.labels.tobytes()
        counted = batch.labels[:, :-1] != -100
        assert (batch.labels[:, :-1][counted] == batch.input_ids[:, 1:][counted]).all()
    last = np.concatenate([batches[0].labels[part] for part in local_rows(given_config, dp - 1)])
    assert (last == -100).all() == (dp > 1)
    assert (batches[1].labels[:, -(-seq // 4) :] == -100).all()


def test_raggedness_is_real():
    labels = np.concatenate([batch.labels for batch in ragged_batches(config(dp_shard=1, micro=16, seq=64))])
    by_row = (labels != -100).sum(1)
    assert 0.2 < (labels[:32] != -100).mean() < 0.8
    assert by_row.std() > 8


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_a_rank_takes_the_rows_that_the_reader_would_give_it(replicate, shard, micro, accumulation):
    given_config = config(replicate, shard, 1, micro, accumulation)
    dp, rows = given_config.parallel.dp, given_config.train.global_batch_size
    dataset = SimpleNamespace(sample=lambda index: SimpleNamespace(tokens=np.full(3, index)))
    for rank in range(dp):
        reader = BatchReader(dataset, lambda _, rows=rows: rows, micro, rank, dp, 0)
        wanted = [batch.sample_indices.tolist() for batch in reader.read(0)]
        assert [list(range(rows))[part] for part in local_rows(given_config, rank)] == wanted


def test_the_reference_is_one_process_with_the_whole_batch_at_once():
    layout = replace(config(2, 2, 2), train=replace(config(2, 2, 2).train, recompute="full"))
    reference = one_process(layout)
    assert (reference.world_size, reference.parallel) == (1, ParallelConfig(dp_shard=1))
    assert reference.micro_batch_size == layout.train.global_batch_size == 16
    assert (reference.accumulation_steps, reference.train.recompute) == (1, "none")
    assert (reference.model, reference.optimizer, reference.seed) == (layout.model, layout.optimizer, layout.seed)


def test_a_layout_in_words():
    assert describe_layout(config(2, 2, 2)) == "tp=2 dp_replicate=2 dp_shard=2 sequence zero=3 accumulate=2 tied"
    plain = replace(config(1, 1, 2, accumulation=1), model=ModelConfig(tie_embeddings=False, dropout=0.1))
    plain = replace(plain, parallel=replace(plain.parallel, sequence=False))
    assert describe_layout(plain) == "tp=2 dropout"
    assert describe_layout(replace(plain, optimizer=OptimizerConfig(name="muon"))) == "tp=2 muon dropout"
