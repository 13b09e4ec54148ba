"""Tokenizers in Hugging Face's tokenizer.json: used as they are, and made of a tiktoken encoding."""

from collections.abc import Iterable

import tiktoken

from data.vocabulary import tokenizer_vocabulary
from runtime.errors import TokenizerError


class HuggingFaceTokenizer:
    """A tokenizer.json. Text begins with what its post-processor puts there, such as `<s>`; text that looks like a
    special token is ordinary text."""

    def __init__(self, name: str) -> None:
        """Raises TokenizerError or DataPathError where the file `name` is missing or malformed."""
        from tokenizers import Tokenizer

        self.name, vocabulary = name, tokenizer_vocabulary(name)
        self.vocab_size, self.end_of_document = vocabulary.size, vocabulary.end_of_document
        try:
            self._tokenizer = Tokenizer.from_file(name)
        except Exception as error:  # the library raises no narrower one
            raise TokenizerError(f"{name} is no tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        # The file may ask for both, for a model of its own.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end-of-document token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, encoded in threads."""
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]
        return [ids[:-1] if ids[-1:] == [self.end_of_document] else ids for ids in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; unknown ids have none."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


def tokenizer_json(encoding: tiktoken.Encoding) -> bytes:
    """A tokenizer.json that encodes as a tiktoken encoding does.

    tiktoken joins any neighbours that make a token, lowest rank first: so each way to cut a token in two is a merge.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    characters = {value: character for character, value in byte_level_alphabet().items()}
    written = {token: "".join(characters[value] for value in token) for token in ranks}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocabulary = {written[token]: rank for token, rank in ranks.items()} | special
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(encoding._pat_str), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return str(made.to_str()).encode()


def byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of the byte-level alphabet (GPT-2's): printable Latin-1 stands for itself."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + place): value for place, value in enumerate(others)}
