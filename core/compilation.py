"""Whether torch.compile can work on this machine, and functions that are compiled where it can."""

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@cache
def missing_compiler(device_type: str) -> str | None:
    """What torch.compile lacks here to make code for a kind of device, in words; None where it has all."""
    if device_type == "cuda" and find_spec("triton") is None:
        return "Python package triton"
    compilers = ["clang++" if sys.platform == "darwin" else "g++"] if device_type == "cpu" else ["gcc", "clang"]
    named = os.environ.get("CXX" if device_type == "cpu" else "CC")
    compilers = [named] if named else compilers
    if not any(map(shutil.which, compilers)):
        return f"compiler {' or '.join(compilers)}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"header {header} (of a package such as python3-dev)"


class CompiledFunction:
    """A function of tensors that is compiled at its first call, for each shape anew, or stays as it is if that fails.

    For what is compiled unasked: then a compiler that does not work costs a warning, not the run. To be called without
    a gradient.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        self._works = False

    def __call__(self, *arguments: Any) -> Any:
        """The function's result. Raises torch.OutOfMemoryError, which the plain function would not mend: it needs more
        memory."""
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=False)
        if self._compiled is self._function:
            return self._function(*arguments)
        try:
            # torch.compile would else run a function of too many shapes uncompiled, without a word.
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                result = self._compiled(*arguments)
        except Exception as error:
            for cause in _causes(error):
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            if self._works and not _is_of_the_compiler(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            name = self._function.__name__
            warnings.warn(f"{name} is not compiled: {type(error).__name__}: {reason}", stacklevel=2)
            self._compiled = self._function
            return self._function(*arguments)
        self._works = True
        return result


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # takes a second to import

    return isinstance(error, FailOnRecompileLimitHit | TorchDynamoException)
