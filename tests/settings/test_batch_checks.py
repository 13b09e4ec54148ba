"""Batches beyond reason: more than memory holds, or than a thousand epochs of the data."""

import dataclasses
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pretrain_gpt
from data.indexed_dataset import IndexedDatasetWriter
from data.metadata import Metadata
from runtime.errors import ConfigError
from settings.checks import batch, pipeline
from settings.checks.batch import MOST_EPOCHS, check_batch_epochs, check_batch_memory, physical_memory
from settings.compose import compose
from settings.config import RunConfig
from settings.resolve import resolve
from verification.local_ranks import run_ranks

BASE = RunConfig()


def with_batch(size, *, schedule=None, micro=None, seq_length=100, workers=1, **layout):
    train = dataclasses.replace(BASE.train, global_batch_size=size, micro_batch_size=micro, batch_schedule=schedule)
    data = dataclasses.replace(BASE.data, seq_length=seq_length, num_workers=workers)
    parallel = dataclasses.replace(BASE.parallel, **{"dp_shard": 1, **layout})
    return dataclasses.replace(BASE, train=train, data=data, parallel=parallel)


def test_the_memory_of_this_host_is_known():
    assert 2**28 < physical_memory() < 2**50


@pytest.mark.parametrize(("workers", "fits"), [(0, 300), (1, 100)])
def test_token_ids_of_a_step_fit_into_memory(monkeypatch, workers, fits):
    monkeypatch.setattr(batch, "physical_memory", lambda: 24 * 100 * 300)
    assert not list(check_batch_memory(with_batch(fits, workers=workers)))
    assert not list(check_batch_memory(with_batch(4 * fits, workers=workers, dp_shard=4)))
    (problem,) = check_batch_memory(with_batch(fits + 1, workers=workers))
    assert problem.startswith(
        f"train.global_batch_size={fits + 1}: a global batch of {fits + 1} samples over 1 data-par"
    )
    assert problem.endswith(f"this host has 0.0 GB; try at most train.global_batch_size={fits}")
    schedule = f"0:{fits} 1k:{fits + 1}"
    (problem,) = check_batch_memory(with_batch(1, schedule=schedule, workers=workers))
    assert problem.startswith(f"train.batch_schedule='{schedule}': a global batch of {fits + 1} samples")
    assert problem.endswith(f"try at most a size of {fits}")
    (problem,) = check_batch_memory(with_batch(1, seq_length=10**6, workers=workers))
    assert problem.endswith("try at most a shorter data.seq_length, or more data")


@given(
    size=st.integers(1, 400),
    most=st.integers(1, 400),
    micro=st.none() | st.integers(1, 5),
    ranks=st.integers(1, 4),
    pp=st.integers(1, 4),
    schedule=st.sampled_from(["1f1b", "interleaved", "zb", "zbv", "dualpipev"]),
)
def test_the_batch_that_a_refusal_names_is_legal(size, most, micro, ranks, pp, schedule):
    config = with_batch(size, micro=micro, dp_shard=ranks, pp=pp, pp_schedule=schedule)
    found = list(batch._too_large(config, batch.Limit(most, "is too large")))
    assert bool(found) == (size > most)
    for near, any_micro in re.findall(r"at most train\.global_batch_size=(\d+)( with .*=null)?$", "".join(found)):
        legal = with_batch(int(near), micro=None if any_micro else micro, dp_shard=ranks, pp=pp, pp_schedule=schedule)
        assert int(near) <= most
        assert not [*batch.check_batch(legal), *pipeline.check_pipeline_batch(legal)]


def test_no_step_takes_more_than_a_thousand_epochs():
    assert not list(check_batch_epochs(with_batch(30 * MOST_EPOCHS), 30))
    (problem,) = check_batch_epochs(with_batch(30 * MOST_EPOCHS + 1), 30)
    assert problem == (
        "train.global_batch_size=30001: a global batch of 30001 samples is more than 1000 epochs of the data, which "
        "has 30 samples of data.seq_length=100; try at most train.global_batch_size=30000"
    )


@pytest.mark.parametrize("described", [True, False])
def test_data_that_is_there_bounds_the_batch_of_a_configuration(tmp_path: Path, described: bool):
    with IndexedDatasetWriter(tmp_path / "x", 257) as writer:
        for _ in range(10):
            writer.add_document(np.arange(101))
    if described:
        Metadata("bytes", 257, 256, 10, 1010, 0, {"bin": "", "idx": ""}, None).write(tmp_path / "x")
    words = [f"data.path={tmp_path}/x", "data.tokenizer=bytes", "model=tiny", "data.seq_length=10"]
    samples = 100 if described else 201  # a token may be a byte, as long as nobody has read how wide it is
    assert resolve(compose([*words, f"train.global_batch_size={1000 * samples}"]), {})
    with pytest.raises(
        ConfigError, match=rf"has {samples} samples of data.seq_length=10; try at most \S+={samples}000"
    ):
        resolve(compose([*words, f"train.global_batch_size={1000 * samples + 1}"]), {})


def one_rank(rank, world_size, words):
    return pretrain_gpt.main(words, os.environ)


def test_a_start_counts_the_samples_of_the_training_split(tmp_path: Path):
    with IndexedDatasetWriter(tmp_path / "x", 257) as writer:
        for _ in range(10):
            writer.add_document(np.arange(101))
    words = [
        f"data.path={tmp_path}/x",
        "data.tokenizer=bytes",
        "model=tiny",
        "data.seq_length=100",
        "data.split=[1,9,0]",
    ]
    words += [f"out_dir={tmp_path}", "train.global_batch_size=1001", "data.num_workers=0"]
    with pytest.raises(ConfigError, match=r"has 1 samples of \S+=100; try at most \S+=1000 with train.micro"):
        run_ranks(1, one_rank, words, initialize=False)
