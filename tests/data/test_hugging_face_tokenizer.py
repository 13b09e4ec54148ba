"""tokenizer.json: the tokens of the `tokenizers` library, the end of a document found or asked for, and conversions."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig
from data.hugging_face_tokenizer import HuggingFaceTokenizer, tokenizer_json
from data.metadata import read_metadata
from data.preparation import prepare_documents
from data.tokenizer import load_tokenizer, save_tiktoken, train_tokenizer
from data.vocabulary import find_tokenizer, find_vocabulary, tokenizer_files, tokenizer_vocabulary
from runtime.errors import DataPathError, TokenizerError

TEXTS = ["the cat sat on the mat, the cat's mat\n", "höhere Häuser   und 12345 Räder", "aaaa aaaaaaa"] * 3
SPECIAL = ["<s>", "</s>", "<unk>"]


def trained(kind: str) -> tokenizers.Tokenizer:
    """A byte-level tokenizer, or one as sentencepiece makes them, which begins each text with `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        build = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
        trainer = build(vocab_size=60, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    made.enable_truncation(4)
    made.enable_padding(length=30)
    return made


def save(folder: Path, kind: str, eos: object = None) -> str:
    folder.mkdir(exist_ok=True)
    trained(kind).save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("bytes") / "x", "bytes", {"content": "<|end|>", "lstrip": False})


@settings(deadline=None)
@given(text=st.text() | st.sampled_from(["x <|end|> y", "<|end|>", " " * 100_000]))
def test_round_trip(byte_level: str, text: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
    assert tokenizer.end_of_document not in ids


def test_sizes_and_ends(byte_level: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    found = tokenizer_vocabulary(byte_level)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (found.size, found.end_of_document)
    assert found.end_of_document == 0
    assert found.size == trained("bytes").get_vocab_size()


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_text_begins_as_the_file_says_and_ends_without_an_end(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(save(tmp_path, kind))
    ids = tokenizer.encode("the cat sat on the mat")
    assert ids[0] == 0
    assert len(ids) > 4
    assert not {1, 2} & set(ids)
    assert tokenizer.end_of_document == 1
    assert tokenizer.decode(ids).removeprefix("<s>").strip() == "the cat sat on the mat"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"eos_token": "<s>"}}, 0),
        ({"tokenizer_config.json": {"eos_token": {"content": "<unk>"}}}, 2),
        ({"tokenizer_config.json": {"eos_token": None}}, 1),
        ({"special_tokens_map.json": {"eos_token": "<s>"}}, 0),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": {"content": "<unk>"}}}, 2),
        ({}, 1),
    ],
)
def test_the_end_of_a_document_is_found(tmp_path: Path, files: dict[str, object], expected: int) -> None:
    name = save(tmp_path, "bpe")
    for file, content in files.items():
        (tmp_path / file).write_text(json.dumps(content))
    assert tokenizer_vocabulary(name).end_of_document == expected
    # and stays what it is elsewhere
    (tmp_path / "there").mkdir()
    for ending, kept in tokenizer_files(name).items():
        (tmp_path / "there" / f"other{ending}").write_bytes(kept)
    assert tokenizer_vocabulary(str(tmp_path / "there/other.json")).end_of_document == expected


def test_an_unknown_end_is_asked_for(tmp_path: Path) -> None:
    name = save(tmp_path, "bytes")
    with pytest.raises(TokenizerError, match=r"ends a document is not in it \(<.endoftext.>.*tokenizer_config\.json"):
        tokenizer_vocabulary(name)
    with pytest.raises(TokenizerError, match=r"not in it \(</s>\)"):
        tokenizer_vocabulary(save(tmp_path, "bytes", "</s>"))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"model": 7}', '{"model": {"vocab": {}}}', '{"model": {"vocab": {"a": "b"}}}',
     '{"model": {"vocab": [7]}}', '{"model": {"vocab": {"</s>": 0, "a": -1}}}'],
)  # fmt: skip
def test_malformed_files_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises((TokenizerError, DataPathError), match=r"tokenizer\.json"):
        tokenizer_vocabulary(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"no tokenizer file .*tokenizr\.json; nearest: .*tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizr.json"))


def test_what_the_library_refuses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"</s>": 0}}}')
    with pytest.raises(TokenizerError, match=r"is no tokenizer\.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_data_keeps_its_tokenizer(tmp_path: Path) -> None:
    name = save(tmp_path / "here", "bpe", "<unk>")
    prepare_documents(TEXTS, tmp_path / "here" / "data", name, seed=0)
    (tmp_path / "here").rename(tmp_path / "there")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "there" / file).rename(tmp_path / file)
    prefix = str(tmp_path / "there" / "data")
    metadata = read_metadata(prefix)
    assert metadata is not None
    assert (metadata.tokenizer, metadata.end_of_document) == ("data.tokenizer.json", 2)
    kept = find_tokenizer(DataConfig(path=prefix), "out")
    assert tokenizer_vocabulary(kept).end_of_document == 2
    assert load_tokenizer(kept).encode("the cat") == load_tokenizer(str(tmp_path / "tokenizer.json")).encode("the cat")
    assert find_vocabulary(DataConfig(path=prefix, tokenizer=str(tmp_path / "tokenizer.json")), "out").size == 60


def test_a_tokenizer_that_contradicts_the_data_is_refused(tmp_path: Path) -> None:
    name = save(tmp_path / "one", "bpe")
    prepare_documents(TEXTS, tmp_path / "data", name, seed=0)
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    other = save(tmp_path / "two", "unigram")
    ends = save(tmp_path / "one", "bpe", "<unk>")
    for tokenizer in (other, ends, "bytes"):
        with pytest.raises(TokenizerError, match=r"was prepared with .*data\.tokenizer\.json: leave"):
            find_vocabulary(DataConfig(path=str(tmp_path / "data"), tokenizer=tokenizer), "out")
    same = str(tmp_path / "same" / "tokenizer.json")
    assert find_vocabulary(DataConfig(path=str(tmp_path / "data"), tokenizer=same), "out").end_of_document == 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[object, object]]:
    """Tokenizers of tiktoken, each with the tokenizer.json made of it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiktoken(folder / "own.tiktoken", train_tokenizer([*TEXTS, "\n\n\n   \t x"] * 9, 303))
    found = []
    for number, name in enumerate((str(folder / "own.tiktoken"), "bytes")):
        tokenizer = load_tokenizer(name)
        (folder / f"{number}.json").write_bytes(tokenizer_json(tokenizer.encoding))
        found.append((tokenizer, load_tokenizer(str(folder / f"{number}.json"))))
    return found


@settings(deadline=None, max_examples=200)
@given(text=st.text() | st.text(alphabet=" atchems\n1'", max_size=60))
def test_what_is_made_of_tiktoken_encodes_alike(
    pair: list[tuple[HuggingFaceTokenizer, HuggingFaceTokenizer]], text: str
) -> None:
    for original, made in pair:
        ids = original.encode(text)
        assert made.encode(text) == ids
        assert made.decode(ids) == text
        assert (made.vocab_size, made.end_of_document) == (original.vocab_size, original.end_of_document)
