"""The pictures of a sweep, from its ledger and analysis: matplotlib figures for the report, PNG files and notebooks.

A point that is one run has the address of the run's folder, which `inline` turns into a link.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from scipy.optimize import isotonic_regression

from experiments.findings import Estimate, count, number
from experiments.scaling.arm_runs import finished, lowest_by_budget
from experiments.scaling.results import Analysis, ArmResult, Law, Minimum, Point

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers carry the same information.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, MUTED, FAINT, PAPER = "#1b1b1b", "#666666", "#dcdcdc", "#ffffff"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a name may have a dollar in it
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
SEEN = (1e-3, 1e3)  # multipliers beyond, infinite ones too, are drawn at this edge


def look(analysis: Analysis, arm: ArmResult) -> dict[str, Any]:
    """Colour and marker of an arm, the same in every figure."""
    i = list(analysis.arms).index(arm.name)
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def label(arm: ArmResult) -> str:
    """An arm's name, in lines short enough to stand beside its curve."""
    words = [f"+ {part}" if i else part for i, part in enumerate(arm.name.split("+"))]
    words += ["(upper bound)"] if arm.bound else []
    return "\n".join(line for word in words for line in textwrap.wrap(word, 24))


def loss_label(analysis: Analysis, arms: Iterable[ArmResult]) -> str:
    return f"{analysis.loss} (upper bound)" if {arm.bound for arm in arms} == {True} else analysis.loss


@rc_context(STYLE)
def frontier(rows: pd.DataFrame, analysis: Analysis) -> Figure:
    """Bits per byte against FLOPs: each arm's law with its band, the best run of each budget, and at the held-out
    budget the prediction as a bar and the outcome as a hollow marker."""
    figure = Figure(figsize=(5.4, 4.2), layout="constrained")
    axes, ends = figure.subplots(), []
    arms = list(analysis.arms.values())
    for i, arm in enumerate(arms):
        style = look(analysis, arm)
        best = lowest_by_budget(finished(rows, arm.name, "fit"))
        scatter_runs(axes, best, "budget_flops", s=30, **style)
        heights = list(best.bits_per_byte)
        if isinstance(arm.law, Law):
            band(axes, arm.law.frontier, style["color"])
            heights.append(arm.law.frontier[-1].bits_per_byte.value)
        if held := arm.holdout:
            x = held.budget * beside(i, len(arms))
            if held.predicted:
                error_bar(axes, x, held.predicted, style["color"])
            axes.plot(x, held.bits_per_byte, ls="", ms=7, mfc=PAPER, mew=1.6, zorder=4, **style)
            outcome = lowest_by_budget(finished(rows, arm.name, "holdout"))
            scatter_runs(axes, outcome.assign(budget_flops=x), "budget_flops", s=60, alpha=0, zorder=5, **style)
            heights.append(held.bits_per_byte)
        if heights:
            ends.append((heights[-1], label(arm), style))
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel=loss_label(analysis, arms))
    held_out = max((arm.holdout.budget for arm in arms if arm.holdout), default=None)
    tick_budgets(axes, rows[rows.kind == "fit"].budget_flops, held_out)
    tick_values(axes)
    name_ends(figure, axes, ends)
    return figure


@rc_context(STYLE)
def multipliers(analysis: Analysis) -> Figure:
    """The compute that the reference needs for an arm's bits per byte, over the arm's: at every budget with its band,
    hollow where the reference was not fitted near that compute, and with its interval at the centre."""
    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes, reference = figure.subplots(), analysis.arms[analysis.reference]
    ends = [(1.0, label(reference), look(analysis, reference))]
    axes.axhline(1.0, color=ends[0][2]["color"], lw=1.6)
    for i, comparison in enumerate(analysis.comparisons):
        if comparison.centre is None:
            continue
        arm = analysis.arms[comparison.arm]
        style = look(analysis, arm)
        seen = [(m, m.estimate.map(lambda x: float(np.clip(x, *SEEN)))) for m in comparison.multipliers]
        band(axes, [Point(m.flops, estimate) for m, estimate in seen], style["color"])
        for m, estimate in seen:
            axes.plot(m.flops, estimate.value, ms=5, mfc=PAPER if m.extrapolated else style["color"], **style)
        centre = comparison.centre.estimate.map(lambda x: float(np.clip(x, *SEEN)))
        error_bar(axes, comparison.centre.flops * beside(i, len(analysis.comparisons)), centre, style["color"])
        ends.append((seen[-1][1].value, label(arm), style))
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="compute multiplier\n(above 1: better)")
    tick_budgets(axes, [m.flops for comparison in analysis.comparisons for m in comparison.multipliers])
    tick_values(axes)
    name_ends(figure, axes, ends)
    return figure


