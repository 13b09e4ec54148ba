"""The embedded corpus is English, the same each time, and survives a race."""

import threading
from pathlib import Path

import pytest

from data.config import DataConfig
from data.gpt_dataset import unigram_entropy
from data.sample_corpus import prepare_sample, sample_documents, sample_prefix
from data.splits import open_splits
from data.vocabulary import find_tokenizer, find_vocabulary
from runtime.errors import DataPathError, TokenizerError

FEW = [f"{number} small documents are a corpus too.\n" * 20 for number in range(30)]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sample_corpus.sample_documents", lambda: iter(FEW))


def test_the_documentation_of_python() -> None:
    documents = list(sample_documents())
    assert 1_500_000 < sum(map(len, documents)) < 4_000_000
    text = "\n".join(documents)
    assert "Dictionaries" in text  # a help topic
    assert "Command-line parsing library" in text  # a docstring
    assert all(document.strip() for document in documents)


def test_prepared_once_and_opened(few: None, tmp_path: Path) -> None:
    config = DataConfig(corpus="sample", corpus_vocab_size=300, split=[8, 1, 1])
    prefix = prepare_sample(config, str(tmp_path))
    assert prefix == sample_prefix(config, str(tmp_path))
    written = Path(f"{prefix}.bin").stat().st_mtime_ns
    assert prepare_sample(config, str(tmp_path)) == prefix
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == written
    assert find_tokenizer(config, str(tmp_path)) == f"{prefix}.tiktoken"
    vocabulary = find_vocabulary(DataConfig(path=prefix), "out")
    assert (vocabulary.size, vocabulary.end_of_document) == (300, 299)
    splits = open_splits(config, str(tmp_path), 0, 16, vocabulary.size)
    assert splits.validation is not None
    assert 0 < unigram_entropy(splits.validation, 300) < 5
    assert not list(tmp_path.rglob("*.tmp"))


def test_each_tokenizer_has_its_place(few: None, tmp_path: Path) -> None:
    prefix = prepare_sample(DataConfig(corpus="sample", corpus_vocab_size=300), str(tmp_path))
    file = f"{prefix}.tiktoken"
    configs = [
        DataConfig(corpus="sample", corpus_vocab_size=300),
        DataConfig(corpus="sample", corpus_vocab_size=301),
        DataConfig(corpus="sample", tokenizer="bytes"),
        DataConfig(corpus="sample", tokenizer=file),
    ]
    assert len({prepare_sample(config, str(tmp_path)) for config in configs}) == 4


def test_racing_preparations_all_end_well(few: None, tmp_path: Path) -> None:
    config = DataConfig(corpus="sample", tokenizer="bytes")
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(prepare_sample(config, str(tmp_path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [sample_prefix(config, str(tmp_path))] * 4
    assert open_splits(config, str(tmp_path), 0, 8, 257).train.samples_per_epoch > 10
    assert len(list((tmp_path / "sample_corpus").iterdir())) == 1


def test_too_large_a_vocabulary_leaves_nothing(few: None, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"vocabulary of 100000 .*at most"):
        prepare_sample(DataConfig(corpus="sample", corpus_vocab_size=100_000), str(tmp_path))
    assert not list((tmp_path / "sample_corpus").iterdir())


def test_a_python_without_documentation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("data.sample_corpus.sample_documents", lambda: iter(()))
    with pytest.raises(DataPathError, match=r"use data.path instead"):
        prepare_sample(DataConfig(corpus="sample", tokenizer="bytes"), str(tmp_path))
