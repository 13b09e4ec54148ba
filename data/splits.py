"""The training, validation and test data of a run, opened from its configuration."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.gpt_dataset import GPTDataset, split_documents
from data.indexed_dataset import IndexedDataset
from data.locations import data_prefix
from data.metadata import Metadata, read_metadata
from data.positioned_file import PositionedFile
from runtime.errors import CorruptDataError, DataPathError

FILES = {"bin": "tokens", "idx": "documents"}
"""What the files of a pair hold, by the suffixes under which the fingerprint has their digests."""
_FINGERPRINTED = 1 << 20
_BLOCK, _BLOCKS = 1 << 22, 256
"""Bytes of a block, and how many of them are hashed of a file that has more: a gibibyte."""


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

    @property
    def digests(self) -> dict[str, str]:
        """The part of the fingerprint that takes time: of each file, by its suffix."""
        return {suffix: str(self.fingerprint[suffix]) for suffix in FILES}


def open_splits(
    config: DataConfig,
    out_dir: str,
    seed: int,
    seq_length: int,
    vocab_size: int,
    digests: Mapping[str, str] | None = None,
) -> Splits:
    """Opens prepared data: `config.path`, else the embedded corpus as `prepare_sample` left it.

    Up to a gibibyte of each file is read for its digest, unless another rank has found the `digests`. A validation or
    test split without a document of its own, or shorter than one sample, is None; see `absent`. Raises DataPathError
    where the data is missing or too short to train on, CorruptDataError where it is damaged.
    """
    prefix = data_prefix(config, out_dir)
    indexed = IndexedDataset(prefix)
    metadata = read_metadata(prefix)
    if metadata is not None and metadata.tokens != indexed.total_tokens:
        raise CorruptDataError(
            f"{prefix}.meta.json speaks of {metadata.tokens} tokens, {prefix}.idx of {indexed.total_tokens}: they are "
            f"not from the same preparation; prepare the data again"
        )
    if digests is None:
        digests = {suffix: _file_digest(Path(f"{prefix}.{suffix}")) for suffix in FILES}
        if metadata is not None:
            _refuse_other_files(prefix, metadata, digests)
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
            advice = "; `kilotron prepare --document-separator` cuts a text into documents" if first == end else ""
            absent[name] = f"the {name} split of {prefix} has {share} and {error}{advice}"
    if "train" in absent:
        raise DataPathError(absent["train"])
    train = opened["train"]
    fingerprint: dict[str, str | int] = {
        "documents": indexed.num_documents,
        "tokens": indexed.total_tokens,
        "content": _content_digest(prefix),
        **digests,
        "train_split": f"{train.start}:{train.stop}",
        "seq_length": seq_length,
        "seed": seed,
    }
    return Splits(train, opened.get("validation"), opened.get("test"), absent, fingerprint)


def _file_digest(path: Path) -> str:
    """SHA-256 of a file, or of blocks that are spread evenly over it, both ends included, where it is large."""
    file, digest = PositionedFile(path), hashlib.sha256()
    for start in _block_starts(file.size):
        digest.update(file.read(start, min(_BLOCK, file.size - start), "u1").data)
    return digest.hexdigest()


def _block_starts(size: int) -> Sequence[int]:
    if size <= _BLOCK * _BLOCKS:
        return range(0, size, _BLOCK)
    return [(size - _BLOCK) * block // (_BLOCKS - 1) for block in range(_BLOCKS)]


def _refuse_other_files(prefix: str, metadata: Metadata, digests: Mapping[str, str]) -> None:
    """Raises CorruptDataError where a file that was hashed whole is not the one that was prepared."""
    for suffix, found in digests.items():
        path, expected = Path(f"{prefix}.{suffix}"), metadata.sha256[suffix]
        if path.stat().st_size <= _BLOCK * _BLOCKS and found != expected:
            raise CorruptDataError(
                f"{path} is not what was prepared: expected SHA-256 {expected}, as {prefix}.meta.json says, found "
                f"{found}; restore it, or prepare the data again"
            )


def _content_digest(prefix: str) -> str:
    """SHA-256 of both files where they are small, else of both ends of each: what older checkpoints know."""
    digest = hashlib.sha256()
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        with path.open("rb") as handle:
            digest.update(handle.read(_FINGERPRINTED))
            handle.seek(max(handle.tell(), path.stat().st_size - _FINGERPRINTED))
            digest.update(handle.read())
    return digest.hexdigest()
