"""Whether a compiler is there is known before it is asked, and one that fails costs a warning."""

import pytest
import torch

from core import compilation
from core.compilation import CompiledFunction, missing_compiler


@pytest.fixture(autouse=True)
def afresh():
    missing_compiler.cache_clear()
    yield
    missing_compiler.cache_clear()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation, "find_spec", lambda _: None)
    assert missing_compiler("cuda") == "Python package triton"
    monkeypatch.setattr(compilation, "find_spec", lambda name: name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    missing_compiler.cache_clear()
    assert missing_compiler("cuda") == "compiler gcc or clang"
    monkeypatch.setattr(compilation.sys, "platform", "linux")
    assert missing_compiler("cpu") == "compiler g++"
    missing_compiler.cache_clear()
    monkeypatch.setenv("CXX", "my-compiler")
    assert missing_compiler("cpu") == "compiler my-compiler"
    (tmp_path / "my-compiler").touch(mode=0o755)
    missing_compiler.cache_clear()
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda _: str(tmp_path))
    assert "Python.h (of a package such as" in missing_compiler("cpu")
    (tmp_path / "Python.h").touch()
    missing_compiler.cache_clear()
    assert missing_compiler("cpu") is None


def double(x):
    return 2 * x


def test_a_compiler_that_fails_leaves_the_plain_function_with_a_warning(monkeypatch):
    def fails(function, **_):
        def compiled(*arguments):
            raise RuntimeError("no OpenMP\nand much more")

        return compiled

    monkeypatch.setattr(torch, "compile", fails)
    function = CompiledFunction(double)
    with pytest.warns(UserWarning, match="double is not compiled: RuntimeError: no OpenMP$"):
        assert function(torch.ones(3)).tolist() == [2, 2, 2]
    assert function(torch.ones(2)).tolist() == [2, 2]


def test_a_function_is_compiled_once_and_then_used(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or (lambda x: 3 * x))
    function = CompiledFunction(double)
    assert [function(torch.ones(1)).item() for _ in range(3)] == [3, 3, 3]
    assert compiled == [double]
