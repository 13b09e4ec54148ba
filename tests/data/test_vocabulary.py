"""The vocabulary is found without opening anything heavy, or the error says what to type."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import DataConfig
from data.preparation import prepare_documents
from data.tokenizer import load_tokenizer, save_tiktoken, train_tokenizer
from data.vocabulary import find_tokenizer, find_vocabulary
from runtime.errors import CorruptDataError, DataPathError, TokenizerError

TEXTS = ["one small text", "another small text"]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    prepare_documents(TEXTS, tmp_path / "corpus", "bytes", seed=0)
    return str(tmp_path / "corpus")


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "small.tiktoken"
    save_tiktoken(path, train_tokenizer(TEXTS, 262))
    return str(path)


def vocabulary(**settings: object) -> tuple[int, int | None]:
    found = find_vocabulary(DataConfig(**settings), "out")
    return found.size, found.end_of_document


def test_named_tokenizers() -> None:
    assert vocabulary(corpus="sample", tokenizer="bytes") == (257, 256)
    assert vocabulary(corpus="sample", tokenizer="gpt2") == (50_257, 50_256)
    assert vocabulary(corpus="sample", tokenizer="cl100k_base") == (100_277, 100_257)
    assert vocabulary(corpus="sample", tokenizer="o200k_base") == (200_019, 199_999)


def test_embedded_corpus() -> None:
    assert vocabulary(corpus="sample", corpus_vocab_size=500) == (500, 499)
    tokenizer = find_tokenizer(DataConfig(corpus="sample", corpus_vocab_size=500), "out")
    assert tokenizer.startswith("out/sample_corpus/python")
    assert tokenizer.endswith("bpe500/sample.tiktoken")


def test_what_the_data_was_prepared_with(prefix: str, small: str, tmp_path: Path) -> None:
    assert vocabulary(path=prefix) == (257, 256)
    assert find_tokenizer(DataConfig(path=prefix), "out") == "bytes"
    prepare_documents(TEXTS, tmp_path / "bpe", small, seed=0)
    assert vocabulary(path=str(tmp_path / "bpe")) == (262, 261)
    assert vocabulary(path=str(tmp_path / "bpe"), tokenizer=small) == (262, 261)


def test_data_moves_together_with_its_tokenizer(small: str, tmp_path: Path) -> None:
    prepare_documents(TEXTS, tmp_path / "here" / "bpe", small, seed=0)
    (tmp_path / "here").rename(tmp_path / "there")
    moved = find_tokenizer(DataConfig(path=str(tmp_path / "there" / "bpe")), "out")
    assert moved == str(tmp_path / "there" / "bpe.tiktoken")
    assert load_tokenizer(moved).encode("small text") == load_tokenizer(small).encode("small text")


@pytest.mark.parametrize("change", ["cut", "replaced", "gone"])
def test_a_file_beside_the_data_that_is_not_its_tokenizer_is_refused(small: str, tmp_path: Path, change: str) -> None:
    prepare_documents(TEXTS, tmp_path / "bpe", small, seed=0)
    path, config = tmp_path / "bpe.tiktoken", DataConfig(path=str(tmp_path / "bpe"))
    assert find_tokenizer(config, "out") == str(path)
    if change == "cut":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    elif change == "replaced":
        save_tiktoken(path, train_tokenizer(["quite different"], 262))
    else:
        path.unlink()
    said = "no tokenizer file" if change == "gone" else f"is not the file with which {tmp_path}/bpe was prepared"
    with pytest.raises(TokenizerError, match=said):
        find_tokenizer(config, "out")


def test_files_that_are_fifos_are_refused_at_once(small: str, tmp_path: Path) -> None:
    for name in ("pipe.tiktoken", "pipe.json"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataPathError, match=f"{name} is a FIFO, no regular file"):
            vocabulary(corpus="sample", tokenizer=str(tmp_path / name))
        with pytest.raises(DataPathError, match=f"{name} is a FIFO, no regular file"):
            load_tokenizer(str(tmp_path / name))
    prepare_documents(TEXTS, tmp_path / "bpe", small, seed=0)
    for ending in (".tiktoken", ".meta.json"):
        Path(f"{tmp_path}/bpe{ending}").unlink()
        os.mkfifo(f"{tmp_path}/bpe{ending}")
        with pytest.raises(DataPathError, match=f"bpe{ending} is a FIFO, no regular file"):
            find_tokenizer(DataConfig(path=str(tmp_path / "bpe")), "out")
    with pytest.raises(DataPathError, match=r"bpe\.meta\.json is a FIFO"):
        vocabulary(path=str(tmp_path / "bpe"))


def test_a_file_counts_its_own_tokens(small: str) -> None:
    found = vocabulary(corpus="sample", tokenizer=small)
    loaded = load_tokenizer(small)
    assert found == (loaded.vocab_size, loaded.end_of_document) == (262, 261)


def test_nothing_chosen() -> None:
    with pytest.raises(DataPathError, match=r"set data.path=PREFIX .* or data=sample"):
        vocabulary()


def test_missing_path_names_the_nearest(prefix: str) -> None:
    with pytest.raises(DataPathError, match=f"nearest: {prefix}$") as caught:
        vocabulary(path=prefix + "e")
    assert caught.value.exit_code == 78


def test_unknown_vocabulary_offers_both_ways_on(prefix: str) -> None:
    Path(f"{prefix}.meta.json").unlink()
    for find in (find_vocabulary, find_tokenizer):
        with pytest.raises(DataPathError, match=r"meta.json is missing.*data.tokenizer.*kilotron prepare"):
            find(DataConfig(path=prefix), "out")
    assert vocabulary(path=prefix, tokenizer="bytes") == (257, 256)


@pytest.mark.parametrize(("name", "nearest"), [("gpt-2", "gpt2"), ("byte", "bytes"), ("cl100k", "cl100k_base")])
def test_unknown_tokenizer_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(TokenizerError, match=f"{name}.*did you mean {nearest}.*known: bytes, gpt2"):
        vocabulary(corpus="sample", tokenizer=name)


def test_missing_tokenizer_file(small: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=f"no tokenizer file .*smal.tiktoken; nearest: {small}"):
        vocabulary(corpus="sample", tokenizer=str(tmp_path / "smal.tiktoken"))
    with pytest.raises(TokenizerError, match="`kilotron train-tokenizer` makes one"):
        vocabulary(corpus="sample", tokenizer=str(tmp_path / "none" / "x.tiktoken"))


def test_a_tokenizer_that_contradicts_the_data_is_refused(prefix: str, small: str, tmp_path: Path) -> None:
    prepare_documents(TEXTS, tmp_path / "bpe", small, seed=0)
    other = tmp_path / "other.tiktoken"
    save_tiktoken(other, train_tokenizer(["quite different"], 262))
    contradictions = [
        (prefix, "gpt2"),
        (prefix, small),
        (str(tmp_path / "bpe"), "bytes"),
        (str(tmp_path / "bpe"), other),
    ]
    for path, tokenizer in contradictions:
        with pytest.raises(TokenizerError, match=r"was prepared with (bytes|.*bpe.tiktoken): leave data.tokenizer out"):
            vocabulary(path=path, tokenizer=str(tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: expected 1, found 2"),
        ({"vocab_size": "257"}, "wrong type"),
        ({"tokenizer": None}, "wrong type"),
        ({"sha256": {"bin": "x"}}, "KeyError"),
        ({"sha256": {"bin": "x", "idx": 3}}, "wrong type"),
    ],
)
def test_damaged_metadata_is_refused(prefix: str, change: dict[str, object], message: str) -> None:
    path = Path(f"{prefix}.meta.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CorruptDataError, match=message):
        vocabulary(path=prefix)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', "7", "[" * 100_000])
def test_foreign_metadata_is_refused(prefix: str, content: str) -> None:
    Path(f"{prefix}.meta.json").write_text(content)
    with pytest.raises(CorruptDataError, match=r"meta.json is not what `kilotron prepare` writes"):
        vocabulary(path=prefix)


def test_nothing_heavy_is_imported(prefix: str) -> None:
    code = (
        "import sys; from data.config import DataConfig; from data.vocabulary import find_vocabulary; "
        f"find_vocabulary(DataConfig(path={prefix!r}), 'out'); "
        "find_vocabulary(DataConfig(corpus='sample'), 'out'); "
        "print(sorted({'numpy', 'torch', 'tiktoken', 'tokenizers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_a_vocabulary_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        find_vocabulary(DataConfig(corpus="sample"), "out").size = 1
