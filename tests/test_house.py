"""The house: who may import whom, first lines, lengths, and what no file may contain."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {"pretrain_gpt": 5, "tools": 5, "training": 4, "models": 3, "core": 2, "parallel": 1}
FOLDERS = ("tools", "training", "models", "core", "parallel", "data")
FORBIDDEN_CALLS = {"eval", "exec", "instantiate"}
SOURCES = sorted([ROOT / "pretrain_gpt.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_keeps_the_rules(source):
    place = source.relative_to(ROOT).parts[0].removesuffix(".py")
    text = source.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if source.name == "__init__.py":
        assert text == ""
        return
    assert ast.get_docstring(tree), "the first line says what the file is for"
    assert len(text.splitlines()) <= 500
    for name in imported(tree):
        other = name.split(".")[0]
        if other in (*FLOORS, "data") and other != place:
            assert place != "data", f"data imports {name}"
            assert other == "data" or FLOORS[other] < FLOORS[place], f"{place} imports {name} from above"
        # between a caller and its own ranks alone, as multiprocessing does it, but tensors by value
        assert name != "pickle" or source.name == "local_ranks.py"
        assert not (place == "data" and other == "torch"), "data knows no torch"
        if source.name in ("config.py",):
            assert other not in ("torch", "numpy")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            plain = isinstance(node.func, ast.Name) or called == "instantiate"
            assert not (plain and called in FORBIDDEN_CALLS), f"line {node.lineno} calls {called}"
            assert ast.unparse(node.func) not in ("torch.load", "yaml.load", "pickle.load"), f"line {node.lineno}"
        if isinstance(node, ast.Global):
            raise AssertionError(f"line {node.lineno}: global state")


def lines_of_code(text):
    """Lines that hold code: no blank ones, comments or documentation, which nobody should save."""
    strings = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    documentation = {line for node in strings for line in range(node.lineno, node.end_lineno + 1)}
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in silent]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - documentation)


def test_a_line_of_code_is_neither_blank_nor_said_about_it():
    assert lines_of_code('"""What for."""\n\n# why\nx = [\n    1,\n]\n"""What x is."""\n') == 3


def test_the_source_stays_within_its_budget():
    assert sum(lines_of_code(source.read_text(encoding="utf-8")) for source in SOURCES) < 10_000


def test_every_document_that_is_linked_is_there():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links {target}"
