"""The embedded corpus: the documentation inside the running Python, prepared on first use."""

import ast
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from data.config import DataConfig
from data.locations import sample_prefix
from data.preparation import prepare_documents
from data.tokenizer import save_tiktoken, train_tokenizer
from runtime.errors import DataPathError
from runtime.files import temporary_directory

_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST_DOCSTRING = 40
_SEED = 0


def prepare_sample(config: DataConfig, out_dir: str) -> str:
    """Prepares the corpus where it is absent and returns its prefix. Several processes may race: all end well.

    Raises DataPathError where this Python carries no documentation, TokenizerError where the tokenizer fails.
    """
    prefix = Path(sample_prefix(config, out_dir))
    if Path(f"{prefix}.idx").exists():
        return str(prefix)
    documents = list(sample_documents())
    if not documents:
        raise DataPathError("this Python carries no documentation to train on; use data.path instead of data=sample")
    with temporary_directory(beside=prefix.parent) as folder:
        staged = folder / "prepared" / prefix.name
        staged.parent.mkdir()
        tokenizer = config.tokenizer
        if tokenizer is None:
            tokenizer = f"{staged}.tiktoken"
            save_tiktoken(Path(tokenizer), train_tokenizer(documents, config.corpus_vocab_size))
        prepare_documents(documents, staged, tokenizer, _SEED)
        try:
            staged.parent.rename(prefix.parent)
        except OSError:
            # another process was first; its corpus is the same
            if not Path(f"{prefix}.idx").exists():
                raise
    return str(prefix)


def sample_documents() -> Iterator[str]:
    """About 2 MB of English: the docstrings of each module of the standard library, and each help topic."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(library).parts):
            text = "\n\n".join(_docstrings(path))
            if text:
                yield text
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(text) >= _SHORTEST_DOCSTRING:
                yield text
