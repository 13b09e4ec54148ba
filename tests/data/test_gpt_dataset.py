"""Samples are slices found by arithmetic, splits cover all documents, and the entropy is that of the labels."""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.gpt_dataset import GPTDataset, split_documents, unigram_entropy
from data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from runtime.errors import CorruptDataError, DataPathError


@pytest.fixture
def indexed(tmp_path: Path) -> IndexedDataset:
    with IndexedDatasetWriter(tmp_path / "x", 1000) as writer:
        writer.add_document(np.arange(103))
    return IndexedDataset(tmp_path / "x")


def test_an_epoch_visits_each_window_once(indexed: IndexedDataset) -> None:
    dataset = GPTDataset(indexed, start=2, stop=103, seq_length=10, seed=5, dataset=3)
    assert dataset.samples_per_epoch == 10
    for epoch in (0, 1):
        samples = [dataset.sample(epoch * 10 + index) for index in range(10)]
        assert sorted(sample.window for sample in samples) == list(range(10))
        assert {(sample.epoch, sample.dataset) for sample in samples} == {(epoch, 3)}
        for sample in samples:
            assert sample.tokens.tolist() == list(range(2 + 10 * sample.window, 2 + 10 * sample.window + 11))
            assert sample.tokens.dtype == np.int64


def test_order_depends_on_seed_epoch_and_dataset(indexed: IndexedDataset) -> None:
    def order(seed: int = 5, epoch: int = 0, dataset: int = 0) -> list[int]:
        source = GPTDataset(indexed, 0, 103, 1, seed, dataset)
        return [source.sample(epoch * source.samples_per_epoch + index).window for index in range(102)]

    assert order() == order()
    assert len({tuple(order(**change)) for change in ({}, {"seed": 6}, {"epoch": 1}, {"dataset": 1})}) == 4


@pytest.mark.parametrize(("tokens", "windows"), [(11, 1), (20, 1), (21, 2), (22, 2)])
def test_number_of_windows(indexed: IndexedDataset, tokens: int, windows: int) -> None:
    assert GPTDataset(indexed, 50, 50 + tokens, 10, 0).samples_per_epoch == windows


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_too_short_a_split_is_refused(indexed: IndexedDataset, tokens: int) -> None:
    message = f"^{tokens} tokens, where data.seq_length=10 needs at least 11; lower .*data.split"
    with pytest.raises(DataPathError, match=message):
        GPTDataset(indexed, 50, 50 + tokens, 10, 0)


def test_a_token_outside_the_vocabulary_is_refused(indexed: IndexedDataset) -> None:
    assert GPTDataset(indexed, 0, 103, 102, 0, vocab_size=103).sample(0).tokens[-1] == 102
    dataset = GPTDataset(indexed, 0, 103, 102, 0, vocab_size=102)
    with pytest.raises(CorruptDataError, match=r"from 0 to 102 at tokens 0 to 102 .*vocabulary ends at 101"):
        dataset.sample(0)
    with pytest.raises(CorruptDataError, match="vocabulary of 102"):
        unigram_entropy(dataset, 102)


SHARES = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=4).filter(any)


@settings(deadline=None)
@given(documents=st.integers(0, 2000), shares=SHARES)
def test_splits_cover_all_documents_in_order(documents: int, shares: list[float]) -> None:
    ranges = split_documents(documents, shares)
    assert len(ranges) == len(shares)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == documents
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    positive = sum(share > 0 for share in shares)
    for (first, end), share in zip(ranges, shares, strict=True):
        assert end - first >= (share > 0 and documents >= positive)
        assert end == first or share > 0
        assert abs(end - first - documents * share / math.fsum(shares)) <= positive + 1


@pytest.mark.parametrize(
    ("documents", "shares", "expected"),
    [
        (10_000, [98, 1, 1], [9800, 100, 100]),
        (1, [98, 1, 1], [1, 0, 0]),
        (2, [1, 98, 1], [1, 1, 0]),
        (2, [98, 0, 1], [1, 0, 1]),
        (2, [40, 30, 30], [1, 1, 0]),
        (20, [50, 30, 20], [10, 6, 4]),
        (0, [98, 1, 1], [0, 0, 0]),
        (5, [1, 0, 0], [5, 0, 0]),
    ],
)
def test_split_sizes(documents: int, shares: list[float], expected: list[int]) -> None:
    assert [end - first for first, end in split_documents(documents, shares)] == expected


def test_entropy_counts_labels_of_whole_windows_only(tmp_path: Path) -> None:
    # token 9 is only an input, the last two fill no window
    with IndexedDatasetWriter(tmp_path / "x", 10) as writer:
        writer.add_document([9, 0, 1, 0, 2, 8, 8])
    dataset = GPTDataset(IndexedDataset(tmp_path / "x"), 0, 7, 4, 0)
    assert unigram_entropy(dataset, 10) == pytest.approx(1.5 * math.log(2), rel=1e-12)
    assert unigram_entropy(dataset, 10, max_tokens=2) == pytest.approx(math.log(2), rel=1e-12)


def test_entropy_of_equally_frequent_tokens(indexed: IndexedDataset) -> None:
    assert unigram_entropy(GPTDataset(indexed, 0, 103, 102, 0), 1000) == pytest.approx(math.log(102), rel=1e-12)
