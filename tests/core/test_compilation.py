"""Whether a compiler is there is known before it is asked, and one that fails costs a warning."""

import functools

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

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


def fail_with(monkeypatch, *errors):
    """Let what is compiled raise these errors in turn, each raised from the one before, and then work."""
    waiting = list(errors)

    def compiled(*arguments):
        if waiting:
            raise waiting.pop(0)
        return double(*arguments)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: compiled)


@pytest.mark.parametrize("wrapped", [False, True])
def test_too_little_memory_stays_an_error_and_the_function_stays_compiled(monkeypatch, wrapped):
    """Uncompiled it would need more memory, in this call and in all later ones."""
    error = torch.OutOfMemoryError("no 2.00 GiB")
    if wrapped:
        error, cause = RuntimeError("the backend failed"), error
        error.__cause__ = cause
    fail_with(monkeypatch, error)
    function = CompiledFunction(double)
    with pytest.raises(torch.OutOfMemoryError, match=r"no 2\.00 GiB"):
        function(torch.ones(3))
    assert function(torch.ones(3)).tolist() == [2, 2, 2]
    assert function._compiled is not double


def test_what_fails_once_it_has_worked_is_an_error_unless_it_is_the_compilers(monkeypatch):
    function = CompiledFunction(double)
    fail_with(monkeypatch)
    function(torch.ones(3))
    fail_with(
        monkeypatch, RuntimeError("the device is gone"), BackendCompilerFailed(double, ValueError("no kernel"), None)
    )
    function._compiled = torch.compile(double)
    with pytest.raises(RuntimeError, match="the device is gone"):
        function(torch.ones(3))
    with pytest.warns(UserWarning, match="double is not compiled: BackendCompilerFailed"):
        assert function(torch.ones(3)).tolist() == [2, 2, 2]


def test_a_function_of_too_many_shapes_is_not_left_uncompiled_without_a_word(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    function = CompiledFunction(double)
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in (2, 3):
            assert function(torch.ones(size)).tolist() == [2] * size
        with pytest.warns(UserWarning, match="double is not compiled: FailOnRecompileLimitHit"):
            assert function(torch.ones(4)).tolist() == [2] * 4


def test_a_function_is_compiled_once_and_then_used(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or (lambda x: 3 * x))
    function = CompiledFunction(double)
    assert [function(torch.ones(1)).item() for _ in range(3)] == [3, 3, 3]
    assert compiled == [double]
