"""The cost of a sequence by its length: FLOPs and seconds of reading it, seconds of the next token, bytes of state."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from archs.language_model import LanguageModel
from archs.visibility import CAUSAL
from experiments.findings import Estimate, Verdict
from experiments.harness.identity import run_of
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS, tick_values
from experiments.studies.study import Cell, Compose, Study, check_named

Found = TypeVar("Found")
DECODED = 16  # tokens that are timed one by one
PANELS = {
    "flops": "FLOPs per token read",
    "seconds": "seconds to read the sequence",
    "next_seconds": "seconds of the next token",
    "state_bytes_then": "bytes of state",
}
COMPARED = ("flops", "seconds", "next_seconds")


@dataclass(frozen=True)
class CostByLength(Study):
    """Times models that were trained for a moment, since weights do not matter here.

    arms: name -> overrides. quadratic, linear: those whose time is claimed to grow with the square of the length, and
    with the length. lengths: that are timed, in tokens, the slope being that over the last `last` of them. counted:
    further lengths, whose FLOPs are counted alone. repeats: timings of each. between: the slope above which growth is
    no longer linear, and that above which it is quadratic.
    """

    arms: dict[str, list[str]]
    quadratic: list[str]
    linear: list[str]
    lengths: list[int]
    last: int
    counted: list[int]
    repeats: int
    between: list[float]

    def cells(self, compose: Compose) -> Iterable[Cell]:
        """
        Raises:
            ValueError: for an arm that there is none of.
        """
        check_named("judges", (*self.quadratic, *self.linear), self.arms)
        for name, overrides in self.arms.items():
            config = compose(overrides)
            config.session.arm = name
            yield Cell({"arm": name}, run_of(config))

    @torch.no_grad()
    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per length and repeat, on one thread, since attention shares itself out better than a scan does; one
        per length whose FLOPs alone are counted."""
        model, threads = finished.model.eval(), torch.get_num_threads()
        torch.set_num_threads(1)
        rows = [{"length": T, "flops": model.flops(T, CAUSAL) / T} for T in self.counted]
        for T in self.lengths:
            read(model, T)  # what is made once
            for repeat in range(self.repeats):
                seconds, next_seconds, state_bytes = read(model, T)
                found = {"seconds": seconds, "next_seconds": next_seconds, "state_bytes_then": state_bytes}
                rows.append({"length": T, "flops": model.flops(T, CAUSAL) / T, "repeat": repeat} | found)
        torch.set_num_threads(threads)
        return rows

    def figure(self, table: pd.DataFrame) -> Figure:
        """Each cost against the length, arm by arm."""
        canvas = Figure(figsize=(4 * len(PANELS), 4.2), layout="constrained")
        panels = canvas.subplots(1, len(PANELS))
        for axes, (column, title) in zip(panels, PANELS.items(), strict=True):
            for i, name in enumerate(self.arms):
                own = table[table.arm == name].groupby("length")[column].min().dropna()
                axes.plot(own.index, own, color=COLOURS[i], marker=MARKERS[i], ms=4, label=name.replace("_", " "))
            axes.set_xscale("log", base=2)
            axes.set(yscale="log", title=title, xlabel="tokens")
            tick_values(axes)
            axes.grid(alpha=0.3)
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(self.arms))
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        slopes = {name: self.slope(table[table.arm == name]) for name in (*self.quadratic, *self.linear)}
        steep, flat = self.between[1], self.between[0]
        outcome = "cannot tell"
        if all(slopes[name].low > steep for name in self.quadratic) and all(slopes[n].high < flat for n in self.linear):
            outcome = "holds"
        elif any(slopes[name].high < steep for name in self.quadratic) or any(
            slopes[n].low > flat for n in self.linear
        ):
            outcome = "does not hold"
        said = ", ".join(f"{name} {slope:.2f}" for name, slope in slopes.items())
        first = self.quadratic[0]
        cheaper = "; ".join(
            f"{name} {', '.join(crossing(table, first, name, column) for column in COMPARED)}"
            for name in self.arms
            if name != first
        )
        sentence = (
            f"ln seconds of reading over ln tokens, from {self.lengths[-self.last]:,} to {self.lengths[-1]:,} tokens: "
            f"{said}. Tokens from which on it is cheaper than {first} by FLOPs of reading, by seconds of it and by "
            f"those of the next token: {cheaper}."
        )
        return Verdict(outcome, sentence, slopes[first], self.rule)

    def slope(self, rows: pd.DataFrame) -> Estimate:
        """Return the slope of ln seconds in ln tokens over the longest of the lengths timed, with the interval over
        repeats."""
        times = rows.dropna(subset="seconds").pivot(index="length", columns="repeat", values="seconds")
        times = times.sort_index().tail(self.last)
        logs = np.log(times.to_numpy(float))
        return Estimate.of_mean(np.polyfit(np.log(times.index.to_numpy(float)), logs, 1)[0])


def read(model: LanguageModel, T: int) -> tuple[float, float, int]:
    """Return the seconds of reading T tokens and, in the median, of one more, and the bytes of state after them."""
    tokens_1T = torch.zeros(1, T, dtype=torch.long)
    (_, states), seconds = timed(lambda: model.extend(tokens_1T, model.empty_states(1)))
    state_bytes, steps = sum(state.nbytes for state in states), []
    for _ in range(DECODED):
        (_, states), took = timed(lambda: model.extend(tokens_1T[:, :1], states))  # noqa: B023
        steps.append(took)
    return seconds, float(np.median(steps)), state_bytes


def timed(call: Callable[[], Found]) -> tuple[Found, float]:
    """Return what a call returns, and the seconds that it took."""
    start = time.perf_counter()
    found = call()
    return found, time.perf_counter() - start


def crossing(table: pd.DataFrame, first: str, other: str, column: str) -> str:
    """Return the shortest length from which on the other arm is below the first in a column, in words."""
    costs = table.pivot_table(index="length", columns="arm", values=column, aggfunc="min").dropna()
    below = (costs[other] < costs[first]).sort_index(ascending=False).cumprod()
    lengths = below.index[below.astype(bool)]
    return f"{lengths.min():,}" if len(lengths) else "none"
