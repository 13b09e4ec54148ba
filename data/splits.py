"""The training, validation and test data of a run, opened from its configuration."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.errors import CorruptDataError, DataPathError
from data.gpt_dataset import GPTDataset, split_documents
from data.indexed_dataset import IndexedDataset
from data.locations import data_prefix
from data.metadata import read_metadata

_FINGERPRINTED = 1 << 20


@dataclass(frozen=True)
class Splits:
    """The data of a run, cut by document in prepared order."""

    train: GPTDataset
    validation: GPTDataset | None
    test: GPTDataset | None
    absent: dict[str, str]
    """Why `validation` or `test` is None, by name, for an error message."""
    fingerprint: dict[str, str | int]
    """All that decides which tokens a sample holds; equal fingerprints mean equal data, wherever the files lie."""


def open_splits(config: DataConfig, out_dir: str, seed: int, seq_length: int, vocab_size: int) -> Splits:
    """Opens prepared data: `config.path`, else the embedded corpus as `prepare_sample` left it.

    A validation or test split without a document of its own, or shorter than one sample, is None; see `absent`. Raises
    DataPathError where the data is missing or too short to train on, CorruptDataError where it is damaged.
    """
    prefix = data_prefix(config, out_dir)
    indexed = IndexedDataset(prefix)
    metadata = read_metadata(prefix)
    if metadata is not None and metadata.tokens != indexed.total_tokens:
        raise CorruptDataError(
            f"{prefix}.meta.json speaks of {metadata.tokens} tokens, {prefix}.idx of {indexed.total_tokens}: they are "
            f"not from the same preparation; prepare the data again"
        )
    starts = indexed.document_starts
    opened: dict[str, GPTDataset] = {}
    absent: dict[str, str] = {}
    ranges = split_documents(indexed.num_documents, config.split)
    for name, (first, end) in zip(("train", "validation", "test"), ranges, strict=True):
        start, stop = int(starts[first]), int(starts[end])
        try:
            opened[name] = GPTDataset(indexed, start, stop, seq_length, seed, vocab_size=vocab_size)
        except DataPathError as error:
            share = f"{end - first} of {indexed.num_documents} documents"
            absent[name] = f"the {name} split of {prefix} has {share} and {error}"
    if "train" in absent:
        raise DataPathError(absent["train"])
    train = opened["train"]
    fingerprint: dict[str, str | int] = {
        "documents": indexed.num_documents,
        "tokens": indexed.total_tokens,
        "content": _content_digest(prefix),
        "train_split": f"{train.start}:{train.stop}",
        "seq_length": seq_length,
        "seed": seed,
    }
    return Splits(train, opened.get("validation"), opened.get("test"), absent, fingerprint)


def _content_digest(prefix: str) -> str:
    """SHA-256 of both files where they are small, else of both ends of each: the same with or without `.meta.json`."""
    digest = hashlib.sha256()
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        with path.open("rb") as handle:
            digest.update(handle.read(_FINGERPRINTED))
            handle.seek(max(handle.tell(), path.stat().st_size - _FINGERPRINTED))
            digest.update(handle.read())
    return digest.hexdigest()
