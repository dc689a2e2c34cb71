"""The tables of a sweep's report. A cell is text, a number, an estimate with its interval, or None."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from experiments.findings import Estimate, count
from experiments.report.wording import SOURCES, UNKNOWN, remedies
from experiments.scaling.results import Analysis, ArmResult, Comparison, Law, PairedDifference, RefusedMinimum


def table(rows: Iterable[Mapping[Any, object]]) -> pd.DataFrame:
    """Rows as a table whose columns are what any row has, and whose cells stay as they are."""
    made = list(rows)
    columns = list(dict.fromkeys(column for row in made for column in row))
    return pd.DataFrame([[row.get(column) for column in columns] for row in made], columns=columns, dtype=object)


def arms_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm: its loss, what it is beside the reference, and what it would take to tell."""
    against = {comparison.arm: comparison for comparison in analysis.comparisons}
    return table(_arm_row(arm, against.get(arm.name)) for arm in analysis.arms.values())


def _arm_row(arm: ArmResult, against: Comparison | None) -> dict[str, object]:
    row: dict[str, object] = {
        "arm": arm.name,
        "bits per byte": arm.law.bits_per_byte_at_centre if isinstance(arm.law, Law) else None,
    }
    if against is None:
        return row | {"compute multiplier": "reference"}
    return row | {
        "compute multiplier": against.centre.estimate if against.centre else None,
        "for ten times the compute": against.trend.map(lambda trend: 10**trend) if against.trend else None,
        "verdict": against.verdict.outcome,
        "what it would take": "\n".join(remedies(against)) if against.verdict.outcome in UNKNOWN else None,
    }


def differences_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm but the reference: offset, trend and floor beside it, each with the p of no difference."""
    return table(
        {
            "arm": c.arm,
            "p of the offset": probability(c.p.get("offset")),
            "trend": c.trend,
            "p of the trend": probability(c.p.get("trend")),
            "floor": c.floor,
            "p of the floor": probability(c.p.get("floor")),
            "best runs, bits per byte": paired(c.paired),
        }
        for c in analysis.comparisons
    )


def laws_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm: the constants of its part of the surface, and how far its runs lie from it."""
    return table(_law_row(arm) for arm in analysis.arms.values())


def _law_row(arm: ArmResult) -> dict[str, object]:
    law = arm.law
    if not isinstance(law, Law):
        return {"arm": arm.name, "slope": f"none: {law.refused}"}
    return {
        "arm": arm.name,
        "slope": law.slope,
        "floor": "none found" if law.no_floor else law.floor,
        "α": law.alpha,
        "β": law.beta,
        "γ": law.gamma,
        "size exponent, FLOPs": law.size_exponent,
        "size exponent, 6ND": None if law.size_exponent_6nd is None else f"{law.size_exponent_6nd:.2f}",
        "runs about the law": percent(law.spread),
        "seeds": percent(law.seed_spread),
    }


def multiplier_table(analysis: Analysis) -> pd.DataFrame:
    """One row per comparison and budget: the compute that the reference needs for the arm's bits per byte, over it."""
    return table(
        {
            "arm": c.arm,
            "against": c.reference,
            "FLOPs": m.flops,
            "compute multiplier": m.estimate,
            "reference": "extrapolated" if m.extrapolated else "fitted there",
        }
        for c in analysis.comparisons
        for m in c.multipliers
    )


def holdout_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm that was run at the held-out budget: what was expected of it, and how it came out."""
    return table(
        {
            "arm": arm.name,
            "FLOPs": held.budget,
            "predicted": held.predicted,
            "outcome": held.bits_per_byte,
            "inside": None if held.inside is None else "yes" if held.inside else "NO",
            "outcome from": held.how,
        }
        for arm in analysis.arms.values()
        if (held := arm.holdout)
    )


def costs_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm but the reference: what the reference pays over what the arm pays, in each cost."""
    return table(
        {"arm": c.arm} | {ratio.cost: ratio.estimate for ratio in c.costs} for c in analysis.comparisons if c.costs
    )


def best_runs_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm: what its best run at the largest budget cost beside FLOPs."""
    return table(
        {
            "arm": arm.name,
            "run": best.id,
            "parameters": count(best.params_total),
            "bits per byte": best.bits_per_byte,
            "tokens/s": best.tokens_per_second,
            "seconds": best.wall_seconds,
            "peak memory, MB": best.peak_memory_bytes and best.peak_memory_bytes / 1e6,
            "decode state, kB": best.state_bytes and best.state_bytes / 1e3,
            "MFU": best.mfu,
        }
        for arm in analysis.arms.values()
        if (best := arm.best)
    )


def power_table(analysis: Analysis) -> pd.DataFrame:
    """One row per comparison and multiplier that the design may be too small for: what would tell it from 1."""
    return table(
        {
            "arm": c.arm,
            "told apart now": c.power.told_apart,
            "multiplier": remedy.target,
            "seeds per cell": "no number" if remedy.seeds is None else f"{remedy.seeds}",
            "or power with a larger budget": percent(remedy.larger_budget_power),
            "its FLOPs": remedy.flops,
        }
        for c in analysis.comparisons
        if c.power
        for remedy in c.power.remedies
    )


def errors_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm but the reference: the standard deviation of its multiplier by source, in per cent of it."""
    return table(
        {"arm": c.arm} | {word: percent(getattr(c.shares, name)) for name, word in SOURCES.items()}
        for c in analysis.comparisons
        if c.shares
    )


def tuning_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm: the learning rate chosen, from what, and the loss that its error may still cost."""
    return table(
        {
            "arm": arm.name,
            "learning rate": f"{tuned.learning_rate:.3g}",
            "runs": tuned.runs,
            "FLOPs": tuned.flops,
            "may still cost": percent(tuned.excess),
        }
        for arm in analysis.arms.values()
        if (tuned := arm.tuning)
    )


def minima_table(analysis: Analysis) -> pd.DataFrame:
    """One row per arm and budget: the minimum of a parabola through its runs, or why there is none."""
    rows = []
    for arm in analysis.arms.values():
        for m in arm.minima:
            row: dict[str, object] = {"arm": arm.name, "FLOPs": m.budget, "sizes": m.sizes}
            if isinstance(m, RefusedMinimum):
                rows.append(row | {"parameters": None, "bits per byte": None, "remarks": f"refused: {m.refused}"})
            else:
                params = None if m.params is None else count(m.params)
                found = {"parameters": params, "bits per byte": m.bits_per_byte, "remarks": "; ".join(m.flags)}
                rows.append(row | found)
    return table(rows)


def unfinished_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The runs that failed or diverged, from the ledger."""
    columns = ["arm", "kind", "budget_flops", "width", "status", "error", "id"]
    return table(rows.loc[rows.status != "done", columns].to_dict("records"))


def paired(difference: PairedDifference | None) -> Estimate | None:
    if difference is None:
        return None
    value, half = difference.bits_per_byte, 1.96 * difference.standard_error
    return Estimate(value, value - half, value + half)


def probability(p: float | None) -> str | None:
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"


def percent(x: float | None) -> str | None:
    return None if x is None else f"{100 * x:.2g} %"
