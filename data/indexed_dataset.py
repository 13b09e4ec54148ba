"""Megatron's `.bin`/`.idx` pair, byte for byte: a writer, and a reader that checks before it trusts."""

import struct
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from data.locations import require_pair
from data.positioned_file import PositionedFile
from runtime.errors import CorruptDataError
from runtime.files import publish, temporary_name

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
    """A `.bin`/`.idx` pair as one stream of tokens, read where it is asked for.

    Opening raises DataPathError where the pair is missing, and CorruptDataError, which names the field, what was
    expected and what was found, where a file is truncated, torn or foreign. What is read afterwards raises what
    `PositionedFile.read` does.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Opens and checks `<prefix>.bin` and `<prefix>.idx`. Reads the whole index, nothing of the tokens."""
        self._bin, self._idx = map(PositionedFile, require_pair(str(prefix)))
        self._dtype, self._sequences, entries = self._read_header()
        self.num_documents = entries - 1
        """Empty ones included."""
        self.total_tokens = int(self.document_starts[-1])
        found, expected = self._bin.size, self.total_tokens * self._dtype.itemsize
        if found != expected:
            state = "truncated" if found < expected else "longer than its index; one of them is from elsewhere"
            raise CorruptDataError(
                f"{self._bin.path}: file size: expected {expected} bytes, as {self._idx.path.name} says, "
                f"found {found} ({state})"
            )

    @property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """Token offset at which each document starts, then the total: [documents + 1].

        Read and checked at each access, so that an index of many documents does not stay in memory.
        """
        documents = self._read_documents()
        starts = np.empty(len(documents), dtype=np.int64)
        position = 0
        for begin in range(0, self._sequences, _CHECKED_AT_ONCE):
            count = min(_CHECKED_AT_ONCE, self._sequences - begin)
            lengths = self._idx.read(_HEADER.size + 4 * begin, count, "<i4")
            pointers = self._idx.read(_HEADER.size + 4 * self._sequences + 8 * begin, count, "<i8")
            ends = self._check_sequences(begin, position, lengths, pointers)
            first, last = np.searchsorted(documents, (begin, begin + count))
            starts[first:last] = pointers[documents[first:last] - begin]
            position = int(ends[-1])
        starts[np.searchsorted(documents, self._sequences) :] = position
        return starts // self._dtype.itemsize

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Tokens [stop - start] of the stream, in the file's own dtype."""
        return self._bin.read(start * self._dtype.itemsize, min(stop, self.total_tokens) - start, self._dtype)

    def _require(self, holds: bool | np.bool_, field: str, expected: object, found: object) -> None:
        if not holds:
            raise CorruptDataError(f"{self._idx.path}: {field}: expected {expected}, found {found}")

    def _read_header(self) -> tuple[np.dtype, int, int]:
        size, found = _HEADER.size, f"{self._idx.size} (truncated)"
        self._require(self._idx.size >= size, "file size", f"at least the header's {size} bytes", found)
        magic, version, code, sequences, entries = _HEADER.unpack(self._idx.read(0, size, np.uint8).tobytes())
        foreign = f"{magic}; not a Megatron index, `kilotron prepare` writes one"
        self._require(magic == _MAGIC, "magic", _MAGIC, foreign)
        self._require(version == _VERSION, "version", _VERSION, version)
        floating = f"{code}, floating-point values, which are no tokens"
        self._require(code not in _FLOAT_CODES, "dtype code", "an integer type", floating)
        self._require(code in _DTYPES, "dtype code", f"one of {', '.join(map(str, _DTYPES))}", code)
        self._require(entries >= 1, "length of the document index", "documents + 1", entries)
        needed = size + 12 * sequences + 8 * entries
        wanted = f"{needed} bytes for {sequences} sequences and {entries} document entries"
        self._require(self._idx.size >= needed, "file size", wanted, found)
        return _DTYPES[code], sequences, entries

    def _read_documents(self) -> npt.NDArray[np.int64]:
        """The sequence with which each document starts, then their number: [documents + 1]."""
        sequences = self._sequences
        entries = self._idx.read(_HEADER.size + 12 * sequences, self.num_documents + 1, "<i8")
        self._require(entries[0] == 0, "first entry of the document index", 0, entries[0])
        all_of_them = f"the {sequences} sequences"
        self._require(entries[-1] == sequences, "last entry of the document index", all_of_them, entries[-1])
        falling = np.append(False, entries[1:] < entries[:-1])
        where = int(falling.argmax())
        least = f"at least {entries[where - 1]}"
        self._require(not falling[where], f"document index, entry {where}", least, entries[where])
        return entries

    def _check_sequences(
        self, begin: int, position: int, lengths: npt.NDArray[np.int32], pointers: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where each of the sequences from `begin` on ends, in bytes, if the first starts at `position`."""
        where = int((lengths < 0).argmax())
        field = f"length of sequence {begin + where}"
        self._require(lengths[where] >= 0, field, "at least 0 tokens", lengths[where])
        ends = position + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        expected = np.concatenate(([position], ends[:-1]))
        # Megatron's writers leave no gaps, and a sample is a slice of one unbroken stream
        where = int((pointers != expected).argmax())
        field, wanted = f"offset of sequence {begin + where}", f"{expected[where]}, where the one before ends"
        self._require(pointers[where] == expected[where], field, wanted, pointers[where])
        return ends
