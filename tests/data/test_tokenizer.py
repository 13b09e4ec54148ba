"""Tokenizers give back the text they were given, and refuse what cannot work with a way on."""

import base64
import random
from pathlib import Path

import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import LONGEST_PIECE, Tokenizer, load_tokenizer, save_tiktoken, train_tokenizer
from runtime.errors import TokenizerError

TEXTS = [
    "the cat sat on the mat, the cat's mat\n",
    "höhere Häuser   und 12345 Räder",
    "def f(x):\n    return x * 2\n",
] * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.tiktoken"
    save_tiktoken(path, train_tokenizer(TEXTS, 300))
    return load_tokenizer(str(path))


@settings(deadline=None)
@given(text=st.text())
def test_round_trip(trained: Tokenizer, text: str) -> None:
    for tokenizer in (trained, load_tokenizer("bytes")):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text, "", text]) == [ids, [], ids]
        assert all(0 <= token < tokenizer.end_of_document for token in ids)


@settings(deadline=None)
@given(text=st.text())
def test_bytes_are_the_bytes(text: str) -> None:
    assert load_tokenizer("bytes").encode(text) == list(text.encode())


def test_sizes(trained: Tokenizer) -> None:
    assert (trained.vocab_size, trained.end_of_document) == (300, 299)
    plain = load_tokenizer("bytes")
    assert (plain.vocab_size, plain.end_of_document) == (257, 256)


def test_special_text_is_ordinary(trained: Tokenizer) -> None:
    ids = trained.encode("<|endoftext|>")
    assert trained.end_of_document not in ids
    assert trained.decode(ids) == "<|endoftext|>"
    assert trained.decode([trained.end_of_document]) == "<|endoftext|>"


def test_what_is_no_text_decodes_to_the_replacement_character(trained: Tokenizer) -> None:
    assert load_tokenizer("bytes").decode([0x61, 0xFF, 0x62]) == "a�b"
    assert trained.decode([ord("a"), 5000, ord("b")]) == "a�b"


def test_a_million_blanks(trained: Tokenizer) -> None:
    text = "a" + " " * 1_000_000 + "b"
    assert trained.decode(trained.encode(text)) == text
    assert trained.encode_batch(["x", text])[1] == trained.encode(text)


def test_training_compresses_and_is_deterministic(trained: Tokenizer) -> None:
    assert len(trained.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    assert train_tokenizer(iter(TEXTS), 300) == train_tokenizer(TEXTS, 300)


def test_pieces_are_cut_where_the_pattern_cuts(trained: Tokenizer) -> None:
    many = train_tokenizer(["ab 12345 cd"] * 50, 263)
    assert b" cd" in many
    assert b"123" in many
    assert not any(b"34" in token for token in many[256:])


def test_merges_follow_frequency() -> None:
    generator = random.Random(0)
    words = [" the"] * 50 + [" of"] * 20 + [" zq"] * 3
    generator.shuffle(words)
    tokens = train_tokenizer(["".join(words)], 262)
    assert tokens[:256] == [bytes([value]) for value in range(256)]
    assert set(tokens[256:]) >= {b" the", b" of"}
    assert b" zq" not in tokens


@pytest.mark.parametrize(("size", "advice"), [(256, "at least 257"), (20, "at least 257"), (300, "at most 260")])
def test_vocabularies_that_the_text_cannot_give(size: int, advice: str) -> None:
    with pytest.raises(TokenizerError, match=f"vocabulary of {size} .*ask for {advice} tokens"):
        train_tokenizer(["abcd"], size)
    assert len(train_tokenizer(["abcd"], 260)) == 259


def lines(tokens: list[bytes]) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


SINGLE = [bytes([value]) for value in range(256)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([*lines(SINGLE), b"!!! 256"], "line 257: expected a token in base64 and its rank, found b'!!! 256'"),
        ([*lines(SINGLE), b"YWI="], "line 257"),
        ([*lines(SINGLE), b"YWI= x"], "line 257"),
        ([*lines(SINGLE), b"YWI= 258"], "ranks must run from 0 without gaps"),
        ([*lines(SINGLE), b"YWI= -1"], "ranks must run from 0 without gaps"),
        (lines([*SINGLE, b"a"]), "each with its own token"),
        (lines(SINGLE[:250]), "6 of the 256 single bytes have no token"),
        ([], "256 of the 256 single bytes"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, content: list[bytes], message: str) -> None:
    path = tmp_path / "x.tiktoken"
    path.write_bytes(b"\n".join(content))
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.tiktoken"
    for extra in (b"ab", b"cd"):
        save_tiktoken(path, [*SINGLE, extra])
        assert load_tokenizer(str(path)).encode(extra.decode()) == [256]


def test_no_network_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    message = "gpt2 .ConnectionError.*bytes; .*kilotron train-tokenizer.*TIKTOKEN_CACHE_DIR"
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer("gpt2")


def test_an_encoding_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = tiktoken.Encoding(
        "gpt2", pat_str=".", mergeable_ranks={b: i for i, b in enumerate(SINGLE)}, special_tokens={"<|endoftext|>": 256}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: other)
    with pytest.raises(TokenizerError, match="has 257 tokens for gpt2, not 50257"):
        load_tokenizer("gpt2")


def test_text_without_blanks_trains_as_its_pieces_do():
    """Uncut, half a million letters take minutes."""
    letters = random.Random(0).choices("ACGT", k=500_000)
    text = "".join(letters)
    pieces = [text[start : start + LONGEST_PIECE] for start in range(0, len(text), LONGEST_PIECE)]
    assert train_tokenizer([text], 290) == train_tokenizer(pieces, 290)
