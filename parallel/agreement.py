"""Work that ranks do together, and whose result or failure is the same on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from runtime.errors import RunDirectoryError, StorageError

Result = TypeVar("Result")


class RankZeroError(RuntimeError):
    """Rank 0 failed, in a way that is its own to tell, at what it did for all ranks."""


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error says that another rank failed, left or did not answer, rather than what went wrong here."""
    if isinstance(error, dist.DistError | RankZeroError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Let rank 0 alone act, and give every rank its result, or its error, so that all ranks go the same way.

    A collective call; the result travels, so it should be small. An error with an `exit_code` is raised alike on every
    rank; any other on rank 0 alone, and RankZeroError on the rest.
    """
    outcome: list[tuple[Result | None, Exception | None]] = [(None, None)]
    own_failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            own_failure = error
            # Exceptions of libraries may not survive the journey.
            travels = hasattr(error, "exit_code")
            outcome = [(None, error if travels else RankZeroError(f"{type(error).__name__}: {error}"))]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise own_failure or failure
    return cast(Result, result)


Found = TypeVar("Found")
Answer = TypeVar("Answer")


def run_on_all_ranks(
    action: Callable[[], Found],
    conclude: Callable[[list[Found]], list[Answer]],
    doing: str,
    group: dist.ProcessGroup | None = None,
) -> Answer:
    """Every rank acts, and rank 0 concludes from what all found what each of them gets back.

    Collective over `group`, of all ranks; None: the default one. Raises on every rank, where something fails on any:
    StorageError, of the kind that was raised, for storage; RunDirectoryError where the run directory is another job's
    by now; RuntimeError for anything else. `doing` begins its message.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    outcomes: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(_attempt(action, doing), outcomes, group=group)
    answers = None
    if outcomes is not None:
        # Storage first: a user can mend that.
        failures = sorted((error for _, error in outcomes if error), key=lambda error: isinstance(error, RuntimeError))
        if not failures:
            concluded, failure = _attempt(lambda: conclude([found for found, _ in outcomes]), doing)
            failures = [failure] if failure else []
        answers = [(None, failures[0])] * size if failures else [(each, None) for each in concluded or ()]
    received: list[Any] = [None]
    dist.scatter_object_list(received, answers, group=group)
    answer, failure = received[0]
    if failure is not None:
        raise failure
    return cast(Answer, answer)


def to_all(answer: Callable[[list[Found]], Answer]) -> Callable[[list[Found]], list[Answer]]:
    """A conclusion that is the same for every rank."""
    return lambda found: [answer(found)] * len(found)


def _attempt(action: Callable[[], Found], doing: str) -> tuple[Found | None, Exception | None]:
    """The action's result, or an error for all ranks to raise."""
    try:
        return action(), None
    except RunDirectoryError as error:
        return None, error
    except (OSError, StorageError) as error:
        kind = type(error) if isinstance(error, StorageError) else StorageError
        return None, kind(f"{doing}: rank {dist.get_rank()}: {error}")
    except Exception as error:
        return None, RuntimeError(f"{doing}: rank {dist.get_rank()}: {error!r}")
