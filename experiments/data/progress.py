"""The progress of preparing a corpus, on stderr."""

import sys
import time
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

SECONDS = 10.0  # between lines, where none can be kept up to date


def watched(documents: Iterable[bytes], doing: str, total: int | None = None) -> Iterator[bytes]:
    """Yield documents, and show how many bytes of them are through, of `total` where that is known."""
    console = Console(file=sys.stderr)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    done, said = 0, time.monotonic()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(doing, total=total)
        for document in documents:
            yield document
            done += len(document)
            bar.advance(task, len(document))
            if not console.is_terminal and time.monotonic() > said + SECONDS:
                said = time.monotonic()
                console.print(f"{doing}: {done / 1e6:.0f} MB{f' of {total / 1e6:.0f}' if total else ''}")
