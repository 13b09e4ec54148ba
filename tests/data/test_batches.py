"""A global batch is the same whatever ranks, micro-batches and threads share it."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data.batches import BatchReader
from data.gpt_dataset import GPTDataset, Sample
from data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from runtime.errors import CorruptDataError


@pytest.fixture
def dataset(tmp_path: Path) -> GPTDataset:
    with IndexedDatasetWriter(tmp_path / "x", 1000) as writer:
        writer.add_document(np.arange(241) * 7 % 1000)
    return GPTDataset(IndexedDataset(tmp_path / "x"), 0, 241, 8, seed=1)


def constantly(size: int) -> Callable[[int], int]:
    return lambda _: size


def global_batches(dataset: GPTDataset, dp_size: int, micro: int, workers: int, reads: list[int]) -> Iterator[list]:
    readers = [BatchReader(dataset, constantly(24), micro, rank, dp_size, workers) for rank in range(dp_size)]
    for consumed in reads:
        rows: dict[int, tuple] = {}
        for rank, reader in enumerate(readers):
            batches = reader.read(consumed)
            assert len(batches) == 24 // (micro * dp_size)
            for step, batch in enumerate(batches):
                assert batch.input_ids.shape == batch.labels.shape == (micro, 8)
                for row in range(micro):
                    sample = batch.samples[row]
                    assert sample.tokens[:-1].tolist() == batch.input_ids[row].tolist()
                    assert sample.tokens[1:].tolist() == batch.labels[row].tolist()
                    identity = (sample.epoch, sample.window, tuple(sample.tokens))
                    rows[(step * dp_size + rank) * micro + row] = identity
        yield [rows[place] for place in range(24)]
    for reader in readers:
        reader.close()


# in order, again, back, and astride an epoch (30 samples)
READS = [0, 24, 48, 48, 0, 1000]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batch_is_independent_of_its_layout(dataset: GPTDataset, dp_size: int, micro: int, workers: int) -> None:
    expected = []
    for consumed in READS:
        samples = [dataset.sample(consumed + offset) for offset in range(24)]
        expected.append([(sample.epoch, sample.window, tuple(sample.tokens)) for sample in samples])
    assert list(global_batches(dataset, dp_size, micro, workers, READS)) == expected


class Watched(GPTDataset):
    """Counts who read what, and fails at one index."""

    def __init__(self, source: GPTDataset, broken: int) -> None:
        super().__init__(source.indexed, source.start, source.stop, source.seq_length, seed=1)
        self.broken = broken
        self.read: list[tuple[int, bool]] = []

    def sample(self, index: int) -> Sample:
        self.read.append((index, threading.current_thread() is threading.main_thread()))
        if index == self.broken:
            raise CorruptDataError("a torn page")
        return super().sample(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_surfaces_where_its_batch_is_read(dataset: GPTDataset, workers: int) -> None:
    reader = BatchReader(Watched(dataset, broken=5), constantly(4), 2, 0, 1, workers)
    assert len(reader.read(0)) == 2
    with pytest.raises(CorruptDataError, match="a torn page"):
        reader.read(4)
    reader.close()


def test_threads_read_one_batch_ahead(dataset: GPTDataset) -> None:
    watched = Watched(dataset, broken=-1)
    reader = BatchReader(watched, constantly(4), 2, 0, 1, num_workers=1)
    reader.read(0)
    reader.read(4)
    reader.close()
    indices = [index for index, _ in watched.read]
    assert indices[:8] == list(range(8))
    assert set(indices) <= set(range(12))
    assert not any(on_main for _, on_main in watched.read)


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_is_cut_while_it_is_read_is_an_error_of_the_reader(
    dataset: GPTDataset, tmp_path: Path, workers: int
) -> None:
    path = tmp_path / "x.bin"
    reader = BatchReader(dataset, constantly(4), 2, 0, 1, workers)
    reader.read(0)
    os.truncate(path, 0)
    with pytest.raises(CorruptDataError, match=f"{path} ends at byte"):
        reader.read(40)  # rather than what was read ahead
    reader.close()


def test_no_threads_without_workers(dataset: GPTDataset) -> None:
    watched = Watched(dataset, broken=-1)
    BatchReader(watched, constantly(4), 2, 0, 1, num_workers=0).read(0)
    assert watched.read == [(index, True) for index in range(4)]


def test_close_ends_the_threads(dataset: GPTDataset) -> None:
    before = threading.active_count()
    reader = BatchReader(dataset, constantly(4), 2, 0, 1, num_workers=2)
    reader.read(0)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before


def test_sizes_that_do_not_divide_are_refused(dataset: GPTDataset) -> None:
    with pytest.raises(ValueError, match="2 ranks of 3 samples do not divide 8"):
        BatchReader(dataset, constantly(8), 3, 0, 2, 0).read(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_grows_is_read_ahead_at_its_new_size(dataset: GPTDataset, workers: int) -> None:
    watched = Watched(dataset, broken=-1)
    readers = [BatchReader(watched, lambda consumed: 4 if consumed < 8 else 12, 2, rank, 2, workers) for rank in (0, 1)]
    for start, size in ((0, 4), (4, 4), (8, 12), (20, 12), (4, 4)):
        found = [[batch.sample_indices.tolist() for batch in reader.read(start)] for reader in readers]
        for rank, batches in enumerate(found):
            assert batches == [[first, first + 1] for first in range(start + 2 * rank, start + size, 4)]
    for reader in readers:
        reader.close()
    if workers:
        assert max(index for index, _ in watched.read) <= 43, "one batch ahead, not more"
