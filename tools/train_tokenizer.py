"""`kilotron train-tokenizer`: a byte-level BPE out of text, saved as a `.tiktoken` file."""

import argparse
import shlex
from pathlib import Path

from tools.inputs import add_input_arguments

SMALLEST = 257
"""A token for each byte, and one that ends a document."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments of `kilotron train-tokenizer`."""
    add_input_arguments(parser)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens, end of document included")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.tiktoken", help="where the tokenizer goes")


def run(arguments: argparse.Namespace) -> int:
    """Trains and saves the tokenizer. Raises DataPathError, CorruptDataError or TokenizerError."""
    from data.documents import read_documents
    from data.tokenizer import save_tiktoken, train_tokenizer
    from data.vocabulary import TIKTOKEN_SUFFIX
    from runtime.errors import DataPathError, TokenizerError

    output: Path = arguments.output
    if output.suffix != TIKTOKEN_SUFFIX:
        raise DataPathError(
            f"--output={output} must end in {TIKTOKEN_SUFFIX}; try {output.with_suffix(TIKTOKEN_SUFFIX)}"
        )
    if arguments.vocab_size < SMALLEST:
        raise TokenizerError(
            f"--vocab-size={arguments.vocab_size} must be at least {SMALLEST}: 256 bytes, and the end of a document"
        )
    texts = read_documents(arguments.inputs, arguments.json_key, arguments.document_separator)
    tokens = train_tokenizer(texts, arguments.vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    save_tiktoken(output, tokens)
    print(f"wrote {output}: a vocabulary of {arguments.vocab_size:,}")
    options = ["--tokenizer", str(output), "--output", str(output.with_suffix(""))]
    if arguments.document_separator is not None:
        options += ["--document-separator", arguments.document_separator.replace("\n", r"\n")]
    print("next: kilotron prepare " + shlex.join([*map(str, arguments.inputs), *options]))
    return 0
