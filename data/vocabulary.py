"""How many tokens the data has, and which tokenizer they are from: known before anything heavy is imported."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig
from data.locations import require_pair, sample_prefix
from data.metadata import Metadata, read_metadata
from runtime.errors import DataPathError, TokenizerError
from runtime.files import is_there, read_object, sha256_of

TIKTOKEN_SUFFIX = ".tiktoken"
JSON_SUFFIX = ".json"
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
"""Tokens that end a document in a tokenizer.json of which nothing beside it says so."""


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that can occur: 0 to size - 1."""

    size: int
    end_of_document: int
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
        _refuse_contradiction(config.tokenizer, config.path, metadata, vocabulary)
    return vocabulary


def find_tokenizer(config: DataConfig, out_dir: str) -> str:
    """The tokenizer of the data that `config` chooses, as data.tokenizer and `load_tokenizer` take it.

    Raises DataPathError or CorruptDataError where it is unknown, TokenizerError where the file that lies beside the
    data is not the one with which that was prepared.
    """
    if config.tokenizer is not None:
        return config.tokenizer
    if config.path is None:
        if config.corpus is None:
            raise DataPathError("the data, and so its tokenizer, is not known")
        prefix = sample_prefix(config, out_dir)
        tokenizer, metadata = prefix + TIKTOKEN_SUFFIX, read_metadata(prefix)
    else:
        prefix = config.path
        metadata = _require_metadata(prefix, read_metadata(prefix))
        tokenizer = metadata.tokenizer_of(prefix)
    if metadata is not None and metadata.tokenizer_sha256 not in (None, tokenizer_digest(tokenizer)):
        raise TokenizerError(
            f"{tokenizer} is not the file with which {prefix} was prepared, of which {prefix}.meta.json has the "
            f"SHA-256: restore it, or prepare the text again with `kilotron prepare`"
        )
    return tokenizer


def tokenizer_vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a tokenizer by name or file. Raises TokenizerError where there is none, DataPathError where a
    file that should be JSON is not."""
    if name in NAMED_VOCABULARIES:
        return NAMED_VOCABULARIES[name]
    if not is_tokenizer_file(name):
        nearest = difflib.get_close_matches(name, NAMED_VOCABULARIES, n=1, cutoff=0.0)[0]
        known = ", ".join(NAMED_VOCABULARIES)
        raise TokenizerError(
            f"no tokenizer {name!r}; did you mean {nearest}? known: {known}, or a file (.tiktoken, tokenizer.json)"
        )
    _require_file(name)
    path = Path(name)
    if name.endswith(JSON_SUFFIX):
        tokens, end = _read_tokenizer_json(path)
        return Vocabulary(max(tokens.values()) + 1, tokens[end], f"tokenizer {name}")
    ranks = sum(1 for line in path.read_bytes().splitlines() if line)
    return Vocabulary(ranks + 1, ranks, f"tokenizer {name}")


def _require_file(name: str) -> None:
    path = Path(name)
    if not is_there(path):
        present = sorted(str(file) for file in path.parent.glob(f"*{path.suffix}"))
        matches = difflib.get_close_matches(name, present, n=1, cutoff=0.0)
        advice = f"nearest: {matches[0]}" if matches else "`kilotron train-tokenizer` makes one"
        raise TokenizerError(f"no tokenizer file {name}; {advice}")


def is_tokenizer_file(name: str) -> bool:
    """Whether a tokenizer is named by its file."""
    return name.endswith((TIKTOKEN_SUFFIX, JSON_SUFFIX))


def tokenizer_digest(name: str) -> str | None:
    """SHA-256 of a tokenizer's file, None where the tokenizer is none. Raises TokenizerError where it is missing."""
    if not is_tokenizer_file(name):
        return None
    _require_file(name)
    return sha256_of(Path(name))


def same_tokenizer(one: str, other: str) -> bool:
    """Whether two tokenizers, by name or file, have the same tokens and end a document with the same one."""
    if tokenizer_digest(one) is None or tokenizer_digest(one) != tokenizer_digest(other):
        return one == other
    return tokenizer_vocabulary(one).end_of_document == tokenizer_vocabulary(other).end_of_document


def tokenizer_files(name: str) -> dict[str, bytes]:
    """What a tokenizer file is elsewhere: contents by what follows the stem of a file's name.

    Beside a tokenizer.json lies tokenizer_config.json, which names the token that ends a document. Raises as
    `tokenizer_vocabulary` does.
    """
    path = Path(name)
    if not name.endswith(JSON_SUFFIX):
        return {path.suffix: path.read_bytes()}
    _, end = _read_tokenizer_json(path)
    companion = _companion(path)
    config = read_object(companion) if is_there(companion) else {}
    told = companion.read_bytes() if config.get("eos_token") else json.dumps({**config, "eos_token": end}).encode()
    return {JSON_SUFFIX: path.read_bytes(), f"_config{JSON_SUFFIX}": told}


def _companion(path: Path) -> Path:
    return path.with_name(f"{path.stem}_config{JSON_SUFFIX}")


def _read_tokenizer_json(path: Path) -> tuple[dict[str, int], str]:
    """The id of every token, and the token that ends a document."""
    content = read_object(path)
    try:
        learned = content["model"]["vocab"]
        tokens = dict(learned) if isinstance(learned, dict) else {pair[0]: place for place, pair in enumerate(learned)}
        tokens |= {added["content"]: added["id"] for added in content.get("added_tokens") or []}
        if not tokens or not all(type(number) is int and number >= 0 for number in tokens.values()):
            raise ValueError("ids are not whole numbers")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path} is no tokenizer.json: {error!r}") from error
    companions = [file for file in (_companion(path), path.with_name("special_tokens_map.json")) if is_there(file)]
    told = [read_object(file).get("eos_token") for file in companions]
    ends = [str(end.get("content") if isinstance(end, dict) else end) for end in told if end]
    found = next((end for end in ends or ENDS if end in tokens), None)
    if found is None:
        raise TokenizerError(
            f"{path}: the token that ends a document is not in it ({', '.join(ends or ENDS)}); "
            f'name it as {{"eos_token": "..."}} in {_companion(path)}'
        )
    return tokens, found


def _require_metadata(path: str, metadata: Metadata | None) -> Metadata:
    if metadata is None:
        raise DataPathError(
            f"{path}.meta.json is missing, so the vocabulary of {path} is unknown: set data.tokenizer to the one it "
            f"was prepared with, or prepare the text again with `kilotron prepare`"
        )
    return metadata


def _refuse_contradiction(tokenizer: str, path: str, metadata: Metadata, vocabulary: Vocabulary) -> None:
    digest = sha256_of(Path(tokenizer)) if is_tokenizer_file(tokenizer) else None
    same = digest == metadata.tokenizer_sha256 and vocabulary.end_of_document == metadata.end_of_document
    if not same or (digest is None and tokenizer != metadata.tokenizer):
        raise TokenizerError(
            f"data.tokenizer={tokenizer}, but {path} was prepared with {metadata.tokenizer_of(path)}: leave "
            f"data.tokenizer out, or prepare the text again with `--tokenizer {tokenizer}`"
        )
