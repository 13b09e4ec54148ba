"""Documents to a shuffled `.bin`/`.idx` pair that is whole or absent."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data.indexed_dataset import IndexedDataset, IndexedDatasetWriter
from data.metadata import Metadata
from data.permutation import KeyedPermutation, derive_key
from data.tokenizer import Tokenizer, load_tokenizer
from data.vocabulary import JSON_SUFFIX, is_tokenizer_file, tokenizer_files
from runtime.errors import CorruptDataError
from runtime.files import publish, sha256_of, temporary_directory, write_whole

_BATCH_CHARACTERS = 1 << 22
_TEMPORARY = r"\.{}(\.(bin|idx|meta\.json|tiktoken|tokenizer\.json|tokenizer_config\.json))?\.[0-9a-f]{{12}}\.tmp"
"""What a preparation makes beside its output, whose name is to be filled in, and removes at its end."""


@dataclass(frozen=True)
class Prepared:
    """What a preparation wrote."""

    metadata: Metadata
    skipped: int
    """Documents without text."""


def left_behind(output_prefix: Path) -> dict[Path, float]:
    """What preparations that were killed have left beside the output, or one that runs now needs, each with the time at
    which it was last written to, in seconds since the epoch."""
    name = re.compile(_TEMPORARY.format(re.escape(output_prefix.name)))
    found = {}
    for path in output_prefix.parent.glob(".*.tmp"):
        if name.fullmatch(path.name):
            with suppress(FileNotFoundError):  # of one that ends now
                found[path] = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
    return found


def prepare_documents(
    documents: Iterable[str],
    output_prefix: Path,
    tokenizer_name: str,
    seed: int,
    report: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenises documents, each ended by an end-of-document token, and shuffles them by `seed` into
    `<output_prefix>.bin`, `.idx` and `.meta.json`.

    The tokens of one batch of documents are in memory, never all. `report` hears the documents and tokens so far.
    Raises TokenizerError, CorruptDataError where no document has text, and what reading `documents` raises.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    with temporary_directory(beside=output_prefix) as folder:
        skipped = _tokenize(documents, tokenizer, folder / "unshuffled", report)
        unshuffled = IndexedDataset(folder / "unshuffled")
        if not unshuffled.num_documents:
            raise CorruptDataError(f"no text in any of {skipped} documents: nothing to prepare")
        _shuffle(unshuffled, folder / "shuffled", tokenizer.vocab_size, seed)
        metadata = _publish(folder, output_prefix, tokenizer, unshuffled, seed)
    return Prepared(metadata, skipped)


def _tokenize(
    documents: Iterable[str], tokenizer: Tokenizer, prefix: Path, report: Callable[[int, int], None] | None
) -> int:
    skipped = written = tokens = 0
    with IndexedDatasetWriter(prefix, tokenizer.vocab_size) as writer:
        for batch in _batches(documents):
            texts = [text for text in batch if text.strip()]
            skipped += len(batch) - len(texts)
            for ids in tokenizer.encode_batch(texts):
                writer.add_document([*ids, tokenizer.end_of_document])
                tokens += len(ids) + 1
            written += len(texts)
            if report is not None:
                report(written, tokens)
    return skipped


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text) + 1
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _shuffle(unshuffled: IndexedDataset, prefix: Path, vocab_size: int, seed: int) -> None:
    starts = unshuffled.document_starts
    order = KeyedPermutation(unshuffled.num_documents, derive_key(seed))
    with IndexedDatasetWriter(prefix, vocab_size) as writer:
        for place in range(unshuffled.num_documents):
            document = order(place)
            writer.add_document(unshuffled.tokens(int(starts[document]), int(starts[document + 1])))


def _publish(folder: Path, prefix: Path, tokenizer: Tokenizer, counted: IndexedDataset, seed: int) -> Metadata:
    """Moves everything to its name, the `.idx` last: without it nothing counts as prepared."""
    staged = folder / "shuffled"
    tokenizer_name, digest = tokenizer.name, None
    kept: dict[Path, bytes] = {}
    if is_tokenizer_file(tokenizer.name):
        # the data must be able to move together with its tokenizer
        stem = f"{prefix}.tokenizer" if tokenizer.name.endswith(JSON_SUFFIX) else str(prefix)
        kept = {Path(stem + ending): content for ending, content in tokenizer_files(tokenizer.name).items()}
        copy = next(iter(kept))
        tokenizer_name, digest = copy.name, hashlib.sha256(kept[copy]).hexdigest()
    metadata = Metadata(
        tokenizer=tokenizer_name,
        vocab_size=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        documents=counted.num_documents,
        tokens=counted.total_tokens,
        seed=seed,
        sha256={suffix: sha256_of(Path(f"{staged}.{suffix}")) for suffix in ("bin", "idx")},
        tokenizer_sha256=digest,
    )
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    for path, content in kept.items():
        write_whole(path, content)
    metadata.write(prefix)
    for suffix in ("bin", "idx"):
        publish(Path(f"{staged}.{suffix}"), Path(f"{prefix}.{suffix}"))
    return metadata
