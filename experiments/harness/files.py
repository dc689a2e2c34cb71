"""Files that are written whole or not at all, and locks."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLock

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk, and a quota that is used up
NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP)  # of network file systems; filelock itself sees to ENOSYS


def write_atomically(path: Path, text: str) -> None:
    """Replace a file whole: a reader, or a crash, never finds half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a file to write, and put it in the place of `path` once it is whole.

    Raises:
        OSError: as `room_for` does; `path` is then what it was before.
    """
    temporary = path.with_name(path.name + ".tmp")
    with room_for(temporary):
        yield temporary
        os.replace(temporary, path)


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Remove a file, or a folder of shards, that cannot be written to its end.

    Raises:
        OSError: where the disk is full, saying so.
    """
    try:
        yield
    except Exception as error:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        # safetensors has an error of its own for it.
        if getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error):
            raise full(path) from error
        raise


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock against other processes, here and on machines that share the file system: by flock, or where the file
    system has none by a file that is there as long as the lock is held, which a machine that dies leaves behind.

    Raises:
        filelock.Timeout: after so many seconds, if they are not below 0.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        lock = SoftFileLock(f"{path}.held")
        lock.acquire(timeout)
    try:
        yield
    finally:
        lock.release()


def full(path: Path) -> OSError:
    """Returns the error of a disk without room for a file."""
    return OSError(errno.ENOSPC, "disk full: free some and start again, what is finished is kept", str(path))
