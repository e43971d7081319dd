"""Python's garbage collector runs on all ranks at once, at a step of our choosing: a rank's pause is everybody's."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

#: Steps between collections.
EVERY = 100


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """What was made before is never looked at again, and the collector runs when `collect` lets it."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def collect(iteration: int) -> None:
    """Every so many steps, collect; all ranks call it after each step."""
    if iteration % EVERY == 0:
        gc.collect()
