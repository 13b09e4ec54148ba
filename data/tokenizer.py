"""Text to token ids and back, and the training of a vocabulary."""

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path

import tiktoken

from data.hugging_face_tokenizer import HuggingFaceTokenizer, byte_level_alphabet
from data.vocabulary import JSON_SUFFIX, TIKTOKEN_SUFFIX, tokenizer_vocabulary
from runtime.errors import TokenizerError
from runtime.files import write_whole

END_OF_DOCUMENT = "<|endoftext|>"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Cuts text into pieces that no token crosses; the one Llama 3's `.tiktoken` file is published with."""
LONGEST_PIECE = 1000
"""Characters of a piece in training, whose time grows with the square of that: text without blanks is cut here."""
_BLANKS = re.compile(r"\s{100000}")
_BYTES = [bytes([value]) for value in range(256)]


class TiktokenTokenizer:
    """A tiktoken encoding. Text that looks like a special token is ordinary text."""

    def __init__(self, name: str, encoding: tiktoken.Encoding) -> None:
        """`encoding` has an `<|endoftext|>`."""
        self.name = name
        self.vocab_size: int = encoding.n_vocab
        self.end_of_document: int = encoding.eot_token
        self.encoding = encoding

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token."""
        return [token for piece in _pieces(text) for token in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, encoded in threads."""
        pieces = [_pieces(text) for text in texts]
        encoded = iter(self.encoding.encode_ordinary_batch(list(chain.from_iterable(pieces))))
        return [list(chain.from_iterable(islice(encoded, len(parts)))) for parts in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids. Unknown ids and bytes that are no UTF-8 become the replacement character."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return "\N{REPLACEMENT CHARACTER}".encode()


Tokenizer = TiktokenTokenizer | HuggingFaceTokenizer
"""Both have a name, a vocab_size and an end_of_document, and the same methods."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `bytes`, a tiktoken encoding by name, a `.tiktoken` file (whose last id ends a document), or a
    tokenizer.json.

    Raises TokenizerError or DataPathError where it is unknown, malformed, or cannot be downloaded.
    """
    if name.endswith(JSON_SUFFIX):
        return HuggingFaceTokenizer(name)
    vocabulary = tokenizer_vocabulary(name)
    if name == "bytes":
        return TiktokenTokenizer(name, _encoding(name, r"[\s\S]", _BYTES))
    if name.endswith(TIKTOKEN_SUFFIX):
        return TiktokenTokenizer(name, _encoding(name, SPLIT_PATTERN, _read_ranks(Path(name))))
    try:
        tokenizer = TiktokenTokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"tiktoken cannot download the vocabulary of {name} ({type(error).__name__}). Without network: use the "
            f"tokenizer bytes; or a file that `kilotron train-tokenizer` makes from your text; or set "
            f"TIKTOKEN_CACHE_DIR to a folder filled where there is network, by tiktoken.get_encoding({name!r}) under "
            f"the same setting"
        ) from error
    if (tokenizer.vocab_size, tokenizer.end_of_document) != (vocabulary.size, vocabulary.end_of_document):
        raise TokenizerError(
            f"tiktoken {tiktoken.__version__} has {tokenizer.vocab_size} tokens for {name}, not {vocabulary.size}"
        )
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> list[bytes]:
    """The tokens of a byte-level BPE (arXiv:1508.07909) by rank: 256 bytes, then merges; the same for the same texts.

    `vocab_size` counts the end-of-document token, so that vocab_size - 1 tokens return. Raises TokenizerError where the
    text allows fewer merges.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.Split(Regex(rf"[\s\S]{{{LONGEST_PIECE}}}"), "isolated"),
            byte_level,
        ]
    )
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    vocabulary = trained.get_vocab()
    names = sorted(vocabulary, key=vocabulary.__getitem__)
    reached = len(names) + 1
    if reached != vocab_size:
        wanted = f"at most {reached} tokens" if reached < vocab_size else f"at least {reached} tokens"
        raise TokenizerError(f"a vocabulary of {vocab_size} cannot be trained on this text: ask for {wanted}")
    byte_of = byte_level_alphabet()
    return _BYTES + [bytes(byte_of[character] for character in name) for name in names if name not in byte_of]


def save_tiktoken(path: Path, tokens: Sequence[bytes]) -> None:
    """Writes tokens by rank as a `.tiktoken` file, atomically: a line each, the token in base64 and its rank."""
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    write_whole(path, b"".join(lines))


def _pieces(text: str) -> list[str]:
    """`text`, cut after each 100,000 blanks in a row: tiktoken's patterns give up on a run of a million."""
    cuts = [0, *(match.end() for match in _BLANKS.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(cuts)]


def _encoding(name: str, pattern: str, tokens: Sequence[bytes]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_DOCUMENT: len(tokens)}
    )


def _read_ranks(path: Path) -> list[bytes]:
    # not tiktoken's own reader: it keeps a copy by path in a temporary folder, stale once the file changes
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            tokens[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error):
            raise TokenizerError(
                f"{path}, line {number}: expected a token in base64 and its rank, found {line[:60]!r}; "
                f"`kilotron train-tokenizer` makes such a file"
            ) from None
    ordered = [tokens[rank] for rank in sorted(tokens)]
    if sorted(tokens) != list(range(len(tokens))) or len(set(ordered)) != len(ordered):
        raise TokenizerError(f"{path}: ranks must run from 0 without gaps, each with its own token")
    missing = set(_BYTES) - set(ordered)
    if missing:
        raise TokenizerError(
            f"{path}: {len(missing)} of the 256 single bytes have no token, so some text has no encoding"
        )
    return ordered
