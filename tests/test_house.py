"""The house: who may import whom, first lines, lengths, and what no file may contain."""

import ast
import builtins
import io
import re
import tokenize
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "tools": 8,
    **dict.fromkeys(("pretrain_gpt", "verification"), 7),
    "training": 6,
    **dict.fromkeys(("monitoring", "planning"), 5),
    "settings": 4,
    "models": 3,
    **dict.fromkeys(("core", "checkpoint"), 2),
    **dict.fromkeys(("parallel", "data"), 1),
    "runtime": 0,
}
"""A folder may import those of the floors below its own."""
FOLDERS = tuple(name for name in FLOORS if name != "pretrain_gpt")
WITHOUT_TORCH = ("data", "settings", "planning")
STUDIED = ("core", "models", "parallel", "data", "checkpoint")
"""What a reader studies; the other folders run it."""
PICKLES = r"_?pickle|cPickle|pickletools|cloudpickle|dill|jsonpickle|joblib|marshal|shelve|multiprocessing\.reduction"
RUNS_DATA = (
    rf"({PICKLES})(\..*)?",
    r"builtins\.(eval|exec|compile|__import__)",
    r"torch\.(load|save|package|hub|serialization|jit\.load|distributed\.checkpoint)(\..*)?",
    r"numpy\.load",
    # whose only loader that makes nothing but plain values is behind safe_load
    r"yaml\.((|full_|unsafe_)load(_all)?|.*Loader.*)",
    r"hydra\.utils\.(instantiate|call|get_\w+)",
    r"(.*\.)?(instantiate|allow_pickle|read_pickle|register_new_resolver|register_resolver)",
)
"""What can run code that stands in data: names as a file's imports resolve them, keywords, and words in quotes."""
SOURCES = sorted([ROOT / "pretrain_gpt.py", *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))])
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))


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
        if other in FLOORS and other != place:
            assert FLOORS[other] < FLOORS[place], f"{place} imports {name}, which lies on no floor below"
        assert not (place in WITHOUT_TORCH and other == "torch"), f"{place} knows no torch"
        if source.name in ("config.py",):
            assert other not in ("torch", "numpy")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
        if isinstance(node, ast.Global):
            raise AssertionError(f"line {node.lineno}: global state")


def runs_data(text):
    """(line, name) of all that a source says of what `RUNS_DATA` forbids, under whatever name it imports it."""
    tree, known, said = ast.parse(text), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                said.append((node.lineno, module + alias.name))
                if module or alias.asname:
                    known[alias.asname or alias.name] = module + alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            builtin = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and hasattr(builtins, first)
            said.append((node.lineno, ".".join([known.get(first, f"builtins.{first}" if builtin else first), *rest])))
        elif isinstance(node, ast.keyword):
            said.append((node.value.lineno, node.arg or ""))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            said.append((node.lineno, node.value))
    return [(line, name) for line, name in said if any(re.fullmatch(rule, name) for rule in RUNS_DATA)]


@pytest.mark.parametrize("source", [*SOURCES, *BENCHMARKS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_what_stands_in_data(source):
    assert runs_data(source.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        *(f"import {name}" for name in ("pickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")),
        *("import os, pickle as harmless", "from pickle import loads", "from pickle import Unpickler as U"),
        *("import importlib\nimportlib.import_module('pickle')", "__import__('os')", "import torch.package"),
        *("from multiprocessing.reduction import ForkingPickler", "from multiprocessing import reduction"),
        *("import torch\ntorch.load(path, weights_only=True)", "import torch\ntorch.save(x, path)"),
        *("import torch as t\nread = t.load", "from torch import load as read", "from torch.serialization import load"),
        *(
            "import torch\ntorch.jit.load(path)",
            "import torch.distributed.checkpoint as dcp",
            "import joblib\njoblib.load(f)",
        ),
        *("import numpy as np\nnp.load(path)", "from numpy import load", "read(path, allow_pickle=True)"),
        *("read(path, **{'allow_pickle': True})", "import pandas as pd\npd.read_pickle(path)"),
        *(
            "eval(text)",
            "exec(text)",
            "compile(text, name, 'exec')",
            "run = eval",
            "import builtins\nbuiltins.exec(text)",
        ),
        *(
            "import yaml\nyaml.load(text)",
            "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
            "from yaml import load",
        ),
        *(
            "import yaml\nyaml.unsafe_load(text)",
            "import yaml\nyaml.full_load_all(text)",
            "from yaml import UnsafeLoader",
        ),
        *(
            "import hydra\nhydra.utils.instantiate(x)",
            "from hydra.utils import instantiate",
            "from hydra.utils import call",
        ),
        *("import hydra.utils\nhydra.utils.get_method(x)", "from hydra import utils\nutils.get_class(x)"),
        *("from omegaconf import OmegaConf\nOmegaConf.register_new_resolver('e', f)", "def f():\n    import pickle"),
    ],
)
def test_planted_code_from_data_is_found(planted):
    assert runs_data(planted)


@pytest.mark.parametrize(
    "harmless",
    [
        *("import torch\ntorch.compile(model)", "model.eval()", "import re\nre.compile(text)", "self.load(path)"),
        *(
            "import json\njson.load(file)",
            "import yaml\nyaml.safe_load(text)",
            "from safetensors.torch import load_file",
        ),
        *("'pickled weights are not read'", "import numpy as np\nnp.fromfile(path)", "compile: bool = True"),
    ],
)
def test_harmless_code_is_let_be(harmless):
    assert runs_data(harmless) == []


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
    lines = {"studied": 0, "runs it": 0}
    for source in SOURCES:
        kind = "studied" if source.relative_to(ROOT).parts[0] in STUDIED else "runs it"
        lines[kind] += lines_of_code(source.read_text(encoding="utf-8"))
    assert lines["studied"] < 8_000
    assert lines["runs it"] < 8_500


WORDS = ("held against", "in vain", "heeded", "pulse", "pulses", "culprit", "culprits", "spoilt", "twin", "twins")
WORDS += ("obstacle", "obstacles", "pass_by", "stages_a_rank", "_put_down")
"""Words of a dialect that readers had to learn first; CONTRIBUTING.md says what to write instead."""


def test_nothing_is_said_in_words_that_a_reader_has_to_learn():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for file in [*SOURCES, *BENCHMARKS, *pages]:
        text = " ".join(file.read_text(encoding="utf-8").split())
        said = re.findall(rf"(?<![\w])({'|'.join(WORDS)})(?![\w])", text, re.IGNORECASE)
        assert not said, f"{file.relative_to(ROOT)} says {said[0]}"


def test_every_document_that_is_linked_is_there():
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links {target}"


def test_what_ci_runs_is_there():
    """Targets of make, and folders of tests, that the workflow names."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    targets = re.findall(r"^([\w$()/.]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = [target.replace("$(VENV)", ".venv") for target in targets]
    for job in workflow["jobs"].values():
        commands = [step["run"] for step in job["steps"] if "run" in step]
        for target in re.findall(r"\bmake (\S+)", "\n".join(commands)):
            assert target in named
        matrix = job.get("strategy", {}).get("matrix", {})
        for paths in [*matrix.get("tests", []), *(each["tests"] for each in matrix.get("include", []))]:
            assert all((ROOT / path).exists() for path in paths.split())
