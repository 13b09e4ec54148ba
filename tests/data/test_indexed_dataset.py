"""The `.bin`/`.idx` format: read by a reader that shares no code, and refused in every broken form."""

import os
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from runtime.errors import CorruptDataError, DataPathError
from tests.data.independent_reader import read_independently

MAGIC = b"MMIDIDX\x00\x00"


def index_bytes(
    lengths: list[int],
    documents: list[int],
    pointers: list[int] | None = None,
    code: int = 8,
    magic: bytes = MAGIC,
    version: int = 1,
    itemsize: int = 2,
) -> bytes:
    if pointers is None:
        pointers = [itemsize * sum(lengths[:place]) for place in range(len(lengths))]
    arrays = struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)
    return magic + struct.pack("<QBQQ", version, code, len(lengths), len(documents)) + arrays


def store(prefix: Path, index: bytes, stream: bytes) -> Path:
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(stream)
    return prefix


def documents_of(dataset: IndexedDataset) -> list[list[int]]:
    starts = dataset.document_starts
    assert starts.dtype == np.int64
    return [dataset.tokens(int(a), int(b)).tolist() for a, b in pairwise(starts)]


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65_498), max_size=9), max_size=9),
    vocab_size=st.sampled_from([65_499, 65_500, 200_000]),
)
def test_what_is_written_is_read_by_both_readers(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "corpus.v1"
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    dataset = IndexedDataset(prefix)
    assert read_independently(prefix) == documents_of(dataset) == documents
    assert dataset.num_documents == len(documents)
    assert dataset.total_tokens == sum(map(len, documents))
    assert prefix.with_name("corpus.v1.idx").read_bytes()[17] == (8 if vocab_size < 65_500 else 4)


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_every_integer_type_is_read(tmp_path: Path, code: int) -> None:
    kind = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    stream = struct.pack(f"<4{kind}", 1, 2, 3, 100)
    index = index_bytes([1, 3], [0, 1, 2], code=code, itemsize=struct.calcsize(f"<{kind}"))
    assert documents_of(IndexedDataset(store(tmp_path / "x", index, stream))) == [[1], [2, 3, 100]]


def test_an_index_that_is_checked_in_pieces_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_bytes([2, 1, 3, 0, 1], [0, 0, 2, 2, 4, 5, 5])
    prefix = store(tmp_path / "x", index, np.arange(7, dtype="<u2").tobytes())
    whole = IndexedDataset(prefix).document_starts
    for at_once in (1, 2, 3):
        monkeypatch.setattr("data.indexed_dataset._CHECKED_AT_ONCE", at_once)
        assert IndexedDataset(prefix).document_starts.tolist() == whole.tolist() == [0, 0, 3, 3, 6, 7, 7]


def test_older_corpora_of_several_sequences_a_document_and_empty_documents(tmp_path: Path) -> None:
    index = index_bytes([2, 1, 3, 0, 1], [0, 0, 2, 2, 5, 5])
    dataset = IndexedDataset(store(tmp_path / "x", index, np.arange(7, dtype="<u2").tobytes()))
    assert documents_of(dataset) == [[], [0, 1, 2], [], [3, 4, 5, 6], []]


def test_multimodal_bytes_behind_the_index_are_ignored(tmp_path: Path) -> None:
    dataset = IndexedDataset(store(tmp_path / "x", index_bytes([2], [0, 1]) + b"\x01", bytes(4)))
    assert documents_of(dataset) == [[0, 0]]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"", r"file size: expected at least the header's 34 bytes, found 0 \(truncated\)"),
        (index_bytes([3], [0, 1])[:33], "header's 34 bytes, found 33"),
        (index_bytes([3], [0, 1])[:-1], r"file size: expected 62 bytes for 1 sequences .*found 61 \(truncated\)"),
        (index_bytes([3], [0, 1], magic=b"TNTIDX\x00\x00\x00"), "magic: expected .*MMIDIDX.*, found .*TNTIDX.*prepare"),
        (index_bytes([3], [0, 1], version=2), "version: expected 1, found 2"),
        (index_bytes([3], [0, 1], code=7), "dtype code: expected an integer type, found 7, floating-point"),
        (index_bytes([3], [0, 1], code=9), "dtype code: expected one of 1, 2, 3, 4, 5, 8, found 9"),
        (index_bytes([3], []), r"document index: expected documents \+ 1, found 0"),
        (index_bytes([3], [1, 1]), "first entry of the document index: expected 0, found 1"),
        (index_bytes([3], [0, 2]), "last entry of the document index: expected the 1 sequences, found 2"),
        (index_bytes([1, 2], [0, 2, 1, 2]), "document index, entry 2: expected at least 2, found 1"),
        (index_bytes([4, -1], [0, 1, 2]), "length of sequence 1: expected at least 0 tokens, found -1"),
        (index_bytes([1, 2], [0, 1, 2], [0, 4]), "offset of sequence 1: expected 2, .*found 4"),
        (index_bytes([1, 2], [0, 1, 2], [2, 0]), "offset of sequence 0: expected 0, .*found 2"),
        (index_bytes([4], [0, 1]), r"x.bin: file size: expected 8 bytes, as x.idx says, found 6 \(truncated\)"),
        (index_bytes([2], [0, 1]), r"x.bin: file size: expected 4 bytes, .*found 6 \(longer than its index"),
        (MAGIC + struct.pack("<QBQQ", 1, 8, 2**60, 2**60), "file size: expected .* bytes for .* sequences"),
    ],
)
def test_damage_is_refused_at_opening(tmp_path: Path, index: bytes, message: str) -> None:
    with pytest.raises(CorruptDataError, match=message) as caught:
        IndexedDataset(store(tmp_path / "x", index, bytes(6)))
    assert str(tmp_path / "x") in str(caught.value)
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_files_that_are_cut_while_they_are_in_use_are_named(tmp_path: Path, suffix: str) -> None:
    """A mapped file would end the process."""
    index = index_bytes([50_000] * 2, [0, 1, 2])
    dataset = IndexedDataset(store(tmp_path / "x", index, bytes(200_000)))
    os.truncate(tmp_path / f"x.{suffix}", 10)
    with pytest.raises(
        CorruptDataError, match=rf"{tmp_path}/x\.{suffix} ends at byte \d+, but had \d+ bytes"
    ) as caught:
        dataset.tokens(90_000, 90_010) if suffix == "bin" else dataset.document_starts
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_what_is_no_file_is_refused(tmp_path: Path, suffix: str) -> None:
    store(tmp_path / "x", index_bytes([3], [0, 1]), bytes(6))
    for make, kind in ((os.mkfifo, "FIFO"), (os.mkdir, "directory")):
        (tmp_path / f"x.{suffix}").rename(tmp_path / f"{kind}.old")
        make(tmp_path / f"x.{suffix}")
        with pytest.raises(DataPathError, match=rf"x\.{suffix} is a {kind}, no regular file"):
            IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("lost", ["bin", "idx"])
