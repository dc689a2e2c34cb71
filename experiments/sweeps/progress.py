"""The progress of a sweep: watched from the sweep's folder, because the launcher may run anywhere."""

import threading
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from experiments.harness import ledger
from experiments.scaling.design import Cell


class Progress:
    """Shows cells done, running and left and the time to go, while the body of the `with` runs.

    On a terminal one line is kept up to date; elsewhere a line is printed whenever a cell has ended.
    """

    def __init__(self, console: Console, title: str, folder: Path, missing: dict[str, Cell], done: int):
        self.console, self.title, self.folder, self.missing = console, title, folder, missing
        self.earlier, self.started = done, time.monotonic()
        self.before = self._rows()

    def __enter__(self) -> "Progress":
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error) -> None:
        self.over.set()
        self.thread.join()

    def _rows(self) -> dict[str, tuple[str, str]]:
        """Status and time of ending of each missing cell that has a row; a failed one is run again."""
        rows = ledger.read(self.folder / "ledger.jsonl")
        return {row.id: (str(row.status), str(row.finished)) for row in rows.itertuples() if row.id in self.missing}

    def line(self) -> tuple[int, str]:
        """Number of cells that have ended since the start, and the line that says so."""
        new = {cell: row for cell, row in self._rows().items() if row != self.before.get(cell)}
        ended = set(new)
        running = sum((self.folder / "cells" / cell / "running").exists() for cell in self.missing if cell not in ended)
        left = len(self.missing) - len(ended) - running
        elapsed = time.monotonic() - self.started
        bad = sum(status != "done" for status, _ in new.values())
        text = f"{self.title}: {self.earlier + len(ended)} done, {running} running, {left} left"
        text += f", {bad} failed or diverged" if bad else ""
        text += f", {duration(elapsed)} gone"
        if ended:
            spent = sum(self.missing[cell].flops for cell in ended)
            to_go = sum(cell.flops for cell in self.missing.values()) - spent
            text += f", about {duration(elapsed * to_go / spent)} to go"
        return len(ended), text

    def _watch(self) -> None:
        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=2) as live:
                while not self.over.wait(1):
                    live.update(Text(self.line()[1]))
                live.update(Text(self.line()[1]))
            return
        shown = -1
        while True:
            last = self.over.wait(2)
            ended, text = self.line()
            if ended != shown:
                self.console.print(text)
                shown = ended
            if last:
                return


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
