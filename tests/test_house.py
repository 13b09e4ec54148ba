"""The house: who may import whom, first lines, lengths, and what no file may contain."""

import ast
import re
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


def test_the_source_stays_within_its_budget():
    assert sum(len(source.read_text(encoding="utf-8").splitlines()) for source in SOURCES) < 10_000


def test_every_document_that_is_linked_is_there():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links {target}"
