"""Checkpoints of a run under way: two generations, each with its digest in its name, so that a torn one is known."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path

from experiments.harness.files import room_for

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.ckpt")
KEPT = 2


def write(folder: Path, step: int, save: Callable[[Path], None]) -> None:
    """Write the checkpoint of a step, whole or not at all, and keep the last two.

    Args:
        folder: of the run.
        save: writes what is to be kept into a file.
    """
    unfinished = folder / "unfinished.ckpt"
    with room_for(unfinished):
        save(unfinished)
    os.replace(unfinished, folder / f"step-{step:09d}-{_digest(unfinished)}.ckpt")
    for _, older in generations(folder)[KEPT:]:
        older.unlink()


def generations(folder: Path) -> list[tuple[int, Path]]:
    """Returns the steps and files of a run's checkpoints, the last first."""
    found = [(int(name[1]), path) for path in folder.glob("step-*.ckpt") if (name := NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def last_good(folder: Path) -> Path | None:
    """Returns the last checkpoint that holds what was written, or None where there is none. One that does not is named
    in a warning, and passed over."""
    for step, path in generations(folder):
        if path.stem.endswith(f"-{_digest(path)}"):
            return path
        log.warning(
            "the checkpoint of step %d is damaged: the one before it is taken, or the beginning (%s)", step, path
        )
    return None


def remove(folder: Path) -> None:
    """Remove the checkpoints of a run that is done."""
    for path in folder.glob("*.ckpt"):
        path.unlink()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
