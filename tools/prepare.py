"""`kilotron prepare`: text files and JSON lines to a shuffled `.bin`/`.idx` pair."""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from tools.inputs import add_input_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron prepare`."""
    add_input_arguments(parser)
    parser.add_argument("--output", required=True, metavar="PREFIX", help="where PREFIX.bin, .idx and .meta.json go")
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="bytes, gpt2, cl100k_base, o200k_base, a .tiktoken file or a tokenizer.json",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the order of the documents (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Prepares the data and says what it wrote. Raises DataPathError, TokenizerError or CorruptDataError."""
    from data.documents import read_documents
    from data.preparation import left_behind, prepare_documents
    from runtime.files import naming

    documents = read_documents(arguments.inputs, arguments.json_key, arguments.document_separator)
    output = Path(arguments.output)
    for path, written in left_behind(output).items():
        last = datetime.fromtimestamp(written).isoformat(" ", "seconds")
        print(
            f"{path} is of a preparation that runs now or was killed, and was last written to at {last}; remove it in "
            f"the latter case",
            file=sys.stderr,
        )
    with naming(output):
        prepared = prepare_documents(documents, output, arguments.tokenizer, arguments.seed, _show_progress)
    metadata = prepared.metadata
    skipped = f" ({prepared.skipped:,} without text skipped)" if prepared.skipped else ""
    print(
        f"wrote {arguments.output}.bin, .idx and .meta.json: {metadata.documents:,} documents{skipped}, "
        f"{metadata.tokens:,} tokens, vocabulary of {metadata.vocab_size:,}"
    )
    if metadata.documents < 3:
        print("few documents: there are none for a validation split; --document-separator cuts a text into several")
    print(f"next: python pretrain_gpt.py name=my_run data=files data.path={arguments.output}")
    return 0


def _show_progress(documents: int, tokens: int) -> None:
    if sys.stderr.isatty():
        print(f"{documents:,} documents, {tokens:,} tokens", end="\r", file=sys.stderr, flush=True)
