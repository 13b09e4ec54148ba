"""Where ranks meet before they connect, so that one that is missing or there twice is named rather than waited for."""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

Result = TypeVar("Result")
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.25
"""Seconds between two looks at the store: a tenth of the time that has passed, within these."""
SECONDS_FOR_RANK_ZERO = 10.0
"""How much longer than rank 0 the others wait, so that it says who has not come."""
SECONDS_TO_SPARE = 10.0
"""For what is still to be said then; only a store that does not answer takes longer."""
SECONDS_TO_ANSWER = 5.0
"""Within which a store that is there answers."""
TOGETHER = "together"
WRONG_SETTING, NO_ANSWER = 78, 76
"""Exit codes: of what the launcher sets wrongly, and where another rank does not come."""


class RendezvousError(Exception):
    """The ranks of a run did not come together."""

    def __init__(self, message: str, exit_code: int = NO_ANSWER, *, unheard: bool = False) -> None:
        """`unheard`: rank 0, which speaks for all ranks, cannot say this, so that this rank must."""
        super().__init__(message)
        self.exit_code = exit_code
        self.unheard = unheard


def meet(rank: int, world_size: int, timeout: timedelta, environment: Mapping[str, str], run: str = "") -> Store:
    """The store over which `world_size` ranks connect, once every one of them is there.

    It lies at MASTER_ADDR:MASTER_PORT and is kept by rank 0, or by torchrun. Ranks of another `run` at the same address
    are not met. Signals are seen all the while. Raises RendezvousError on every rank where a rank is there twice, where
    one has not come within `timeout`, or rank 0 goes; and on rank 0 where the port is another program's.
    """
    meeting = _Meeting(rank, world_size, timeout.total_seconds(), environment, run)
    try:
        return interruptible(meeting.hold, timeout.total_seconds() + SECONDS_FOR_RANK_ZERO + SECONDS_TO_SPARE)
    except TimeoutError:
        raise meeting.nobody_answers() from None
    finally:
        meeting.over.set()


def interruptible(action: Callable[[], Result], seconds: float) -> Result:
    """What `action` returns or raises, from a thread of its own: what waits in C++ sees no signal.

    Raises TimeoutError after `seconds`; the thread is left behind then, and ends with the process.
    """
    outcome: Future[Result] = Future()

    def act() -> None:
        try:
            outcome.set_result(action())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=act, name="meeting", daemon=True).start()
    return outcome.result(seconds)


