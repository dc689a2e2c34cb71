"""The pictures of a sweep, from its ledger and analysis: matplotlib figures for the report, PNG files and notebooks."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers carry the same information.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]


def style(analysis: dict, arm: str) -> dict:
    i = list(analysis["arms"]).index(arm)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def label(analysis: dict, arm: str) -> str:
    return f"{arm} (upper bound)" if analysis["arms"][arm]["bound"] else arm


def y_label(arms: list[dict]) -> str:
    kinds = {arm["bound"] for arm in arms}
    return {(False,): "bits per byte", (True,): "bits per byte (upper bound)"}.get(
        tuple(kinds), "bits per byte (bounds marked)"
    )


def frontier(analysis: dict) -> Figure:
    """Bits per byte at the isoFLOP minima against FLOPs: law, 95 % band, prediction and outcome at the held-out budget."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    for name, arm in analysis["arms"].items():
        look = style(analysis, name)
        good = [m for m in arm["minima"] if m["bits_per_byte"] is not None]
        axes.plot(
            [m["budget"] for m in good],
            [m["bits_per_byte"] for m in good],
            ls="",
            ms=7,
            label=label(analysis, name),
            **look,
        )
        if "band" in arm["law"]:
            x, value, low, high = (
                np.array([p[key] for p in arm["law"]["band"]]) for key in ("flops", "value", "low", "high")
            )
            axes.plot(x, value, color=look["color"], lw=1.5)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        held = arm["holdout"]
        if held:
            axes.plot(held["budget"], held["bits_per_byte"], ls="", ms=10, mfc="white", mew=2, **look)
            if "predicted" in held:
                ends = np.abs(np.array(held["interval"]) - held["predicted"])[:, None]
                axes.errorbar(held["budget"] * 1.06, held["predicted"], ends, color=look["color"], capsize=4, lw=1.2)
    axes.plot([], [], "o", color="grey", mfc="white", mew=2, ms=9, ls="", label="held-out budget: outcome")
    axes.errorbar([], [], [], color="grey", capsize=4, label="held-out budget: prediction, 95 %")
    axes.set(
        xscale="log", yscale="log", xlabel="training FLOPs (counted)", ylabel=y_label(list(analysis["arms"].values()))
    )
    axes.yaxis.set_major_locator(MaxNLocator(8))  # a log axis over less than a decade has hardly a tick of its own
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    return figure


def isoflop(rows: pd.DataFrame, analysis: dict) -> Figure:
    """One panel an arm: bits per byte against parameters, a line a budget, the minima marked."""
    arms = analysis["arms"]
    figure = Figure(figsize=(4.2 * len(arms), 4.2), layout="constrained")
    panels = figure.subplots(1, len(arms), squeeze=False)
    for axes, (name, arm) in zip(panels[0], arms.items(), strict=True):
        runs = rows[(rows.arm == name) & (rows.status == "done") & rows.kind.isin(["fit", "holdout"])]
        budgets = sorted(runs.budget_flops.unique())
        for budget, shade in zip(budgets, np.linspace(0.15, 0.85, max(1, len(budgets))), strict=False):
            mine = runs[runs.budget_flops == budget].sort_values("params_total")
            held = (mine.kind == "holdout").all()
            axes.errorbar(
                mine.params_total, mine.bits_per_byte, 1.96 * mine.bits_per_byte_se.astype(float), marker="o", ms=4, lw=1,
                ls="--" if held else "-", color=colormaps["viridis"](shade), label=f"{budget:.2g}" + (" held out" if held else ""),
            )  # fmt: skip
        for m in arm["minima"]:
            if m["params"] is not None:
                axes.plot(m["params"], m["bits_per_byte"], "*", ms=13, color="#D55E00", mec="black", mew=0.6, zorder=5)
        axes.set(xscale="log", xlabel="parameters", ylabel=y_label([arm]), title=name)
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.25, which="both")
        if budgets:
            axes.legend(title="FLOPs", fontsize=7, title_fontsize=8, frameon=False)
    return figure


def tuning(rows: pd.DataFrame, analysis: dict) -> Figure:
    """Bits per byte against the learning rate in the tuning runs, the chosen rates ringed."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, arm in analysis["arms"].items():
        runs = rows[(rows.arm == name) & (rows.status == "done") & (rows.kind == "tune")].sort_values("learning_rate")
        if runs.empty:
            continue
        look = style(analysis, name)
        axes.plot(runs.learning_rate, runs.bits_per_byte, label=label(analysis, name), lw=1.2, ms=5, **look)
        chosen = runs[runs.learning_rate == arm["tuning"]["learning_rate"]]
        axes.plot(chosen.learning_rate, chosen.bits_per_byte, "o", ms=13, mfc="none", mew=1.5, color=look["color"])
    axes.set_xscale("log")
    axes.set_xticks(sorted(rows[rows.kind == "tune"].learning_rate.dropna().unique()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="learning rate at the base width", ylabel=y_label(list(analysis["arms"].values())))
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, frameon=False)
    return figure
