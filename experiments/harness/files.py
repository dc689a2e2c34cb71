"""Files that are written whole or not at all."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk, and a quota that is used up


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
    """Remove a file that cannot be written to its end.

    Raises:
        OSError: where the disk is full, saying so.
    """
    try:
        yield
    except Exception as error:
        path.unlink(missing_ok=True)
        # safetensors has an error of its own for it.
        if getattr(error, "errno", None) in FULL or os.strerror(errno.ENOSPC) in str(error):
            raise full(path) from error
        raise


def full(path: Path) -> OSError:
    """Returns the error of a disk without room for a file."""
    return OSError(errno.ENOSPC, "disk full: free some and start again, what is finished is kept", str(path))
