"""Documents out of text files, JSON lines and folders of both."""

import difflib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from runtime.errors import CorruptDataError, DataPathError
from runtime.files import is_there, unique_keys

_JSON_LINES = (".jsonl", ".json")
_FOUND_IN_FOLDERS = (".txt", ".jsonl")
_CHUNK = 1 << 20


def read_documents(inputs: Sequence[Path], json_key: str = "text", separator: str | None = None) -> Iterator[str]:
    """The documents of all inputs, in order; a folder stands for its .txt and .jsonl files at any depth, by name.

    A text file (UTF-8) is one document, or several between `separator`s, in which a line break may be of either kind; a
    .jsonl or .json file is an object a line, its text under `json_key`. Text stays as it is, line breaks included.
    Raises DataPathError at the call where an input is missing, CorruptDataError with file and line where one cannot be
    read.
    """
    return itertools.chain.from_iterable(
        _json_documents(file, json_key) if file.suffix in _JSON_LINES else _text_documents(file, separator)
        for file in find_files(inputs)
    )


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that `inputs` stand for.

    Raises DataPathError where one is missing, cannot be read or is no regular file, or a folder holds none.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(_texts_under(path))
            if not found:
                raise DataPathError(
                    f"{path} holds no {' or '.join(_FOUND_IN_FOLDERS)} file; name other files one by one"
                )
            files += found
        elif is_there(path):
            files.append(path)
        elif path.is_symlink():
            raise DataPathError(f"{path} is a link to {path.readlink()}, which is not there")
        else:
            names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
            nearest = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
            raise DataPathError(f"no input {path}" + (f"; nearest: {path.parent / nearest[0]}" if nearest else ""))
    return files


def _texts_under(folder: Path) -> Iterator[Path]:
    """Text files at any depth, also behind links; a folder to which several lead is taken once."""

    def fail(error: OSError) -> None:
        raise DataPathError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for here, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders.sort()
        real = Path(here).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(here, name) for name in names):
            if path.suffix not in _FOUND_IN_FOLDERS:
                continue
            if not is_there(path):
                raise DataPathError(f"{path} is a link to {path.readlink()}, which is not there")
            yield path


def _text_documents(file: Path, separator: str | None) -> Iterator[str]:
    try:
        # With newline="" nothing is translated: the model is to see what the file holds.
        with file.open(encoding="utf-8-sig", newline="") as handle:
            if separator is None:
                yield handle.read()
            else:
                yield from _cut(iter(lambda: handle.read(_CHUNK), ""), separator)
    except UnicodeDecodeError as error:
        raise CorruptDataError(f"{file} is not UTF-8 text ({error.reason}); `iconv -t utf-8` may convert it") from None


def _cut(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """What lies between separators, whose line breaks are `\\n` or `\\r\\n`, in time that grows with the text alone."""
    pattern = re.compile(re.escape(separator).replace("\\\n", "\r?\n"))
    overlap = len(separator) + separator.count("\n") - 1
    parts: list[str] = []
    rest = ""
    for chunk in chunks:
        *whole, last = pattern.split(rest + chunk)
        for text in whole:
            yield "".join([*parts, text])
            parts.clear()
        # Only in the last characters can a separator begin that ends in the next chunk.
        done = max(0, len(last) - overlap)
        parts.append(last[:done])
        rest = last[done:]
    yield "".join([*parts, rest])


def _json_documents(file: Path, json_key: str) -> Iterator[str]:
    with file.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line, object_pairs_hook=unique_keys)
            except (ValueError, RecursionError) as error:
                raise CorruptDataError(f"{file}:{number}: not a JSON object a line: {error}") from None
            text = entry.get(json_key) if isinstance(entry, dict) else None
            if not isinstance(text, str):
                held = f"its keys are {', '.join(entry)}" if isinstance(entry, dict) else "it is no object"
                raise CorruptDataError(f"{file}:{number}: no text under {json_key!r}; {held}; see --json-key")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise CorruptDataError(
                    f"{file}:{number}: half of a surrogate pair, which is no character, at character {error.start} of "
                    f"the text under {json_key!r}"
                ) from None
            yield text