class _Meeting:
    """One rank's part in coming together. The first verdict in the store counts for all ranks."""

    def __init__(self, rank: int, world_size: int, seconds: float, environment: Mapping[str, str], run: str) -> None:
        self._rank, self._world_size, self._seconds = rank, world_size, seconds
        self._deadline = time.monotonic() + seconds
        self._host, self._port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        self._with_libuv = environment.get("USE_LIBUV", "1") == "1"
        self._launcher_keeps_it = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # A launcher that restarts ranks keeps one store for all starts.
        start = environment.get("TORCHELASTIC_RUN_ID", ""), environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._prefix = "/".join(["kilotron", *start, run])
        self.over = threading.Event()
        """Nobody waits for the result any more."""

    def hold(self) -> Store:
        """Come, and wait for the others."""
        store = PrefixStore(self._prefix, self._open())
        try:
            self._come(store)
            self._wait(store)
            store.set_timeout(timedelta(seconds=self._seconds))
        except dist.DistError as error:
            raise RendezvousError(
                f"rank {self._rank} lost the store at {self._address}, which {self._keeper} keeps, while ranks came "
                f"together; the message of {self._keeper} says why ({_first_line(error)})"
            ) from error
        return PrefixStore("group", store)

    @property
    def _address(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def _keeper(self) -> str:
        return "torchrun" if self._launcher_keeps_it else "rank 0"

    def _open(self) -> Store:
        keeps_it = self._rank == 0 and not self._launcher_keeps_it
        try:
            return self._connect(keeps_it=keeps_it, seconds=max(1.0, self._deadline - time.monotonic()))
        except dist.DistError as error:
            if keeps_it and "EADDRINUSE" in str(error):
                self._refuse_the_port()
            raise self.nobody_answers(_first_line(error)) from error

    def _connect(self, *, keeps_it: bool, seconds: float) -> Store:
        return TCPStore(
            self._host,
            self._port,
            self._world_size,
            keeps_it,
            timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=self._with_libuv,
        )

    def _refuse_the_port(self) -> None:
        """Raise RendezvousError: somebody else listens at the port that rank 0 was given, perhaps another rank 0."""
        with suppress(dist.DistError, TimeoutError):
            connect = partial(self._connect, keeps_it=False, seconds=SECONDS_TO_ANSWER)
            store = PrefixStore(self._prefix, interruptible(connect, SECONDS_TO_ANSWER))
            if store.check([_key(0)]):
                self._come(store)
        raise RendezvousError(
            f"MASTER_PORT={self._port} is in use on {socket.gethostname()} by another program, perhaps another run; "
            "set MASTER_PORT to a free port, the same for all ranks of this run",
            WRONG_SETTING,
        )

    def nobody_answers(self, noticed: str = "") -> RendezvousError:
        """What to say where the store was not reached in time."""
        found = "nothing answers there"
        with suppress(OSError), socket.create_connection((self._host, self._port), timeout=SECONDS_TO_ANSWER):
            found = "what answers there is no store of this torch, but another program"
        return RendezvousError(
            f"rank {self._rank} on {socket.gethostname()} did not reach {self._keeper} at MASTER_ADDR:MASTER_PORT = "
            f"{self._address} {self._within}: {found}; start every rank, and give all of them the address of rank 0's "
            f"host and a port that is free there{f' ({noticed})' if noticed else ''}",
            unheard=True,
        )

    @property
    def _within(self) -> str:
        return f"within {self._seconds / 60:.3g} minutes (parallel.startup_minutes)"

    def _come(self, store: Store) -> None:
        """Say that this rank is there. Raises RendezvousError where another process has its number."""
        mark, who = secrets.token_hex(4), f"process {os.getpid()} on {socket.gethostname()}"
        there = store.compare_set(_key(self._rank), "", f"{mark} {who}").decode()
        if there != f"{mark} {who}":
            problem = (
                f"RANK={self._rank} is there twice: {there.partition(' ')[2]}, and {who}; each process of a run needs "
                f"a RANK of its own, from 0 to WORLD_SIZE - 1 = {self._world_size - 1}: look at what sets RANK on "
                "these hosts"
            )
            self._decide(store, WRONG_SETTING, problem)
            raise RendezvousError(problem, WRONG_SETTING, unheard=True)
        if store.add("came", 1) == self._world_size:
            self._decide(store, 0, TOGETHER)

    def _wait(self, store: Store) -> None:
        """Until there is a verdict. Raises RendezvousError where it is another than that all are together."""
        patience = 0.0 if self._rank == 0 else SECONDS_FOR_RANK_ZERO
        began = time.monotonic()
        while not store.check(["verdict"]):
            if time.monotonic() > self._deadline + patience:
                self._decide(store, NO_ANSWER, self._who_is_missing(store))
                break
            pause = min(max((time.monotonic() - began) / 10, SHORTEST_PAUSE), LONGEST_PAUSE)
            if self.over.wait(pause):
                return
        code, _, message = store.get("verdict").decode().partition(" ")
        if message != TOGETHER:
            if self._rank == 0 and not self._launcher_keeps_it:
                self.over.wait(2 * LONGEST_PAUSE)  # the store goes with this process, and the others read it first
            raise RendezvousError(message, int(code), unheard=not store.check([_key(0)]))

    def _decide(self, store: Store, code: int, message: str) -> None:
        store.compare_set("verdict", "", f"{code} {message}")

    def _who_is_missing(self, store: Store) -> str:
        missing = [rank for rank in range(self._world_size) if not store.check([_key(rank)])]
        named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        return (
            f"of {self._world_size} ranks {len(missing)} did not come to {self._address} {self._within}: RANK {named}; "
            "their own messages, or those of their hosts, say why; each needs a RANK of its own and the same run"
        )


def _key(rank: int) -> str:
    return f"rank_{rank}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
