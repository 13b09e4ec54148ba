"""Python's garbage collection at steps that all ranks share, instead of on each rank when it pleases."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collection_every(interval: int) -> Iterator[Callable[[int], None]]:
    """Turn automatic collection off for as long as the context lasts; call what it yields after each step.

    A rank that stops to look for cycles lets all others wait, so all look at once, every `interval` steps. What the
    first step leaves behind (modules, compiled code) stays for good and is never looked at again, which makes looking
    cheap. An interval of 0 changes nothing.
    """
    if interval == 0:
        yield lambda _: None
        return
    enabled, settled = gc.isenabled(), False

    def collect(step: int) -> None:
        nonlocal settled
        if step % interval == 0 or not settled:
            gc.collect()
        if not settled:
            gc.freeze()
            settled = True

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
