"""How many tokens the data has, and which tokenizer they are from: known before anything heavy is imported."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.errors import DataPathError, TokenizerError
from data.files import require_pair, sha256_of
from data.locations import sample_prefix
from data.metadata import Metadata, read_metadata

TIKTOKEN_SUFFIX = ".tiktoken"


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that can occur: 0 to size - 1."""

    size: int
    end_of_document: int | None
    source: str
    """What says so, for messages."""


NAMED_VOCABULARIES = {
    "bytes": Vocabulary(257, 256, "tokenizer bytes"),
    "gpt2": Vocabulary(50_257, 50_256, "tokenizer gpt2"),
    "cl100k_base": Vocabulary(100_277, 100_257, "tokenizer cl100k_base"),
    "o200k_base": Vocabulary(200_019, 199_999, "tokenizer o200k_base"),
}


def find_vocabulary(config: DataConfig, out_dir: str) -> Vocabulary:
    """The vocabulary of the data that `config` chooses.

    From the tokenizer where one is given, else from what the data was prepared with, else from the embedded corpus.
    Raises DataPathError, TokenizerError or CorruptDataError, with what to type instead.
    """
    if config.path is None:
        if config.corpus is None:
            raise DataPathError("no data is chosen: set data.path=PREFIX (see `kilotron prepare`) or data=sample")
        if config.tokenizer is None:
            size = config.corpus_vocab_size
            return Vocabulary(size, size - 1, f"data.corpus_vocab_size={size} of {sample_prefix(config, out_dir)}")
        return tokenizer_vocabulary(config.tokenizer)
    require_pair(config.path)
    metadata = read_metadata(config.path)
    if config.tokenizer is None:
        metadata = _require_metadata(config.path, metadata)
        return Vocabulary(metadata.vocab_size, metadata.end_of_document, f"{config.path}.meta.json")
    vocabulary = tokenizer_vocabulary(config.tokenizer)
    if metadata is not None:
        _refuse_contradiction(config.tokenizer, config.path, metadata)
    return vocabulary


def find_tokenizer(config: DataConfig, out_dir: str) -> str:
    """The tokenizer of the data that `config` chooses, as data.tokenizer and `load_tokenizer` take it."""
    if config.tokenizer is not None:
        return config.tokenizer
    if config.path is None:
        return sample_prefix(config, out_dir) + TIKTOKEN_SUFFIX
    return _require_metadata(config.path, read_metadata(config.path)).tokenizer_of(config.path)


def tokenizer_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a tokenizer by name or `.tiktoken` file. Raises TokenizerError where there is none."""
    if name in NAMED_VOCABULARIES:
        return NAMED_VOCABULARIES[name]
    if not name.endswith(TIKTOKEN_SUFFIX):
        nearest = difflib.get_close_matches(name, NAMED_VOCABULARIES, n=1, cutoff=0.0)[0]
        known = ", ".join(NAMED_VOCABULARIES)
        raise TokenizerError(f"no tokenizer {name!r}; did you mean {nearest}? known: {known}, or a .tiktoken file")
    path = Path(name)
    if not path.is_file():
        present = sorted(str(file) for file in path.parent.glob(f"*{TIKTOKEN_SUFFIX}"))
        matches = difflib.get_close_matches(name, present, n=1, cutoff=0.0)
        advice = f"nearest: {matches[0]}" if matches else "`kilotron train-tokenizer` makes one"
        raise TokenizerError(f"no tokenizer file {name}; {advice}")
    ranks = sum(1 for line in path.read_bytes().splitlines() if line)
    return Vocabulary(ranks + 1, ranks, f"tokenizer {name}")


def _require_metadata(path: str, metadata: Metadata | None) -> Metadata:
    if metadata is None:
        raise DataPathError(
            f"{path}.meta.json is missing, so the vocabulary of {path} is unknown: set data.tokenizer to the one it "
            f"was prepared with, or prepare the text again with `kilotron prepare`"
        )
    return metadata


def _refuse_contradiction(tokenizer: str, path: str, metadata: Metadata) -> None:
    digest = sha256_of(Path(tokenizer)) if tokenizer.endswith(TIKTOKEN_SUFFIX) else None
    if digest != metadata.tokenizer_sha256 or (digest is None and tokenizer != metadata.tokenizer):
        raise TokenizerError(
            f"data.tokenizer={tokenizer}, but {path} was prepared with {metadata.tokenizer_of(path)}: leave "
            f"data.tokenizer out, or prepare the text again with `--tokenizer {tokenizer}`"
        )
