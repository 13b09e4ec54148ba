"""The manifest: it survives a round trip, and whatever it should not say is refused with what is wrong."""

import contextlib
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.manifest import Chunk, FileEntry, Manifest, TensorEntry, encode_manifest, read_manifest
from runtime.errors import StorageError

MANIFEST = Manifest(
    step=3,
    state={"loss": 0.1, "names": ["a", None]},
    files={"rank_00000.safetensors": FileEntry(24, "ab"), "rank_00001.safetensors": FileEntry(16, "cd")},
    tensors={
        "weight": TensorEntry(
            "F32",
            (3, 2),
            (
                Chunk("rank_00000.safetensors", "weight", (0, 0), (2, 2)),
                Chunk("rank_00001.safetensors", "weight", (2, 0), (1, 2)),
            ),
        ),
        "step": TensorEntry("F64", (), (Chunk("rank_00000.safetensors", "step", (), ()),)),
    },
)


def _write(path, document):
    """A manifest that vouches for itself, whatever it says."""
    document.pop("sha256", None)
    document["sha256"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(document))


def test_round_trip(tmp_path):
    (tmp_path / "manifest.json").write_bytes(encode_manifest(MANIFEST))
    assert read_manifest(tmp_path) == MANIFEST


def test_the_independent_writer_of_these_tests_is_read(tmp_path):
    _write(tmp_path, json.loads(encode_manifest(MANIFEST)))
    assert read_manifest(tmp_path) == MANIFEST


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(document):
        for key in path:
            document = document[key]
        document[last] = value

    return change


def _rename_file(name):
    def change(document):
        document["files"][name] = document["files"].pop("rank_00001.safetensors")
        document["tensors"]["weight"]["chunks"][1]["file"] = name

    return change


def _delete(key):
    return lambda document: document.pop(key)


CHUNKS = ("tensors", "weight", "chunks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_file("../secret"), r"file name '\.\./secret' is not a plain one"),
        (_rename_file(".."), r"file name '\.\.' is not a plain one"),
        (_rename_file("/etc/passwd"), "file name '/etc/passwd' is not a plain one"),
        (_rename_file("a\\b"), "is not a plain one"),
        (_rename_file("a\n"), "is not a plain one"),
        (_rename_file(""), "is not a plain one"),
        (_set(*CHUNKS, 1, "file", "../secret"), r"weight lies in '\.\./secret', which is not among the files"),
        (_set(*CHUNKS, 1, "offsets", [3, 0]), "reaches beyond shape"),
        (_set(*CHUNKS, 1, "offsets", [-1, 0]), "not whole numbers"),
        (_set(*CHUNKS, 1, "offsets", [0, 0]), r"do not fill shape \[3, 2\] once"),
        (_set(*CHUNKS, 1, "offsets", [2]), "not a valid manifest"),
        (_set(*CHUNKS, 1, "lengths", [1, 1]), r"hold 5 elements and do not fill shape \[3, 2\]"),
        (_set(*CHUNKS, 1, "lengths", [1, 2.0]), "not whole numbers"),
        (_set("tensors", "weight", "chunks", []), "hold 0 elements"),
        (_set("tensors", "weight", "shape", [3, True]), "not whole numbers"),
        (_set("tensors", "weight", "dtype", "F7"), "dtype 'F7'; known are F64"),
        (_set("files", "rank_00000.safetensors", "bytes", -1), "not whole numbers"),
        (_set("files", []), "not a valid manifest"),
        (_set("step", "3"), "step: "),
        (_set("state", []), "state is no object"),
        (_set("state", {"loss": float("nan")}), "NaN is no JSON number"),
        (_set("format", 2), "format 2; this version reads format 1"),
        (_delete("tensors"), "'tensors' is missing"),
    ],
)
def test_a_manifest_that_vouches_for_nonsense_is_refused(tmp_path, change, message):
    document = json.loads(encode_manifest(MANIFEST))
    change(document)
    _write(tmp_path, document)
    with pytest.raises(StorageError, match=message) as caught:
        read_manifest(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value)


def _halves(data, box):
    """Boxes that make up one, cut at random, and cut again."""
    lows, lengths = box
    cuts = [(axis, cut) for axis, length in enumerate(lengths) for cut in range(1, length)]
    if not cuts or data.draw(st.booleans()):
        return [box]
    axis, cut = data.draw(st.sampled_from(cuts))
    low = (lows, [cut if i == axis else length for i, length in enumerate(lengths)])
    high = (
        [start + cut if i == axis else start for i, start in enumerate(lows)],
        [length - cut if i == axis else length for i, length in enumerate(lengths)],
    )
    return [*_halves(data, low), *_halves(data, high)]


@given(st.data(), st.lists(st.integers(0, 4), max_size=3))
def test_chunks_are_taken_exactly_where_they_hold_each_element_once(tmp_path_factory, data, shape):
    boxes = _halves(data, ([0] * len(shape), shape))
    if data.draw(st.booleans()):
        chosen = data.draw(st.integers(0, len(boxes) - 1))
        lows = [data.draw(st.integers(0, size)) for size in shape]
        lengths = [data.draw(st.integers(0, size - low)) for low, size in zip(lows, shape, strict=True)]
        boxes[chosen] = (lows, lengths)
    times = np.zeros(shape, dtype=int)
    for lows, lengths in boxes:
        times[tuple(slice(low, low + length) for low, length in zip(lows, lengths, strict=True))] += 1
    chunks = tuple(Chunk("file", str(n), tuple(lows), tuple(lengths)) for n, (lows, lengths) in enumerate(boxes))
    path = tmp_path_factory.mktemp("boxes")
    manifest = Manifest(0, {}, {"file": FileEntry(10**6, "")}, {"x": TensorEntry("U8", tuple(shape), chunks)})
    (path / "manifest.json").write_bytes(encode_manifest(manifest))
    if (times == 1).all():
        assert read_manifest(path) == manifest
    else:
        with pytest.raises(StorageError, match="do not fill"):
            read_manifest(path)


def test_tens_of_thousands_of_chunks_are_no_matter(tmp_path):
    rows, columns = 400, 100
    boxes = [(row, column) for row in range(rows) for column in range(columns)]
    chunks = tuple(Chunk("file", f"{row} {column}", (2 * row, 3 * column), (2, 3)) for row, column in boxes)
    for last, accepted in ((chunks[-1], True), (chunks[0], False)):
        entry = TensorEntry("BF16", (2 * rows, 3 * columns), (*chunks[:-1], replace(last, key="last")))
        manifest = Manifest(0, {}, {"file": FileEntry(12 * rows * columns, "")}, {"x": entry})
        (tmp_path / "manifest.json").write_bytes(encode_manifest(manifest))
        with contextlib.nullcontext() if accepted else pytest.raises(StorageError, match="do not fill"):
            assert read_manifest(tmp_path) == manifest


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(StorageError, match="not a valid manifest"):
        read_manifest(tmp_path)


@given(st.data())
def test_no_changed_byte_is_believed(tmp_path_factory, data):
    content = bytearray(encode_manifest(MANIFEST))
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("flipped")
    (path / "manifest.json").write_bytes(content)
    with contextlib.suppress(StorageError):
        assert read_manifest(path) == MANIFEST  # such as one white space for another
