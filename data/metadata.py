"""The `.meta.json` beside a prepared pair: what it was prepared with."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from runtime.errors import CorruptDataError
from runtime.files import is_there, write_whole

_FORMAT = 1


@dataclass(frozen=True)
class Metadata:
    """What `kilotron prepare` knew about the data."""

    tokenizer: str
    """A name that data.tokenizer takes, or the name of a file in the same folder."""
    vocab_size: int
    end_of_document: int
    """Token id that ends each document."""
    documents: int
    tokens: int
    """End-of-document tokens included."""
    seed: int
    """Seed of the documents' order."""
    sha256: dict[str, str]
    """SHA-256 of the `.bin` and the `.idx`, by suffix."""
    tokenizer_sha256: str | None
    """SHA-256 of the tokenizer's file, where it is one."""

    def write(self, prefix: str | Path) -> None:
        """Writes `<prefix>.meta.json` atomically."""
        content = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2)
        write_whole(Path(f"{prefix}.meta.json"), f"{content}\n".encode())

    def tokenizer_of(self, prefix: str | Path) -> str:
        """The tokenizer as data.tokenizer takes it: a file's path starts from the folder of `prefix`."""
        return str(Path(prefix).parent / self.tokenizer) if self.tokenizer_sha256 else self.tokenizer


def read_metadata(prefix: str | Path) -> Metadata | None:
    """What stands in `<prefix>.meta.json`; None where it is absent.

    Raises CorruptDataError where it is unreadable, DataPathError where it is no regular file.
    """
    path = Path(f"{prefix}.meta.json")
    if not is_there(path):
        return None
    try:
        content = json.loads(path.read_bytes())
        found = content["format"]
        metadata = Metadata(**{field.name: content[field.name] for field in fields(Metadata)})
        sizes = (metadata.vocab_size, metadata.end_of_document, metadata.documents, metadata.tokens)
        texts = (metadata.tokenizer, *(metadata.sha256[suffix] for suffix in ("bin", "idx")))
        if not all(isinstance(text, str) for text in texts) or not all(type(size) is int for size in sizes):
            raise TypeError("a field is of the wrong type")
    except (RecursionError, ValueError, KeyError, TypeError) as error:
        raise CorruptDataError(
            f"{path} is not what `kilotron prepare` writes: {error!r}; prepare the data again"
        ) from None
    if found != _FORMAT:
        raise CorruptDataError(f"{path}: format: expected {_FORMAT}, found {found}; prepare the data again")
    return metadata
