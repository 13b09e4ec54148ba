"""`make gpu` gathers what a machine without a package index lacks, and no more than that."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ON_THE_MACHINE = ("yaml", "_yaml", "packaging", "numpy", "numpy.libs", "tiktoken", "tokenizers", "regex", "requests")
"""Packages that every machine with torch and transformers has, as far as composing a configuration needs them."""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "packages"
    # Whatever environment this is, it is not to be set up again.
    words = ["-o", f"{sys.prefix}/.run", "gpu", f"VENV={sys.prefix}", f"SITE={folder}"]
    said = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return folder, said


def alone(code, *paths, cwd):
    """What a Python prints that finds nothing but its own library and the given folders."""
    search = f"import sys; sys.path[:0] = {[str(path) for path in paths]}; {code}"
    command = [sys.executable, "-I", "-S", "-c", search]
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_what_is_gathered_is_small_and_can_be_imported_from_anywhere(site, tmp_path):
    folder, _ = site
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 10e6
    machine = tmp_path / "machine"
    machine.mkdir()
    for name in ("yaml", "_yaml", "packaging"):
        (machine / name).symlink_to(Path(sysconfig.get_path("purelib"), name))
    places = alone(
        "import hydra, omegaconf, antlr4; print(hydra.__file__, omegaconf.__file__, antlr4.__file__)",
        folder,
        machine,
        cwd=tmp_path,
    )
    assert places.count(str(folder)) == 3


def test_a_configuration_is_composed_with_it(site, tmp_path):
    folder, _ = site
    machine = tmp_path / "machine"
    machine.mkdir()
    for name in ON_THE_MACHINE:
        if (package := Path(sysconfig.get_path("purelib"), name)).exists():
            (machine / name).symlink_to(package)
    code = "from settings.compose import compose; print(compose(['model=gpt2_small']).model.vocab_size)"
    assert alone(code, ROOT, folder, machine, cwd=tmp_path) == "50257\n"


def test_the_commands_are_said_with_it(site):
    folder, said = site
    commands = [line for line in said.splitlines() if line.startswith(f"PYTHONPATH={folder} python3 -m ")]
    assert len(commands) == 5
    assert "pytest tests/test_gpu.py" in commands[1]
