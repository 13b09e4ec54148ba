"""The help page: every field has a docstring, and the page is one that fits a terminal."""

import re
import shlex
from pathlib import Path

import pretrain_gpt
from settings.compose import compose, compose_sweep
from settings.help_page import (
    EXAMPLES,
    KEYS_THAT_MATTER,
    SETTINGS_PAGE_COMMAND,
    field_docs,
    help_page,
    settings_page,
)
from settings.keys import presets, setting_types


def test_every_key_has_a_docstring_that_is_a_sentence():
    docs = field_docs()
    assert set(docs) == set(setting_types())
    assert [key for key, text in docs.items() if not text.strip().endswith(".")] == []


def test_the_page_shows_presets_keys_with_their_docs_and_defaults():
    page = help_page()
    assert all(f"{group}={name}" in page for group, names in presets().items() for name in names)
    assert "* model=tiny" in page
    assert "  model=gpt2_small" in page
    assert all(f"  {key} " in page for key in KEYS_THAT_MATTER)
    assert "Optimizer steps of the run; raising it continues a finished run. [100]" in page
    assert all(word in page for word in ("Examples", "--cfg job", "check=true world_size=N"))


def test_the_page_fits_a_terminal():
    lines = help_page().splitlines()
    assert len(lines) <= 75
    assert [line for line in lines if len(line) > 100] == []


def test_the_examples_compose():
    for _, command in EXAMPLES:
        words = shlex.split(command.replace("\\\n", " "))
        overrides = [word for word in words[words.index("pretrain_gpt.py") + 1 :] if word != "-m"]
        runs = compose_sweep(overrides) if "-m" in words else [overrides]
        assert [compose(run).name for run in runs]


def test_the_page_of_settings_is_current():
    page = Path(pretrain_gpt.__file__).parent / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page(), f"make it anew: {SETTINGS_PAGE_COMMAND}"


def test_the_page_of_settings_has_every_key_once():
    keys = re.findall(r"^\| `([\w.]+)` \|", settings_page(), re.MULTILINE)
    assert sorted(keys) == sorted(setting_types())
