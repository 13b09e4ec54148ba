"""A preparation keeps every document, shuffles them, and is whole or absent."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.documents import read_documents
from data.indexed_dataset import IndexedDataset
from data.preparation import left_behind, prepare_documents
from data.tokenizer import load_tokenizer, save_tiktoken, train_tokenizer
from runtime.errors import CorruptDataError, DataPathError, TokenizerError
from tests.data.independent_reader import read_independently

TEXTS = [f"document {number}, " * (number % 5 + 1) for number in range(60)]


def texts_of(prefix: Path) -> list[str]:
    tokenizer = load_tokenizer("bytes")
    documents = read_independently(prefix)
    assert all(ids[-1] == 256 and 256 not in ids[:-1] for ids in documents)
    return [tokenizer.decode(ids[:-1]) for ids in documents]


def test_every_document_once_in_another_order(tmp_path: Path) -> None:
    prepared = prepare_documents(iter(TEXTS), tmp_path / "a.v1", "bytes", seed=0)
    found = texts_of(tmp_path / "a.v1")
    assert sorted(found) == sorted(TEXTS)
    assert sum(a == b for a, b in zip(found, TEXTS, strict=True)) < 10
    assert (prepared.metadata.documents, prepared.skipped) == (60, 0)
    prepare_documents(TEXTS, tmp_path / "same", "bytes", seed=0)
    prepare_documents(TEXTS, tmp_path / "other", "bytes", seed=1)
    assert texts_of(tmp_path / "same") == found
    assert texts_of(tmp_path / "other") != found


def test_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_documents(TEXTS, tmp_path / "one", "bytes", seed=0)
    monkeypatch.setattr("data.preparation._BATCH_CHARACTERS", 100)
    heard: list[tuple[int, int]] = []
    prepare_documents(TEXTS, tmp_path / "many", "bytes", 0, lambda documents, tokens: heard.append((documents, tokens)))
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "many.bin").read_bytes()
    assert len(heard) > 5
    assert heard == sorted(heard)
    assert heard[-1] == (60, IndexedDataset(tmp_path / "one").total_tokens)


def test_metadata_tells_the_truth(tmp_path: Path) -> None:
    prepare_documents(TEXTS, tmp_path / "a", "bytes", seed=9)
    content = json.loads((tmp_path / "a.meta.json").read_text())
    indexed = IndexedDataset(tmp_path / "a")
    assert content == {
        "format": 1,
        "tokenizer": "bytes",
        "vocab_size": 257,
        "end_of_document": 256,
        "documents": indexed.num_documents,
        "tokens": indexed.total_tokens,
        "seed": 9,
        "sha256": {kind: hashlib.sha256((tmp_path / f"a.{kind}").read_bytes()).hexdigest() for kind in ("bin", "idx")},
        "tokenizer_sha256": None,
    }


def test_a_tokenizer_file_travels_with_the_data(tmp_path: Path) -> None:
    path = tmp_path / "small.tiktoken"
    save_tiktoken(path, train_tokenizer(TEXTS, 270))
    prepare_documents(TEXTS, tmp_path / "deep" / "a", str(path), seed=0)
    assert (tmp_path / "deep" / "a.tiktoken").read_bytes() == path.read_bytes()
    content = json.loads((tmp_path / "deep" / "a.meta.json").read_text())
    assert content["tokenizer"] == "a.tiktoken"
    assert content["tokenizer_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    # and may already lie where it goes
    prepare_documents(TEXTS, tmp_path / "deep" / "a", str(tmp_path / "deep" / "a.tiktoken"), seed=0)
    assert (tmp_path / "deep" / "a.tiktoken").read_bytes() == path.read_bytes()


def test_documents_without_text_are_counted(tmp_path: Path) -> None:
    prepared = prepare_documents(["", "x", " \n", "y"], tmp_path / "a", "bytes", seed=0)
    assert (prepared.metadata.documents, prepared.skipped) == (2, 2)
    with pytest.raises(CorruptDataError, match="no text in any of 2 documents"):
        prepare_documents(["", " "], tmp_path / "b", "bytes", seed=0)


def test_files_in_one_go(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one##two")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}')
    documents = read_documents([tmp_path], json_key="body", separator="##")
    prepare_documents(documents, tmp_path / "out", "bytes", seed=0)
    assert sorted(texts_of(tmp_path / "out")) == ["one", "three", "two"]


@pytest.mark.parametrize(
    ("name", "tokenizer", "error"),
    [("a.txt", "byte", TokenizerError), ("b.txt", "bytes", DataPathError), ("bad.jsonl", "bytes", CorruptDataError)],
)
def test_a_failure_leaves_nothing_and_spoils_nothing(
    tmp_path: Path, name: str, tokenizer: str, error: type[Exception]
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{')
    prepare_documents(read_documents([tmp_path / "a.txt"]), tmp_path / "out" / "a", "bytes", seed=0)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(error):
        prepare_documents(read_documents([tmp_path / name]), tmp_path / "out" / "a", tokenizer, seed=0)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert len(before) == 3


def test_what_killed_preparations_left_is_found_with_its_time(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    code = "import os; from data.preparation import left_behind, prepare_documents as p; from pathlib import Path\n"
    code += f"p((os._exit(9) for _ in [0]), Path({str(tmp_path / 'a')!r}), 'bytes', 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (folder,) = tmp_path.glob(".a.*.tmp")
    os.utime(folder, (5, 5))
    for file in folder.iterdir():
        os.utime(file, (7, 7))
    names = ["bin", "idx", "meta.json", "tiktoken", "tokenizer.json", "tokenizer_config.json"]
    files = [tmp_path / f".a.{name}.0123456789ab.tmp" for name in names]
    others = [
        ".b.0123456789ab.tmp",
        ".a.v2.0123456789ab.tmp",
        ".a.0123.tmp",
        "a.0123456789ab.tmp",
        ".a.0123456789ab.tmp.x",
    ]
    for path in (*files, *(tmp_path / name for name in others)):
        path.touch()
    found = left_behind(tmp_path / "a")
    assert found.keys() == {folder, *files}
    assert found[folder] == 7
    assert left_behind(tmp_path / "nowhere" / "a") == {}
    prepare_documents(TEXTS, tmp_path / "a", "bytes", seed=0)
    assert left_behind(tmp_path / "a").keys() == {folder, *files}, "it may be another's that runs now"


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_torn_preparation_is_never_taken_for_whole(
    tmp_path: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_documents(TEXTS, tmp_path / "a", "bytes", seed=0)
    published: list[str] = []

    def crash(temporary: Path, target: Path) -> None:
        published.append(target.name)
        if len(published) == crash_at:
            raise KeyboardInterrupt
        temporary.replace(target)

    def stage(prefix: Path) -> None:
        prepare_documents(reversed(TEXTS), prefix, "bytes", seed=1)

    monkeypatch.setattr("data.preparation.publish", crash)
    monkeypatch.setattr("runtime.files.publish", crash)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "a")
    assert published == ["a.meta.json", "a.bin", "a.idx"][:crash_at]
    with pytest.raises(CorruptDataError, match=r"has no a.idx beside it"):
        IndexedDataset(tmp_path / "a")
    assert not list(tmp_path.glob(".*"))
