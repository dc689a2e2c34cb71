"""The progress of a sweep: watched from the sweep's folder, because the launcher may run anywhere.

Shape letters: B sequences, T tokens.
"""

import threading
import time
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from experiments.harness import ledger
from experiments.harness.assembly import build_model, spend
from experiments.scaling.design import Cell
from experiments.sweeps.plan import Arm
from objectives.contracts import Batch


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


def estimate_seconds(arms: dict[str, Arm], cells: list[Cell], rows: pd.DataFrame) -> dict[str, float]:
    """Seconds per FLOP for each arm: from its finished runs, or else from a few steps of its middle-sized cell."""
    rates = {}
    for name, arm in arms.items():
        known = rows[(rows.arm == name) & (rows.status == "done")]
        if len(known):
            rates[name] = known.wall_seconds.sum() / known.flops.sum()
            continue
        mine = sorted((cell for cell in cells if cell.arm == name), key=lambda cell: cell.params)
        middle = mine[len(mine) // 2]
        config, measured = arm.configure(middle), arm.measure(middle.width)
        allocation, objective = spend(config, arm.data, measured), measured.objective
        model = build_model(config, objective)
        size = allocation.first_sequence(1)
        batch = Batch.of(torch.zeros(size, allocation.sequence_length, dtype=torch.long))
        times = []
        for _ in range(4):
            start = time.perf_counter()
            objective.loss(model, batch, torch.Generator().manual_seed(0)).backward()
            times.append(time.perf_counter() - start)
        rates[name] = min(times) / (allocation.flops_per_token * batch.tokens_BT.numel())
    return rates
