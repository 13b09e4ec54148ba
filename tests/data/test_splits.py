"""Splits cut by document, explain what is absent, and carry a fingerprint of the data."""

import json
from pathlib import Path

import pytest

from data.config import DataConfig
from data.errors import CorruptDataError, DataPathError
from data.indexed_dataset import IndexedDataset
from data.preparation import prepare_documents
from data.splits import Splits, open_splits


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
    monkeypatch.setattr("data.splits._FINGERPRINTED", 16)
    first = opened(prefix).fingerprint
    stream = bytearray(Path(f"{prefix}.bin").read_bytes())
    for place in (0, len(stream) - 2):
        changed = bytearray(stream)
        changed[place] ^= 1
        Path(f"{prefix}.bin").write_bytes(changed)
        assert opened(prefix).fingerprint != first


def test_metadata_of_other_data_is_refused(prefix: str, tmp_path: Path) -> None:
    prepare_documents(["something else"], tmp_path / "other", "bytes", seed=0)
    Path(f"{prefix}.meta.json").write_bytes((tmp_path / "other.meta.json").read_bytes())
    with pytest.raises(CorruptDataError, match=f"15 tokens, .*of {IndexedDataset(prefix).total_tokens}: .*not from"):
        opened(prefix)


def test_tokens_outside_the_model_are_refused(prefix: str) -> None:
    splits = open_splits(DataConfig(path=prefix), "out", 1, 700, 200)
    with pytest.raises(CorruptDataError, match="vocabulary ends at 199"):
        splits.train.sample(0)
