"""Samples of a token stream, found by arithmetic: nothing is built, cached or raced for."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from data.indexed_dataset import IndexedDataset
from data.permutation import KeyedPermutation, derive_key
from runtime.errors import CorruptDataError, DataPathError


@dataclass(frozen=True, eq=False)
class Sample:
    """One training sample and where it is from."""

    dataset: int
    epoch: int
    window: int
    tokens: npt.NDArray[np.int64]
    """[seq_length + 1]: the inputs, and one more so that each input has a label."""


@dataclass(eq=False)
class GPTDataset:
    """Endless samples over tokens [start, stop) of a stream: each epoch visits every window once, in its own order.

    Window w is the slice of seq_length + 1 tokens at start + w * seq_length; neighbours share one token. Raises
    DataPathError where no window fits.
    """

    indexed: IndexedDataset
    start: int
    stop: int
    seq_length: int
    seed: int
    dataset: int = 0
    vocab_size: int | None = None
    """What samples are checked against."""

    def __post_init__(self) -> None:
        length = self.stop - self.start
        self.samples_per_epoch = (length - 1) // self.seq_length
        if self.samples_per_epoch < 1:
            raise DataPathError(
                f"{length} tokens, where data.seq_length={self.seq_length} needs at least {self.seq_length + 1}; "
                f"lower data.seq_length, raise this split's share in data.split, or prepare more text"
            )

    def sample(self, index: int) -> Sample:
        """Sample `index` >= 0 of the run. Raises CorruptDataError where a token is outside the vocabulary."""
        epoch, place = divmod(index, self.samples_per_epoch)
        window = KeyedPermutation(self.samples_per_epoch, derive_key(self.seed, epoch, self.dataset))(place)
        begin = self.start + window * self.seq_length
        tokens = self.indexed.tokens(begin, begin + self.seq_length + 1).astype(np.int64)
        if self.vocab_size is not None and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise CorruptDataError(
                f"token ids from {tokens.min()} to {tokens.max()} at tokens {begin} to {begin + self.seq_length} of "
                f"the stream, where the vocabulary ends at {self.vocab_size - 1}: prepared with another tokenizer?"
            )
        return Sample(self.dataset, epoch, window, tokens)


def split_documents(num_documents: int, shares: Sequence[float]) -> list[tuple[int, int]]:
    """Ranges [first, end) of documents for each share, in order, covering all documents.

    A share above 0 gets at least one document where there are enough; where not, the largest shares get one each.
    `shares` are non-negative with a positive sum.
    """
    # exact fractions: the last bound is num_documents, however the shares round
    bounds = list(accumulate((Fraction(share) for share in shares), initial=Fraction(0)))
    counts = [end - first for first, end in pairwise(round(num_documents * bound / bounds[-1]) for bound in bounds)]
    by_size = sorted((index for index, share in enumerate(shares) if share > 0), key=lambda index: -shares[index])
    entitled = by_size[:num_documents]
    for index in entitled:
        if not counts[index]:
            giver = max(range(len(counts)), key=lambda other: (counts[other], other not in entitled))
            counts[giver] -= 1
            counts[index] += 1
    return list(pairwise(accumulate(counts, initial=0)))


def unigram_entropy(dataset: GPTDataset, vocab_size: int, max_tokens: int = 50_000_000) -> float:
    """Entropy in nats of the label tokens of one epoch: the loss of the best model that ignores all context.

    Only the first `max_tokens` labels are counted. Raises CorruptDataError where a token is outside the vocabulary.
    """
    # windows lie end to end, so that the labels of all of them are one slice
    begin = dataset.start + 1
    end = begin + min(dataset.samples_per_epoch * dataset.seq_length, max_tokens)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for position in range(begin, end, 1 << 20):
        tokens = dataset.indexed.tokens(position, min(position + (1 << 20), end))
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise CorruptDataError(f"token ids from {tokens.min()} to {tokens.max()} in a vocabulary of {vocab_size}")
        counts += np.bincount(tokens, minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
