"""Length extrapolation: trained in short windows and read in longer ones, with no training there (Press et al., arXiv
2108.12409)."""

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from archs.mixers.attention import Attention
from archs.positions import Rotary, Yarn
from experiments.findings import Verdict
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.ablation import Ablation, at_an_end, counted
from experiments.studies.by_position import at_length, bits_by_position
from experiments.studies.sides import on_their_sides
from experiments.studies.study import Cell

SHOWN_FROM = 16  # position in a window
YARN = "_yarn"  # behind the name of a variant


@dataclass(frozen=True)
class LengthExtrapolation(Ablation):
    """Tunes and trains each variant as an ablation does, and reads it in longer windows of the same held-out bytes.

    What is compared is not the loss but its growth, ln of the bits per byte in the longest windows over those in the
    windows of the training: `better` are the variants claimed to have less of it than `margin`, `than` those with more.

    lengths: of the longer windows, the longest last. stretched: the variants that are also read with rotary positions
    stretched by YaRN, by the ratio of the lengths, as a variant with `YARN` behind its name.
    """

    lengths: list[int]
    stretched: list[str]

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per length of windows, that of the training first: all bits per byte, and those of each range of
        positions. Nothing of the runs that tune."""
        if cell.labels["stage"] == "tune":
            return [{}]
        name, trained = cell.labels["variant"], finished.config.data.sequence_length
        rows = []
        for length in (trained, *self.lengths):
            rows.append({"variant": name, "length": length} | bits(at_length(finished, length)))
            if name in self.stretched:
                yarn = replace(finished, model=deepcopy(finished.model))
                for part in yarn.model.modules():
                    if isinstance(part, Attention) and isinstance(part.position, Rotary):
                        part.position = replace(part.position, scaling=Yarn(length / trained, trained))
                rows.append({"variant": name + YARN, "length": length} | bits(at_length(yarn, length)))
        return rows

    def figure(self, table: pd.DataFrame) -> Figure:
        """Bits per byte by position in the longest windows, and the growth of the loss by the length of windows."""
        canvas = Figure(figsize=(11.5, 4.8), layout="constrained")
        left, right = canvas.subplots(1, 2)
        runs, growth = counted(table), self.growth(table)
        ranges = [column for column in map(str, runs) if column.startswith("@") and int(column[1:]) >= SHOWN_FROM]
        for name in dict.fromkeys(runs.variant):
            i = list(self.variants).index(name.removesuffix(YARN)) % len(COLOURS)
            look = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 4, "label": name.replace("_", " ")}
            look["ls"] = "--" if name.endswith(YARN) else "-"
            at = runs[(runs.variant == name) & (runs.length == runs.length.max())][ranges].mean().dropna()
            left.plot([int(str(column)[1:]) for column in at.index], at, **look)
            by_length = 100 * growth[name].groupby("length").mean()
            right.plot(by_length.index, by_length, **look)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.axvline(runs.length.min(), color="grey", lw=0.8)
            axes.grid(alpha=0.3)
        self._label(left, right, runs.length.max())
        canvas.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return canvas

    def _label(self, left: Axes, right: Axes, longest: int) -> None:
        left.set(xlabel=f"position in windows of {longest:.0f}, from", ylabel="held-out bits per byte")
        right.axhline(100 * self.margin, color="grey", lw=0.8, ls=":")
        right.set(xlabel="tokens of a window", ylabel="growth of the loss, %")

    def growth(self, table: pd.DataFrame) -> pd.DataFrame:
        """ln of the bits per byte over those in the windows of the training: one row per length and seed, one column
        per variant."""
        bits_of = counted(table).pivot(index=["length", "seed"], columns="variant", values="bits")
        trained = bits_of.loc[bits_of.index.get_level_values("length").min()]
        return np.log(bits_of / trained.reindex(bits_of.index, level="seed"))

    def verdict(self, table: pd.DataFrame) -> Verdict:
        runs = counted(table)
        if runs.empty:
            return Verdict("cannot tell", "No run was finished.", None, self.rule)
        trained, longest = int(runs.length.min()), int(runs.length.max())
        growth = self.growth(table).loc[[longest]]
        outcome, name, effect = on_their_sides(growth, above=self.than, below=self.better, threshold=self.margin)
        if effect is None:
            return Verdict(outcome, f"{name} has too few seeds to judge.", None, self.rule)
        loss = runs.groupby(["variant", "length"], sort=False).bits.mean()
        said = "; ".join(
            f"{variant} {loss[variant, trained]:.3f}, {loss[variant, longest]:.3f} "
            f"({100 * growth[variant].mean():+.1f} %)"
            for variant in dict.fromkeys(runs.variant)
        )
        sentence = (
            f"Held-out bits per byte in windows of {trained}, as trained, and of {longest}: {said}. Read from {name}, "
            f"whose loss changes by {100 * effect.value:+.2f} % [{100 * effect.low:+.2f}, {100 * effect.high:+.2f}]."
        )
        return Verdict(outcome, sentence + at_an_end(table), effect, self.rule)


def bits(finished: FinishedRun) -> dict[str, float]:
    """Held-out bits per byte of all tokens, and by range of positions."""
    report = bits_by_position(finished)
    whole = float((report.bits_per_byte * report.tokens).sum() / report.tokens.sum())
    return {"bits": whole} | {f"@{first}": x for first, x in zip(report["first"], report.bits_per_byte, strict=True)}
