"""The reason why a run has failed: a line for its row, and the whole of it in a file beside it."""

import traceback
from pathlib import Path

from experiments.harness.files import write_atomically

LOG = "failure.log"  # in the run's folder
LONGEST = 300  # characters of a reason in a row


def keep(error: Exception, folder: Path, root: Path) -> str:
    """Write the traceback into the run's folder; return a line that says what went wrong and, from the ledger's folder
    `root` on, where the rest of it is."""
    reason = shortened(f"{type(error).__name__}: {first_telling_line(error)}".rstrip(": "))
    try:
        write_atomically(folder / LOG, "".join(traceback.format_exception(error)))
    except OSError:
        return reason  # a full disk, perhaps, which may be what went wrong
    return f"{reason} (all of it in {(folder / LOG).relative_to(root)})"


def forget(folder: Path) -> None:
    """Remove what an earlier try has left."""
    (folder / LOG).unlink(missing_ok=True)


def shortened(reason: str) -> str:
    """Returns a reason as a row has it."""
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST]}..."


def first_telling_line(error: BaseException) -> str:
    """Returns the first line of what an error says that is no mere heading; "" where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.endswith(":")), lines[0] if lines else "")
