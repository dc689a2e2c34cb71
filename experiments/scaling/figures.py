"""The pictures of a sweep, from its ledger and analysis: matplotlib figures for the report, PNG files and notebooks."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from experiments.scaling.frontier import finished
from experiments.scaling.results import Analysis, ArmResult, Law, Minimum

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers carry the same information.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


def style(analysis: Analysis, arm: ArmResult) -> dict[str, Any]:
    """Colour and marker of an arm, the same in every figure, as arguments of `plot`."""
    i = list(analysis.arms).index(arm.name)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def label(arm: ArmResult) -> str:
    return f"{arm.name} (upper bound)" if arm.bound else arm.name


def y_label(arms: Iterable[ArmResult]) -> str:
    bounds = {arm.bound for arm in arms}
    if len(bounds) > 1:
        return "bits per byte (bounds marked)"
    return "bits per byte (upper bound)" if bounds == {True} else "bits per byte"


def frontier(analysis: Analysis) -> Figure:
    """Bits per byte at the isoFLOP minima against FLOPs: law, 95 % band; held-out outcome and prediction."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for arm in analysis.arms.values():
        look = style(analysis, arm)
        minima = [m for m in arm.minima if isinstance(m, Minimum)]
        budgets, losses = [m.budget for m in minima], [m.bits_per_byte for m in minima]
        axes.plot(budgets, losses, ls="", ms=7, label=label(arm), **look)
        if isinstance(arm.law, Law):
            flops, law = [point.flops for point in arm.law.band], [point.bits_per_byte for point in arm.law.band]
            axes.plot(flops, [point.value for point in law], color=look["color"], lw=1.5)
            low, high = [point.low for point in law], [point.high for point in law]
            axes.fill_between(flops, low, high, color=look["color"], alpha=0.15, lw=0)
        if held := arm.holdout:
            axes.plot(held.budget, held.bits_per_byte, ls="", ms=10, mfc="white", mew=2, **look)
            if said := held.predicted:
                ends = [[said.value - said.low], [said.high - said.value]]
                axes.errorbar(held.budget * 1.06, said.value, ends, color=look["color"], capsize=4, lw=1.2)
    axes.plot([], [], "o", color="grey", mfc="white", mew=2, ms=9, ls="", label="held-out budget: outcome")
    axes.errorbar([], [], [], color="grey", capsize=4, label="held-out budget: prediction, 95 %")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs (counted)", ylabel=y_label(analysis.arms.values()))
    axes.yaxis.set_major_locator(MaxNLocator(8))  # a log axis over less than a decade has hardly a tick of its own
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    return figure


def isoflop_curves(rows: pd.DataFrame, analysis: Analysis) -> Figure:
    """One panel per arm: bits per byte against parameters, one line per budget, the minima marked."""
    figure = Figure(figsize=(4.2 * len(analysis.arms), 4.2), layout="constrained")
    panels = figure.subplots(1, len(analysis.arms), squeeze=False)
    for axes, arm in zip(panels[0], analysis.arms.values(), strict=True):
        runs = rows[(rows.arm == arm.name) & (rows.status == "done") & rows.kind.isin(["fit", "holdout"])]
        budgets = sorted(runs.budget_flops.unique())
        for budget, shade in zip(budgets, np.linspace(0.15, 0.85, max(1, len(budgets))), strict=False):
            mine = runs[runs.budget_flops == budget].sort_values("params_total")
            line, note = ("--", " held out") if (mine.kind == "holdout").all() else ("-", "")
            axes.errorbar(
                mine.params_total,
                mine.bits_per_byte,
                1.96 * mine.bits_per_byte_se.astype(float),
                marker="o",
                ms=4,
                lw=1,
                ls=line,
                color=colormaps["viridis"](shade),
                label=f"{budget:.2g}{note}",
            )
        for m in arm.minima:
            if isinstance(m, Minimum) and m.params is not None:
                axes.plot(m.params, m.bits_per_byte, "*", ms=13, color="#D55E00", mec="black", mew=0.6, zorder=5)
        axes.set(xscale="log", xlabel="parameters", ylabel=y_label([arm]), title=arm.name)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25, which="both")
        if budgets:
            axes.legend(title="FLOPs", fontsize=7, title_fontsize=8, frameon=False)
    return figure


def tuning(rows: pd.DataFrame, analysis: Analysis) -> Figure:
    """Bits per byte against the learning rate in the tuning runs, the chosen rates ringed."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for arm in analysis.arms.values():
        if arm.tuning is None:
            continue
        runs = finished(rows, "tune", arm.name).sort_values("learning_rate")
        look = style(analysis, arm)
        axes.plot(runs.learning_rate, runs.bits_per_byte, label=label(arm), lw=1.2, ms=5, **look)
        chosen = runs[runs.learning_rate == arm.tuning.learning_rate]
        axes.plot(chosen.learning_rate, chosen.bits_per_byte, "o", ms=13, mfc="none", mew=1.5, color=look["color"])
    axes.set_xscale("log")
    axes.set_xticks(sorted(rows[rows.kind == "tune"].learning_rate.dropna().unique()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="learning rate at the base width", ylabel=y_label(analysis.arms.values()))
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    return figure
