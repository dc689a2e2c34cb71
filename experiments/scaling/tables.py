"""The tables of a sweep's report, with numbers as text."""

import pandas as pd

from experiments.findings import Estimate
from experiments.scaling.results import Analysis, ArmResult, Law, RefusedMinimum


def number(x: float | Estimate | None, digits: int = 3) -> str:
    """A number, with its interval where it has one, to some significant digits; a dash for None."""
    return "–" if x is None else format(x, f".{digits}g")


def arms_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm: its law, its tuning, and what its best run cost."""
    return pd.DataFrame([_arm_row(arm) for arm in analysis.arms.values()])


def _arm_row(arm: ArmResult) -> dict[str, str]:
    law = arm.law if isinstance(arm.law, Law) else None
    best, tuned = arm.best, arm.tuning
    return {
        "arm": arm.name,
        "likelihood": "upper bound" if arm.bound else "exact",
        "slope": number(law.slope if law else None),
        "bits/byte at centre": number(law.bits_per_byte_at_centre if law else None),
        "exponent of N*": number(law.size_exponent if law else None),
        "tuned learning rate": number(tuned.learning_rate if tuned else None),
        "tuning FLOPs": number(tuned.flops if tuned else None),
        "best run: parameters": number(best.params_total if best else None),
        "tokens/s": number(best.tokens_per_second if best else None),
        "wall s": number(best.wall_seconds if best else None),
        "peak memory MB": number(best.peak_memory_bytes / 1e6 if best and best.peak_memory_bytes else None),
        "decode state kB": number(best.state_bytes / 1e3 if best and best.state_bytes else None),
        "MFU": number(best.mfu if best else None, 2),
    }


def minima_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm and budget: its isoFLOP minimum, or why there is none."""
    rows = []
    for arm in analysis.arms.values():
        for m in arm.minima:
            if isinstance(m, RefusedMinimum):
                params, loss, status = None, None, f"refused: {m.refused}"
            else:
                params, loss, status = m.params, m.bits_per_byte, "; ".join(m.flags) or "ok"
            rows.append([arm.name, number(m.budget), number(params), number(loss, 4), m.sizes, status])
    return pd.DataFrame(rows, columns=["arm", "budget", "parameters", "bits/byte", "sizes", "status"])


def multiplier_table(analysis: Analysis) -> pd.DataFrame:
    """One row per comparison and budget: the compute that the reference needs for the arm's bits per byte, over it."""
    rows = [
        [c.arm, c.reference, number(m.budget), number(m.estimate.value), m.estimate.interval()]
        for c in analysis.comparisons
        for m in c.multipliers
    ]
    return pd.DataFrame(rows, columns=["arm", "against", "budget", "compute multiplier", "95 % interval"])


def holdout_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm that was run at the held-out budget: what was expected of it, and how it came out."""
    rows = []
    for arm in analysis.arms.values():
        if held := arm.holdout:
            said = held.predicted
            predicted, interval = (number(said.value, 4), said.interval(".4g")) if said else ("–", "")
            inside = "–" if held.inside is None else "yes" if held.inside else "no"
            value = number(held.bits_per_byte, 4)
            rows.append([arm.name, number(held.budget), predicted, interval, value, inside, held.how])
    columns = ["arm", "budget", "predicted", "95 % interval", "outcome", "inside", "outcome from"]
    return pd.DataFrame(rows, columns=columns)