@rc_context(STYLE)
def isoflop(rows: pd.DataFrame, analysis: Analysis, names: Sequence[str] | None = None) -> Figure:
    """A panel per arm, of all or those named: its runs over their size, the surface at each budget with its band, the
    parabolas' minima as stars, held-out runs hollow."""
    arms = [analysis.arms[name] for name in names or analysis.arms]
    figure, panels = panels_for(arms, 3.5)
    for axes, arm in zip(panels, arms, strict=True):
        style = look(analysis, arm)
        runs = finished(rows, arm.name, "fit", "holdout")
        if isinstance(arm.law, Law):
            for curve in arm.law.curves:
                band(axes, curve.points, style["color"])
        for (kind, budget), mine in runs.sort_values("params_total").groupby(["kind", "budget_flops"]):
            hollow = {"facecolors": PAPER} if kind == "holdout" else {}
            error = 1.96 * mine.bits_per_byte_se.fillna(0).astype(float)
            axes.errorbar(mine.params_total, mine.bits_per_byte, error, ls="", elinewidth=1, color=style["color"])
            scatter_runs(axes, mine, "params_total", s=22, zorder=3, **style | hollow)
            last = mine.iloc[-1]
            name = number(budget, 2) + (" FLOPs" if budget == runs.budget_flops.min() else "")
            name += "\nheld out" if kind == "holdout" else ""
            at = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
            axes.annotate(name, (last.params_total, last.bits_per_byte), fontsize=8, color=MUTED, **at)
        minima = [(m.params, m.bits_per_byte) for m in arm.minima if isinstance(m, Minimum) and m.params is not None]
        stars = {"marker": "*", "s": 70, "color": PAPER, "edgecolors": INK, "linewidths": 0.8, "zorder": 4}
        axes.scatter([x for x, _ in minima], [y for _, y in minima], **stars)
        axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=loss_label(analysis, [arm]))
        axes.set_title(label(arm).replace("\n", " "), color=style["color"])
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(lambda x, _: count(x))
        axes.xaxis.set_minor_locator(NullLocator())
        tick_values(axes)
    return figure


@rc_context(STYLE)
def tuning(rows: pd.DataFrame, analysis: Analysis, names: Sequence[str] | None = None) -> Figure:
    """A panel per arm, of all or those named: bits per byte over the learning rate at each budget and size tried, where
    a parabola is lowest with its interval, and the rate that was chosen as a line."""
    arms = [analysis.arms[name] for name in names or analysis.arms]
    figure, panels = panels_for(arms, 2.8)
    rates = sorted(rows[rows.kind == "tune"].learning_rate.dropna().unique())
    for axes, arm in zip(panels, arms, strict=True):
        style, ends = look(analysis, arm), []
        tuned = arm.tuning
        if tuned:
            axes.axvline(tuned.learning_rate, color=MUTED, lw=1, ls=(0, (4, 3)))
            for curve in tuned.curves:
                axes.plot(curve.rates, curve.bits_per_byte, color=style["color"], lw=1.4)
                if curve.optimum:
                    axes.axvspan(curve.optimum.low, curve.optimum.high, color=style["color"], alpha=0.1, lw=0)
                name = f"{count(curve.params)} at\n{number(curve.budget, 2)}\nFLOPs"
                ends.append((curve.bits_per_byte[-1], name, None))
        scatter_runs(axes, finished(rows, arm.name, "tune"), "learning_rate", s=26, zorder=3, **style)
        diverged = rows[(rows.kind == "tune") & (rows.arm == arm.name) & (rows.status == "diverged")].learning_rate
        axes.plot(diverged, [0.97] * len(diverged), "x", color=INK, transform=axes.get_xaxis_transform())
        axes.set(
            xscale="log", yscale="log", xlabel="learning rate at the base width", ylabel=loss_label(analysis, [arm])
        )
        axes.set_title(label(arm).replace("\n", " "), color=style["color"])
        axes.set_xticks(rates)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        tick_values(axes)
        name_ends(figure, axes, ends)
    return figure