def test_half_a_pair_is_refused(tmp_path: Path, lost: str) -> None:
    prefix = store(tmp_path / "x", index_bytes([3], [0, 1]), bytes(6))
    Path(f"{prefix}.{lost}").unlink()
    with pytest.raises(CorruptDataError, match=f"has no x.{lost} beside it"):
        IndexedDataset(prefix)


def test_missing_pair_names_the_nearest(tmp_path: Path) -> None:
    store(tmp_path / "corpus", index_bytes([3], [0, 1]), bytes(6))
    with pytest.raises(DataPathError, match=f"nearest: {tmp_path}/corpus$"):
        IndexedDataset(tmp_path / "corpse")
    with pytest.raises(DataPathError, match=f"a prefix has no suffix: try {tmp_path}/corpus$"):
        IndexedDataset(tmp_path / "corpus.bin")
    with pytest.raises(DataPathError, match="nowhere does not exist either"):
        IndexedDataset(tmp_path / "nowhere" / "corpus")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataPathError, match=f"holds no prepared data; `kilotron prepare INPUT --output {tmp_path}/empty/x`"
    ):
        IndexedDataset(tmp_path / "empty" / "x")


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def write_half() -> None:
        with IndexedDatasetWriter(tmp_path / "x", 300) as writer:
            writer.add_document([1, 2])
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokens", [[300], [-1], [1, 70_000]])
def test_tokens_outside_the_vocabulary_are_not_written(tmp_path: Path, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="in a vocabulary of 300"), IndexedDatasetWriter(tmp_path / "x", 300) as writer:
        writer.add_document(tokens)


def test_an_old_index_never_vouches_for_a_new_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = store(tmp_path / "x", index_bytes([3], [0, 1]), bytes(6))

    def fail(temporary: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise OSError("disk full")
        temporary.replace(target)

    monkeypatch.setattr("data.indexed_dataset.publish", fail)
    with pytest.raises(OSError, match="disk full"), IndexedDatasetWriter(prefix, 300) as writer:
        writer.add_document([7, 8, 9])
    assert [file.name for file in tmp_path.iterdir()] == ["x.bin"]
