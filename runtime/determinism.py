"""`train.deterministic`: operations that give the same bits every time; those that cannot are refused by name."""

import re
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import torch

from runtime.cublas_workspace import CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES
from runtime.errors import NonDeterministicError


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Keeps this process to deterministic operations from now on; to be called before CUDA, NCCL and a compiler start.

    No setting needs to be refused: which samples are fed, what dropout drops, and in which order micro-batches and
    ranks are summed are functions of the configuration, and the clock enters none of them. Where a run stops may depend
    on it (`train.max_minutes`, a signal), but one that goes on has the numbers of one that was not stopped.
    """
    environment.setdefault(CUBLAS_WORKSPACE, DETERMINISTIC_WORKSPACES[0])
    # Of all that NCCL might choose from, what every collective has, and what no switch sums in an order of its own.
    environment.setdefault("NCCL_ALGO", "Ring")
    # torch.compile would else pick kernels, which round differently, by how fast each is at that moment. The compiler
    # reads the variable once, as it is imported; if it has been already, the call below sets it, for this thread alone.
    environment["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # takes time, helps debug
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def translate_nondeterminism_errors() -> Iterator[None]:
    """Raises NonDeterministicError for torch's own error about such an operation, wherever that was wrapped."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            found = re.search(r"(\S+) does not have a deterministic implementation", str(cause))
            if found and isinstance(cause, RuntimeError):
                raise NonDeterministicError(
                    f"train.deterministic=true, but {found[1]} has no deterministic implementation in torch "
                    f"{torch.__version__}; use train.deterministic=false, or a model or device that does without it"
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise
