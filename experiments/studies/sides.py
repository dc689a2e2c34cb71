"""Rules that claims share: an effect lies above a threshold; some variants lie above it, and others below."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from experiments.findings import QUANTILES, Estimate, StudyOutcome

MOST_SEEDS = 1000  # that are thought of


def above(effect: Estimate, threshold: float) -> StudyOutcome:
    """Return whether a claim holds that lies with an effect above a threshold: as its whole interval says, or "cannot
    tell"."""
    return "holds" if effect.low > threshold else "does not hold" if effect.high < threshold else "cannot tell"


def seeds_to_tell(outcome: StudyOutcome, effect: Estimate, threshold: float, seeds: int, groups: int = 1) -> str:
    """Say how many seeds it would take to tell an effect from a threshold, were effect and scatter as seen; "" where it
    is told already.

    Args:
        seeds: that the mean and its interval (Student's t) are of, 2 or more. groups: of so many seeds each, over which
            the scatter is pooled.
    """
    if outcome != "cannot tell":
        return ""
    numbers = np.arange(2, MOST_SEEDS + 1)
    reach = stdtrit(groups * (numbers - 1), QUANTILES[1]) / np.sqrt(numbers)
    half = (effect.high - effect.low) / 2
    told = half * reach / reach[seeds - 2] < abs(effect.value - threshold)
    if not told.any():
        return f" Not even {MOST_SEEDS} seeds would tell."
    return f" To tell would take about {numbers[told.argmax()]} seeds."


def on_their_sides(
    values: pd.DataFrame, above: Sequence[str], below: Sequence[str], threshold: float
) -> tuple[StudyOutcome, str, Estimate | None]:
    """Whether the mean over seeds of every variant lies on its side, with its 95 % interval (Student's t).

    Holds if all intervals lie on their sides as a whole, does not hold if one lies on the wrong side as a whole, else
    cannot tell.

    Args:
        values: one row per seed, one column per variant; a missing run is NaN.
        above, below: the columns that are claimed to lie there.

    Returns:
        the outcome; the variant that it was read from, which is that nearest to the wrong side or furthest on it; its
        mean. Where a variant has fewer than two seeds, "cannot tell", that variant and None.
    """
    means, near, far = {}, {}, {}
    for name in (*above, *below):
        runs = values[name].dropna() if name in values else pd.Series(dtype=float)
        if len(runs) < 2:
            return "cannot tell", name, None
        mean = means[name] = Estimate.of_mean(runs)
        ends = (mean.low - threshold, mean.high - threshold)
        near[name], far[name] = ends if name in above else (-ends[1], -ends[0])
    worst = min(far, key=lambda name: far[name])
    if far[worst] < 0:
        return "does not hold", worst, means[worst]
    nearest = min(near, key=lambda name: near[name])
    return "holds" if near[nearest] > 0 else "cannot tell", nearest, means[nearest]