def panels_for(arms: Sequence[ArmResult], height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each arm, three in a row."""
    columns, rows = min(3, len(arms)), -(-len(arms) // 3)
    figure = Figure(figsize=(3.5 * columns, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, 1 + i) for i in range(len(arms))]


def scatter_runs(axes: Axes, runs: pd.DataFrame, x: str, **style: Any) -> None:
    """A marker for each run, which has the address of the run's folder."""
    if style.get("facecolors"):
        style |= {"edgecolors": style.pop("color"), "linewidths": 1.2}
    style.setdefault("linewidths", 0.0)
    points = axes.scatter(runs[x], runs.bits_per_byte, **style)
    points.set_urls([f"cells/{name}/" for name in runs.id])


def band(axes: Axes, points: Sequence[Point], color: str) -> None:
    """A line and its 95 % band."""
    x, estimates = [point.x for point in points], [point.bits_per_byte for point in points]
    axes.plot(x, [e.value for e in estimates], color=color, lw=1.6)
    axes.fill_between(x, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.15, lw=0)


def error_bar(axes: Axes, x: float, estimate: Estimate, color: str) -> None:
    ends = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
    axes.errorbar(x, estimate.value, ends, ls="", color=color, capsize=3, elinewidth=1.4, zorder=3)


def beside(i: int, count: int) -> float:
    """The factor by which the i-th of so many bars at one budget is moved, so that none hides another."""
    return 1.08 ** (i - (count - 1) / 2)


def tick_budgets(axes: Axes, budgets: Iterable[float], held_out: float | None = None) -> None:
    """Ticks at the budgets themselves, every second one where they are many."""
    ticks = sorted(set(budgets))
    ticks = ticks[:: 1 + len(ticks) // 8] + ([held_out] if held_out else [])
    axes.set_xticks(ticks, [number(x, 2) + ("\nheld out" if x == held_out else "") for x in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def tick_values(axes: Axes) -> None:
    """A log axis over less than a decade has hardly a tick of its own, and one without data none at all."""
    low, high = axes.get_ylim()
    long = high > 5 * low and np.isfinite(axes.dataLim.minposy)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if long else MaxNLocator(6))
    axes.yaxis.set_major_formatter("{x:g}" if long else ScalarFormatter(useOffset=False))
    axes.yaxis.set_minor_locator(NullLocator())


def name_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, dict[str, Any] | None]]) -> None:
    """Write (y, name, look) to the right of the axes, each as near to its y as the others' lines of text allow."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    figure.draw_without_rendering()  # only then is the height of the axes known
    line = 11.5 / 72 * figure.dpi / axes.bbox.height
    heights = line * np.array([1 + name.count("\n") for _, name, _ in ends])
    wanted = np.log([y / low for y, _, _ in ends]) / np.log(high / low)
    wanted = np.clip(wanted, heights / 2, 1 - heights / 2)
    # Least squares under the order, with what each name takes laid aside.
    below = np.cumsum(heights) - heights / 2
    places = isotonic_regression(wanted - below).x + below
    for (_, name, style), y in zip(ends, places, strict=True):
        text = {"transform": axes.transAxes, "va": "center", "linespacing": 1.1}
        if style:
            axes.plot(1.035, y, ms=5, clip_on=False, transform=axes.transAxes, **style)
            axes.text(1.06, y, name, fontsize=9, **text)
        else:
            axes.text(1.02, y, name, fontsize=8, color=MUTED, **text)
