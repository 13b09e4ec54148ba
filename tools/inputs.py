"""The arguments by which a tool is given text."""

import argparse
from pathlib import Path


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `inputs`, `json_key` and `document_separator`, as `data.documents.read_documents` takes them."""
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="a text file (one document), a .jsonl file (one document a line), or a folder of .txt and .jsonl files",
    )
    parser.add_argument("--json-key", default="text", help="field that holds the text (default: %(default)s)")
    parser.add_argument(
        "--document-separator",
        type=_unescape,
        metavar="TEXT",
        help=r"cut text files into documents here; \n stands for a line break, \r\n too, so '\n\n' cuts at blank lines",
    )


def _unescape(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("an empty separator cuts nowhere; leave it out")
    return text.replace(r"\n", "\n")
