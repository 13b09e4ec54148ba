"""Splits cut by document, explain what is absent, and carry a fingerprint of the data."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from data import splits as splits_module
from data.config import DataConfig
from data.indexed_dataset import IndexedDataset
from data.preparation import prepare_documents
from data.splits import FILES, Splits, open_splits
from runtime.errors import CorruptDataError, DataPathError


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    prepare_documents([chr(ord("a") + number) * 40 for number in range(20)], tmp_path / "x", "bytes", seed=0)
    return str(tmp_path / "x")


def opened(prefix: str, seed: int = 1, seq_length: int = 10, **settings: object) -> Splits:
    return open_splits(DataConfig(path=prefix, **settings), "out", seed, seq_length, 257)


def test_splits_share_no_document(prefix: str) -> None:
    splits = opened(prefix, split=[50, 30, 20])
    assert splits.validation is not None
    assert splits.test is not None
    seen = []
    for dataset in (splits.train, splits.validation, splits.test):
        letters = set()
        for index in range(dataset.samples_per_epoch):
            letters |= set(dataset.sample(index).tokens.tolist()) - {256}
        seen.append(letters)
    assert not seen[0] & seen[1] | seen[1] & seen[2] | seen[0] & seen[2]
    assert [len(letters) for letters in seen] == [10, 6, 4]
    assert splits.absent == {}


def test_absent_splits_say_why(prefix: str) -> None:
    splits = opened(prefix, split=[100, 0, 0])
    assert splits.validation is splits.test is None
    assert "validation split of" in splits.absent["validation"]
    assert "0 of 20 documents and 0 tokens" in splits.absent["validation"]
    assert "1 of 20 documents and 41 tokens" in opened(prefix, seq_length=100).absent["test"]


def test_too_little_to_train_on(prefix: str) -> None:
    with pytest.raises(DataPathError, match=r"the train split of .*18 of 20 documents and 738 tokens, where .*=1000"):
        opened(prefix, seq_length=1000)


def test_fingerprint_tells_data_apart_but_not_places(prefix: str, tmp_path: Path) -> None:
    first = opened(prefix).fingerprint
    (tmp_path / "moved").mkdir()
    for suffix in ("bin", "idx"):
        (tmp_path / "moved" / f"y.{suffix}").write_bytes(Path(f"{prefix}.{suffix}").read_bytes())
    assert opened(str(tmp_path / "moved" / "y")).fingerprint == first
    assert json.loads(json.dumps(first)) == first
    stream = bytearray(Path(f"{prefix}.bin").read_bytes())
    stream[0] ^= 1
    (tmp_path / "moved" / "y.bin").write_bytes(stream)
    others = [
        opened(str(tmp_path / "moved" / "y")).fingerprint,
        opened(prefix, seed=2).fingerprint,
        opened(prefix, seq_length=11).fingerprint,
        opened(prefix, split=[97, 2, 1]).fingerprint,
        opened(prefix, split=[50, 49, 1]).fingerprint,
    ]
    assert [first == other for other in others] == [False, False, False, True, False]


def test_large_files_are_fingerprinted_at_both_ends(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `content`, which checkpoints of older versions hold alone."""
    monkeypatch.setattr("data.splits._FINGERPRINTED", 16)
    Path(f"{prefix}.meta.json").unlink()
    first = opened(prefix).fingerprint
    size = Path(f"{prefix}.bin").stat().st_size
    for place in (0, size - 2):
        with changed(f"{prefix}.bin", place):
            assert opened(prefix).fingerprint["content"] != first["content"]
    with changed(f"{prefix}.bin", size // 2):
        assert opened(prefix).fingerprint["content"] == first["content"]


def flip(path: str, place: int) -> None:
    """Changes a bit of a file, which keeps its length and time."""
    status = Path(path).stat()
    content = bytearray(Path(path).read_bytes())
    content[place] ^= 1
    Path(path).write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextmanager
def changed(path: str, place: int) -> Iterator[None]:
    flip(path, place)
    yield
    flip(path, place)


def test_every_byte_of_each_file_is_in_the_fingerprint(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.splits._FINGERPRINTED", 16)
    monkeypatch.setattr("data.splits._BLOCK", 8)
    Path(f"{prefix}.meta.json").unlink()
    first = opened(prefix).fingerprint
    for place in (0, 101, 811, Path(f"{prefix}.bin").stat().st_size - 1):
        with changed(f"{prefix}.bin", place):
            found = opened(prefix).fingerprint
        assert [key for key in FILES if found[key] != first[key]] == ["bin"]
    Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes() + b"\0")
    found = opened(prefix).fingerprint
    assert [key for key in FILES if found[key] != first[key]] == ["idx"]


def test_of_files_beyond_a_gibibyte_blocks_are_hashed(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = Path(f"{prefix}.bin").stat().st_size
    monkeypatch.setattr("data.splits._BLOCK", 8)
    monkeypatch.setattr("data.splits._BLOCKS", 10)
    starts = list(splits_module._block_starts(size))
    assert (starts[0], starts[-1], len(starts)) == (0, size - 8, 10)
    steps = {after - before for before, after in pairwise(starts)}
    assert max(steps) - min(steps) <= 1
    first = opened(prefix).fingerprint["bin"]
    for place in (0, starts[4], starts[4] + 7, size - 1, starts[4] + 8):
        with changed(f"{prefix}.bin", place):
            assert (opened(prefix).fingerprint["bin"] == first) == (place == starts[4] + 8)


def test_blocks_reach_from_end_to_end_of_a_file_of_any_size() -> None:
    block = splits_module._BLOCK
    for size in (0, 1, block, block + 1, 256 * block, 256 * block + 1, 2**40):
        starts = splits_module._block_starts(size)
        assert len(starts) <= 256
        if size:
            assert (starts[0], min(starts[-1] + block, size)) == (0, size)
        if size <= 256 * block:
            assert all(after - before <= block for before, after in pairwise(starts))


def test_what_another_rank_has_hashed_is_not_hashed_again(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(prefix)
    monkeypatch.setattr(splits_module, "_file_digest", None)
    again = open_splits(DataConfig(path=prefix), "out", 1, 10, 257, first.digests)
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("suffix", FILES)
def test_a_file_that_is_not_the_one_that_was_prepared_is_named(prefix: str, suffix: str) -> None:
    opened(prefix)
    if suffix == "bin":
        flip(f"{prefix}.bin", 700)
    else:
        Path(f"{prefix}.idx").write_bytes(Path(f"{prefix}.idx").read_bytes() + b"\0")  # as multimodal data has
    with pytest.raises(CorruptDataError, match=rf"{prefix}\.{suffix} is not what was prepared: .*SHA-256"):
        opened(prefix)


def test_metadata_that_is_a_fifo_is_refused_at_once(prefix: str) -> None:
    Path(f"{prefix}.meta.json").unlink()
    os.mkfifo(f"{prefix}.meta.json")
    with pytest.raises(DataPathError, match=r"meta\.json is a FIFO, no regular file"):
        opened(prefix)


def test_metadata_of_other_data_is_refused(prefix: str, tmp_path: Path) -> None:
    prepare_documents(["something else"], tmp_path / "other", "bytes", seed=0)
    Path(f"{prefix}.meta.json").write_bytes((tmp_path / "other.meta.json").read_bytes())
    with pytest.raises(CorruptDataError, match=f"15 tokens, .*of {IndexedDataset(prefix).total_tokens}: .*not from"):
        opened(prefix)


def test_tokens_outside_the_model_are_refused(prefix: str) -> None:
    splits = open_splits(DataConfig(path=prefix), "out", 1, 700, 200)
    with pytest.raises(CorruptDataError, match="vocabulary ends at 199"):
        splits.train.sample(0)
