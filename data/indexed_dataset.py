"""Megatron's `.bin`/`.idx` pair, byte for byte: a writer, and a memory-mapped reader that checks before it trusts."""

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from data.errors import CorruptDataError
from data.files import publish, require_pair, temporary_name

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
_FLOAT_CODES = (6, 7)
_CHECKED_AT_ONCE = 1 << 20


class IndexedDatasetWriter:
    """Streams documents into `<prefix>.bin`; both files appear at the end of the `with` block, or neither does."""

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        """Tokens are uint16 where `vocab_size` < 65,500 (Megatron's own limit), else int32."""
        self._bin, self._idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._temporary_bin, self._temporary_idx = temporary_name(self._bin), temporary_name(self._idx)
        self._vocab_size = vocab_size
        self._code = 8 if vocab_size < 65_500 else 4
        self._lengths = array("i")
        self._documents = array("q", [0])

    def __enter__(self) -> Self:
        """Opens the temporary `.bin`."""
        self._handle = self._temporary_bin.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publishes both files, unless the block raised."""
        self._handle.close()
        try:
            if kind is None:
                self._temporary_idx.write_bytes(self._index())
                # an old .idx must not vouch for the new .bin
                self._idx.unlink(missing_ok=True)
                publish(self._temporary_bin, self._bin)
                publish(self._temporary_idx, self._idx)
        finally:
            self._temporary_bin.unlink(missing_ok=True)
            self._temporary_idx.unlink(missing_ok=True)

    def add_document(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Appends a document of token ids [length]; an empty one takes an entry in the document index only.

        Raises ValueError where a token is outside the vocabulary.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.size:
            if ids.min() < 0 or ids.max() >= self._vocab_size:
                raise ValueError(f"token ids from {ids.min()} to {ids.max()} in a vocabulary of {self._vocab_size}")
            self._lengths.append(ids.size)
            self._handle.write(ids.astype(_DTYPES[self._code]).tobytes())
        self._documents.append(len(self._lengths))

    def _index(self) -> bytes:
        lengths = np.asarray(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= _DTYPES[self._code].itemsize
        documents = np.asarray(self._documents, dtype="<i8")
        header = _HEADER.pack(_MAGIC, _VERSION, self._code, len(lengths), len(documents))
        return header + lengths.tobytes() + pointers.tobytes() + documents.tobytes()


class IndexedDataset:
    """A `.bin`/`.idx` pair as one stream of tokens, mapped, not read.

    Opening raises DataPathError where the pair is missing, and CorruptDataError, which names the field, what was
    expected and what was found, where a file is truncated, torn or foreign.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Opens and checks `<prefix>.bin` and `<prefix>.idx`. Reads the whole index, nothing of the tokens."""
        self._bin_path, self._idx_path = require_pair(str(prefix))
        index = _map(self._idx_path, np.dtype("u1"))
        self._dtype, sequences, entries = self._read_header(index)
        self._lengths = np.frombuffer(index, "<i4", sequences, _HEADER.size)
        self._pointers = np.frombuffer(index, "<i8", sequences, _HEADER.size + 4 * sequences)
        self._documents = np.frombuffer(index, "<i8", entries, _HEADER.size + 12 * sequences)
        self._check_documents()
        self._check_sequences()
        self._tokens = _map(self._bin_path, self._dtype)
        self.total_tokens = len(self._tokens)
        self.num_documents = entries - 1
        """Empty ones included."""

    @property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Token offset at which each document starts, then the total: [documents + 1]. Built anew at each access."""
        starts = np.full(len(self._documents), self.total_tokens, dtype=np.int64)
        inner = self._documents < len(self._pointers)
        starts[inner] = self._pointers[self._documents[inner]] // self._dtype.itemsize
        return starts

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Tokens [stop - start] of the stream, a view in the file's own dtype."""
        return self._tokens[start:stop]

    def _require(self, holds: bool | np.bool_, field: str, expected: object, found: object) -> None:
        if not holds:
            raise CorruptDataError(f"{self._idx_path}: {field}: expected {expected}, found {found}")

    def _read_header(self, index: npt.NDArray[np.uint8]) -> tuple[np.dtype, int, int]:
        size, found = _HEADER.size, f"{len(index)} (truncated)"
        self._require(len(index) >= size, "file size", f"at least the header's {size} bytes", found)
        magic, version, code, sequences, entries = _HEADER.unpack(index[:size].tobytes())
        foreign = f"{magic}; not a Megatron index, `kilotron prepare` writes one"
        self._require(magic == _MAGIC, "magic", _MAGIC, foreign)
        self._require(version == _VERSION, "version", _VERSION, version)
        floating = f"{code}, floating-point values, which are no tokens"
        self._require(code not in _FLOAT_CODES, "dtype code", "an integer type", floating)
        self._require(code in _DTYPES, "dtype code", f"one of {', '.join(map(str, _DTYPES))}", code)
        self._require(entries >= 1, "length of the document index", "documents + 1", entries)
        needed = size + 12 * sequences + 8 * entries
        wanted = f"{needed} bytes for {sequences} sequences and {entries} document entries"
        self._require(len(index) >= needed, "file size", wanted, found)
        return _DTYPES[code], sequences, entries

    def _check_documents(self) -> None:
        entries, sequences = self._documents, len(self._lengths)
        self._require(entries[0] == 0, "first entry of the document index", 0, entries[0])
        all_of_them = f"the {sequences} sequences"
        self._require(entries[-1] == sequences, "last entry of the document index", all_of_them, entries[-1])
        falling = np.append(False, entries[1:] < entries[:-1])
        where = int(falling.argmax())
        least = f"at least {entries[where - 1]}"
        self._require(not falling[where], f"document index, entry {where}", least, entries[where])

    def _check_sequences(self) -> None:
        position = 0
        for begin in range(0, len(self._lengths), _CHECKED_AT_ONCE):
            lengths = self._lengths[begin : begin + _CHECKED_AT_ONCE]
            pointers = self._pointers[begin : begin + _CHECKED_AT_ONCE]
            where = int((lengths < 0).argmax())
            field = f"length of sequence {begin + where}"
            self._require(lengths[where] >= 0, field, "at least 0 tokens", lengths[where])
            ends = position + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            expected = np.concatenate(([position], ends[:-1]))
            # Megatron's writers leave no gaps, and a sample is a slice of one unbroken stream
            where = int((pointers != expected).argmax())
            field, wanted = f"offset of sequence {begin + where}", f"{expected[where]}, where the one before ends"
            self._require(pointers[where] == expected[where], field, wanted, pointers[where])
            position = int(ends[-1])
        found = self._bin_path.stat().st_size
        if found != position:
            state = "truncated" if found < position else "longer than its index; one of them is from elsewhere"
            raise CorruptDataError(
                f"{self._bin_path}: file size: expected {position} bytes, as {self._idx_path.name} says, "
                f"found {found} ({state})"
            )


def _map(path: Path, dtype: np.dtype) -> npt.NDArray:
    # an empty file cannot be mapped
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)
