"""The envelope of learning curves (Hoffmann et al. 2022, arXiv 2203.15556, approach 1).

At every compute the run with the lowest loss so far gives the optimal size and data, and power laws are fitted to
these. A point of a curve counts as what a run of that length would have reached, which needs a learning rate that has
decayed by then: curves of a constant rate, or of several schedules per size, as in the paper.

Shape letters: R curves, C points of compute.
"""

import numpy as np
import pandas as pd

from experiments.findings import Refused
from experiments.fits.isoflop import SAME_SIZE, Line

POINTS = 1500  # of compute, as in the paper
MIN_SIZES = 4  # on the envelope: one can be left out and a line still be more than a connection


def trace_envelope(curves: pd.DataFrame) -> pd.DataFrame:
    """Returns where some run is the best: columns flops, params and tokens, one row per point of compute.

    curves: columns run, flops, params, tokens and loss, one row per point of a learning curve. Losses are interpolated
    in ln L against ln C. A point is left out where the best of the sizes that got there is the smallest or the largest.
    """
    runs = [curve.sort_values("flops") for _, curve in curves.groupby("run") if len(curve) > 1]
    empty = pd.DataFrame({"flops": [], "params": [], "tokens": []})
    if not runs:
        return empty
    log_c = np.linspace(np.log(curves.flops.min()), np.log(curves.flops.max()), POINTS)
    sizes = np.array([np.log(curve.params.iloc[-1]) for curve in runs])

    def along(name: str) -> np.ndarray:
        """ln of a column along each curve [R, C], nan where it does not reach."""
        rows = [(np.log(curve.flops.to_numpy()), np.log(curve[name].to_numpy())) for curve in runs]
        return np.array([np.interp(log_c, c, y, left=np.nan, right=np.nan) for c, y in rows])

    loss = along("loss")
    reached = ~np.isnan(loss)
    best = np.where(reached, loss, np.inf).argmin(0)
    smallest = np.where(reached, sizes[:, None], np.inf).min(0)
    largest = np.where(reached, sizes[:, None], -np.inf).max(0)
    inside = (sizes[best] > smallest + SAME_SIZE) & (sizes[best] < largest - SAME_SIZE)
    tokens = along("tokens")[best, np.arange(POINTS)]
    found = pd.DataFrame({"flops": np.exp(log_c), "params": np.exp(sizes[best]), "tokens": np.exp(tokens)})
    return found[inside]


def fit_envelope(curves: pd.DataFrame) -> tuple[Line, Line, int] | Refused:
    """The lines of ln N* and ln D* against ln C and the number of sizes on the envelope, or why there are none. Their
    intervals are a jackknife over these sizes."""
    points = trace_envelope(curves)
    sizes = points.params.unique()
    if len(sizes) < MIN_SIZES:
        reason = f"{len(sizes)} sizes between the smallest and the largest are best at some compute"
        return Refused(f"{reason}, at least {MIN_SIZES} are needed: name more learning curves by columns.run")
    without = [trace_envelope(curves[np.abs(np.log(curves.params / size)) > SAME_SIZE]) for size in sizes]
    centre = float(np.log(points.flops).mean())

    def line(name: str) -> Line:
        whole = _fit(points, name, centre)
        left_out = np.array([_fit(each, name, centre) for each in without])
        return Line(centre, *whole, len(points), np.array([whole, whole]), left_out)

    return line("params"), line("tokens"), len(sizes)


def _fit(points: pd.DataFrame, name: str, centre: float) -> tuple[float, float]:
    """Intercept at the centre and slope of ln of a column against ln C."""
    slope, intercept = np.polyfit(np.log(points.flops) - centre, np.log(points[name]), 1)
    return float(intercept), float(slope)
