"""A process that trains cells for a sweep, and is not to outlive it."""

import os
import time
from functools import cache
from multiprocessing import current_process
from threading import Thread

SECONDS = 1.0  # between looks at the sweep


class Died(Exception):
    """A cell's process ended without saying how: why, as far as can be known."""


class Preempted(Exception):
    """A cell was told to stop (SIGTERM), by a cluster that takes its machine away: it has written its checkpoint."""


@cache  # once in each process
def end_with_the_sweep() -> None:
    """End this process when the one that started it is gone, if it is a launcher's worker. What it was training goes on
    from its last checkpoint when the sweep is started again."""
    if current_process().name != "MainProcess":
        Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS)
    os._exit(1)
