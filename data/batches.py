"""The micro-batches that one rank takes of each global batch, read ahead in threads."""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.gpt_dataset import GPTDataset, Sample


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward pass takes."""

    input_ids: npt.NDArray[np.int64]
    """[micro_batch, seq]"""
    labels: npt.NDArray[np.int64]
    """[micro_batch, seq]: the token that follows each input; -100 counts in no loss."""
    samples: list[Sample]
    sample_indices: npt.NDArray[np.int64]
    """[micro_batch]: which sample of the run each is, counted from the first."""


@dataclass(eq=False)
class BatchReader:
    """Reads global batches of consecutive samples; what it returns depends on positions only, not on threads."""

    dataset: GPTDataset
    batch_size: Callable[[int], int]
    """Samples of the global batch that starts at a number of consumed samples."""
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    num_workers: int

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.num_workers, "batches") if self.num_workers else None
        self._ahead: tuple[int, list[Future[MicroBatch]]] | None = None
        self._closed = False

    def read(self, consumed_samples: int) -> list[MicroBatch]:
        """This rank's micro-batches of the global batch that starts at `consumed_samples`.

        Micro-batch a of rank r holds the samples at consumed + (a * dp_size + r) * micro_batch_size onwards. Raises
        what a thread raised, and ValueError where micro_batch_size * dp_size does not divide the batch; after an error
        nothing is read any more.
        """
        if self._pool is None:
            return [self._micro_batch(first) for first in self._starts(consumed_samples)]
        try:
            return self._read_ahead(self._pool, consumed_samples)
        except BaseException:
            # Not waited for: a signal may have ended the process because this batch would take for ever.
            self._closed = True
            self._pool.shutdown(wait=False, cancel_futures=True)
            raise

    def _read_ahead(self, pool: ThreadPoolExecutor, consumed_samples: int) -> list[MicroBatch]:
        position, futures = self._ahead or (None, [])
        if position != consumed_samples:
            for future in futures:
                future.cancel()
            futures = self._submit(pool, consumed_samples)
        following = consumed_samples + self.batch_size(consumed_samples)
        self._ahead = following, self._submit(pool, following)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the threads; nothing is read afterwards."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, position: int) -> list[Future[MicroBatch]]:
        return [pool.submit(self._micro_batch, first) for first in self._starts(position)]

    def _starts(self, position: int) -> range:
        """Where this rank's micro-batches begin of the global batch that begins at `position`."""
        size, micro = self.batch_size(position), self.micro_batch_size
        if size % (micro * self.dp_size):
            raise ValueError(f"{self.dp_size} ranks of {micro} samples do not divide {size}")
        return range(position + self.dp_rank * micro, position + size, self.dp_size * micro)

    def _micro_batch(self, first: int) -> MicroBatch:
        samples = [self._sample(index) for index in range(first, first + self.micro_batch_size)]
        tokens = np.stack([sample.tokens for sample in samples])
        indices = np.arange(first, first + self.micro_batch_size)
        return MicroBatch(np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:]), samples, indices)

    def _sample(self, index: int) -> Sample:
        if self._closed:  # the interpreter waits for its threads, so each ends in the middle of what nobody wants
            raise CancelledError
        return self.dataset.sample(index)
