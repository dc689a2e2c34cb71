"""Checkpoints of a run under way: two generations, each with its digest in its name, so that a torn one is known.

One is a file, or a folder of shards where the processes that share the run each write their part.
"""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from experiments.harness.files import room_for

log = logging.getLogger(__name__)
NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.ckpt")
KEPT = 2


def write(folder: Path, step: int, save: Callable[[Path], None]) -> None:
    """Write the checkpoint of a step, whole or not at all, and keep the last two. Processes that share a run call it
    together.

    Args:
        folder: of the run.
        save: writes what is to be kept into a file or a folder, and returns when every process has.
    """
    from experiments.harness import processes  # torch, for which a run that is found need not wait

    unfinished, first = folder / "unfinished.ckpt", processes.rank() == 0
    if first and unfinished.is_dir():
        shutil.rmtree(unfinished)  # shards of more processes than there are now would stay
    with room_for(unfinished):
        save(unfinished)
    if not first:
        return
    os.replace(unfinished, folder / f"step-{step:09d}-{_digest(unfinished)}.ckpt")
    for _, older in generations(folder)[KEPT:]:
        _remove(older)


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
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _digest(path: Path) -> str:
    """Returns the beginning of the SHA-256 of a file, or of the names and digests of the files of a folder."""
    if path.is_dir():
        inside = sorted((file.name, _digest(file)) for file in path.iterdir())
        return hashlib.sha256(repr(inside).encode()).hexdigest()[:16]
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
