"""Arms against each other: frontier laws, compute multipliers, a verdict in words, and the held-out prediction.

Everything is estimated on budgets that both arms have a minimum for. The intervals are those of `isoflop.interval`:
resampled runs, or the jackknife over budgets where that is wider.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.scaling.isoflop import Line, Minimum, find_minimum, fit_line, interval, resample_minima

DRAWS = 2000
MIN_BUDGETS = 3
MARGIN = 1.25  # "no difference" is said only of multipliers known to lie within this factor of 1
REACH = 4  # a law is not believed further than this factor beyond the budgets it was fitted to
FLOORS = (0.0, 0.5, 0.75)  # shares of the lowest loss that a prediction's interval allows to be irreducible


def minima_of(rows: pd.DataFrame, budgets: list[float]) -> list[Minimum]:
    """The isoFLOP minimum of each budget, over ln(parameters), from one arm's finished runs.

    A curve too flat or too noisy to say where its minimum lies still says how low it is: the lowest point of its
    parabola among the sizes then stands for the loss, and its size is not used (`located`).
    """
    out = []
    for budget in budgets:
        mine = rows[np.isclose(rows.budget_flops.astype(float), budget)]
        if mine.empty:
            out.append(Minimum(budget, 0, refused="no finished runs"))
            continue
        m = find_minimum(budget, np.log(mine.params_total.to_numpy(float)), mine.bits_per_byte.to_numpy(float))
        if m.refused and m.refused.startswith("curvature"):
            fitted = np.vander(m.window_x - m.window_x.mean(), 3, increasing=True) @ m.coefficients
            flags = [f"{m.refused}: its lowest fitted point is used, its size is not"]
            m = replace(m, refused=None, x=math.nan, loss=float(fitted.min()), flags=flags)
        out.append(m)
    return out


def located(minima: list[Minimum]) -> list[Minimum]:
    return [m for m in minima if not m.refused and not math.isnan(m.x)]


def loss_law(minima: list[Minimum], centre: float, floor: float = 0.0) -> Line | None:
    """The line through ln(bits per byte - floor) of the minima against ln C; None below three minima."""
    if len(minima) < MIN_BUDGETS:
        return None
    loss = np.array([m.loss for m in minima])
    _, draws = resample_minima(minima, DRAWS, seed=0)
    above = np.log(np.maximum(draws - floor, 1e-3 * loss.min()))
    return fit_line(np.array([m.budget for m in minima]), np.log(loss - floor), above, centre)


def extrapolate(minima: list[Minimum], centre: float, log_flops: float) -> tuple[float, float]:
    """95 % prediction interval of bits per byte at a compute: the hull of laws with several irreducible losses, each with
    the scatter of the minima about it. Few budgets cannot tell these laws apart, and a pure power law alone promises too
    much: on the curves of Porian et al. (arXiv 2406.19146) four budgets over a factor 8 hold the loss at 4 times the
    largest in 89 % of cases by the power law's own interval, and in all 64 by this one."""
    ends = []
    for share in FLOORS:
        floor = share * min(m.loss for m in minima)
        law = loss_law(minima, centre, floor)
        residual = np.array([math.log(m.loss - floor) - law.at(math.log(m.budget)) for m in minima])
        scatter = math.sqrt((residual**2).sum() / (len(minima) - 2))
        interval = law.interval_at(log_flops, np.random.default_rng(0).normal(0, scatter, DRAWS))
        ends += [floor + math.exp(end) for end in interval]
    return min(ends), max(ends)


def size_law(minima: list[Minimum], centre: float) -> Line | None:
    """The line through ln(parameters) of the minima whose place is known; None below three."""
    minima = located(minima)
    if len(minima) < MIN_BUDGETS:
        return None
    draws, _ = resample_minima(minima, DRAWS, seed=0)
    return fit_line(np.array([m.budget for m in minima]), np.array([m.x for m in minima]), draws, centre)


def centre_of(plan: dict) -> float:
    return float(np.log(plan["budgets"]).mean())


def finished(rows: pd.DataFrame, kind: str, arm: str | None = None) -> pd.DataFrame:
    rows = rows[(rows.status == "done") & (rows.kind == kind)]
    return rows if arm is None else rows[rows.arm == arm]


def predict(rows: pd.DataFrame, plan: dict) -> dict:
    """What the fitted budgets say of the held-out one: for each arm the power law's bits per byte with the 95 % prediction
    interval of `extrapolate`, and the optimal size; or why there is no prediction."""
    target, arms = math.log(plan["holdout_budget"]), {}
    for arm in plan["arms"]:
        good = [m for m in minima_of(finished(rows, "fit", arm), plan["budgets"]) if not m.refused]
        loss, size = loss_law(good, centre_of(plan)), size_law(good, centre_of(plan))
        if loss is None:
            arms[arm] = {"refused": f"{len(good)} budgets with a minimum, at least {MIN_BUDGETS} are needed"}
            continue
        arms[arm] = {
            "bits_per_byte": math.exp(loss.at(target)),
            "interval": list(extrapolate(good, centre_of(plan), target)),
            "params": None if size is None else math.exp(size.at(target)),
            "budgets": len(good),
        }
    return {"budget": plan["holdout_budget"], "arms": arms}


def analyse(rows: pd.DataFrame, plan: dict, prediction: dict | None = None, folder: Path | None = None) -> dict:
    """All that the report says, as JSON-able numbers. `folder` is the sweep's, for the held-out nats of each run."""
    arms = {arm: describe(rows, plan, arm, prediction) for arm in plan["arms"]}
    reference = plan["arms"][0]
    return {
        "reference": reference,
        "arms": arms,
        "comparisons": [compare(rows, plan, arm, reference, folder) for arm in plan["arms"][1:]],
        "cells": {
            "planned": len(plan["cells"]),
            "done": int((rows.status == "done").sum()),
            "diverged": int((rows.status == "diverged").sum()),
            "failed": int((rows.status == "failed").sum()),
        },
    }


def describe(rows: pd.DataFrame, plan: dict, arm: str, prediction: dict | None) -> dict:
    """One arm: its minima, its laws, what it costs beside FLOPs, its tuning and its held-out outcome."""
    fit, tune = finished(rows, "fit", arm), finished(rows, "tune", arm)
    minima = minima_of(fit, plan["budgets"])
    good = [m for m in minima if not m.refused]
    bound = bool((fit.bits_per_byte_kind == "bound").any())
    out = {"bound": bound, "minima": [as_json(m) for m in minima], "warnings": []}
    for m in minima:
        out["warnings"] += [f"budget {m.budget:.3g}: {text}" for text in ([m.refused] if m.refused else m.flags)]
    loss, size = loss_law(good, centre_of(plan)), size_law(good, centre_of(plan))
    if loss is None:
        out["law"] = {"refused": f"{len(good)} of {len(minima)} budgets have a minimum, a law needs {MIN_BUDGETS}"}
    else:
        low, high = loss.interval_at(loss.centre)
        out["law"] = {
            "slope": loss.slope,
            "slope_interval": loss.slope_interval(),
            "centre_flops": math.exp(loss.centre),
            "bits_per_byte_at_centre": math.exp(loss.intercept),
            "bits_per_byte_interval": [math.exp(low), math.exp(high)],
            "size_exponent": None if size is None else size.slope,
            "size_exponent_interval": None if size is None else size.slope_interval(),
            "band": band(loss, plan),
        }
    if len(tune):
        tried = rows[(rows.kind == "tune") & (rows.arm == arm)].learning_rate  # a rate that diverged bounds it too
        rates = sorted(tried.dropna())
        best = float(tune.loc[tune.bits_per_byte.idxmin()].learning_rate)
        out["tuning"] = {"learning_rate": best, "flops": float(tune.flops.sum()), "runs": len(tune)}
        if best in (rates[0], rates[-1]):
            out["warnings"].append(
                f"learning rate {best:g} is at the edge of the rates tried, {rates[0]:g} to {rates[-1]:g}"
            )
    if len(fit):
        best = fit.loc[fit[fit.budget_flops == fit.budget_flops.max()].bits_per_byte.idxmin()]
        out["best"] = {
            name: None if pd.isna(best[name]) else best[name]
            for name in ("id", "budget_flops", "params_total", "bits_per_byte", "bits_per_byte_se", "tokens_per_second",
                         "wall_seconds", "peak_memory_bytes", "state_bytes", "mfu")
        }  # fmt: skip
    out["holdout"] = holdout(finished(rows, "holdout", arm), plan, arm, prediction)
    return out


def as_json(m: Minimum) -> dict:
    place = math.exp(m.x) if located([m]) else None
    value = None if m.refused else m.loss
    return {
        "budget": m.budget,
        "sizes": m.sizes,
        "refused": m.refused,
        "flags": m.flags,
        "params": place,
        "bits_per_byte": value,
    }


def band(law: Line, plan: dict) -> list[dict]:
    """The law and its 95 % interval from the smallest budget to the held-out one, for drawing."""
    ends = plan["budgets"][0], plan["holdout_budget"] or plan["budgets"][-1]
    out = []
    for c in np.geomspace(*ends, 40):
        low, high = law.interval_at(math.log(c))
        out.append(
            {"flops": float(c), "value": math.exp(law.at(math.log(c))), "low": math.exp(low), "high": math.exp(high)}
        )
    return out


def holdout(rows: pd.DataFrame, plan: dict, arm: str, prediction: dict | None) -> dict | None:
    """The outcome at the held-out budget against the prediction: the parabola's minimum where there is one, else the
    best run, which is then an upper limit."""
    if rows.empty or not plan["holdout_budget"]:
        return None
    minimum = minima_of(rows, [plan["holdout_budget"]])[0]
    best = rows.loc[rows.bits_per_byte.idxmin()]
    known = bool(located([minimum]))
    value = minimum.loss if known else float(best.bits_per_byte)
    out = {
        "budget": plan["holdout_budget"],
        "bits_per_byte": value,
        "params": math.exp(minimum.x) if known else float(best.params_total),
        "how": "isoFLOP minimum" if known else f"best run ({minimum.refused or 'flat curve'})",
    }
    said = (prediction or {}).get("arms", {}).get(arm)
    if said and "interval" in said:
        low, high = said["interval"]
        out |= {"predicted": said["bits_per_byte"], "interval": said["interval"], "inside": bool(low <= value <= high)}
    return out


def compare(rows: pd.DataFrame, plan: dict, arm: str, reference: str, folder: Path | None) -> dict:
    """An arm against the reference, on the budgets for which both have a minimum."""
    pairs = zip(*(minima_of(finished(rows, "fit", name), plan["budgets"]) for name in (arm, reference)), strict=True)
    pairs = [(a, r) for a, r in pairs if not a.refused and not r.refused]
    kinds = finished(rows, "fit").groupby("arm").bits_per_byte_kind.agg(lambda k: k.iloc[0])
    bounds = [name for name in (arm, reference) if kinds.get(name) == "bound"]
    out = {"arm": arm, "reference": reference, "budgets": [a.budget for a, _ in pairs], "bounds": bounds}
    out["paired"] = paired_difference(rows, plan, arm, reference, folder)
    if len(pairs) < MIN_BUDGETS:
        return out | {
            "verdict": "cannot tell",
            "sentence": f"{arm} against {reference}: cannot tell, only {len(pairs)} budgets have a minimum for both "
            f"and {MIN_BUDGETS} are needed.",
        }
    new, ref = (loss_law([pair[i] for pair in pairs], centre_of(plan)) for i in (0, 1))
    difference = new.slope - ref.slope
    slope = interval(difference, new.draws[:, 1] - ref.draws[:, 1], new.left_out[:, 1] - ref.left_out[:, 1])
    multipliers = []
    for a, _ in pairs:
        x = math.log(a.budget) - new.centre
        value, draws, left_out = (
            (n[..., 0] + n[..., 1] * x - r[..., 0]) / r[..., 1] - x
            for n, r in (
                (np.array([new.intercept, new.slope]), np.array([ref.intercept, ref.slope])),
                (new.draws, ref.draws),
                (new.left_out, ref.left_out),
            )
        )
        low, high = interval(float(value), draws, left_out)
        compute = a.budget * math.exp(value)
        inside = pairs[0][1].budget / REACH <= compute <= pairs[-1][1].budget * REACH
        multipliers.append(
            {
                "budget": a.budget,
                "value": math.exp(value),
                "interval": [math.exp(low), math.exp(high)],
                "extrapolated": not inside,
            }
        )
    out |= {"slope_difference": difference, "slope_interval": slope, "multipliers": multipliers}
    return out | verdict(out)


def verdict(c: dict) -> dict:
    """In plain words, from the intervals of the compute multiplier at the budgets and of the slope difference."""
    sure = [int(m["interval"][0] > 1) - int(m["interval"][1] < 1) for m in c["multipliers"]]
    low, high = c["slope_interval"]
    steeper = "steeper" if high < 0 else "flatter" if low > 0 else None
    if 1 in sure and -1 in sure:
        word = "crosses over"
    elif all(s == 1 for s in sure):
        word = "better"
    elif all(s == -1 for s in sure):
        word = "worse"
    elif all(1 / MARGIN < m["interval"][0] and m["interval"][1] < MARGIN for m in c["multipliers"]):
        word = "no difference at this scale"
    else:
        word = "cannot tell"
    first, last = c["multipliers"][0], c["multipliers"][-1]

    def say(m: dict) -> str:
        return f"{m['value']:.3g} [{m['interval'][0]:.3g}, {m['interval'][1]:.3g}] at {m['budget']:.2g} FLOPs"

    sentence = (
        f"{c['arm']} against {c['reference']}: {word}. The reference needs this multiple of the compute for the same "
        f"bits per byte: {say(first)}, {say(last)}. Its slope is "
        + (f"{steeper}" if steeper else "not distinguishable")
        + f" (difference {c['slope_difference']:+.3f} [{low:+.3f}, {high:+.3f}])."
    )
    if first["extrapolated"] or last["extrapolated"]:
        sentence += (
            f" That compute lies more than {REACH} times outside the reference's budgets: read its sign, not its size."
        )
    if len(c["bounds"]) == 1:
        sentence += f" {c['bounds'][0]} is an upper bound on its bits per byte, so its true place may be better."
    return {"verdict": word, "sentence": sentence}


def paired_difference(rows: pd.DataFrame, plan: dict, arm: str, reference: str, folder: Path | None) -> dict | None:
    """Difference of the best runs at the largest budget in bits per byte, with the standard error from the held-out
    sequences, which are the same for both; None where a run or its file is missing."""
    best = []
    for name in (arm, reference):
        mine = finished(rows, "fit", name)
        mine = mine[np.isclose(mine.budget_flops, plan["budgets"][-1])]
        if folder is None or mine.empty:
            return None
        path = folder / "cells" / mine.loc[mine.bits_per_byte.idxmin()].id / "heldout_nats.npy"
        if not path.exists():
            return None
        best.append(np.load(path))
    difference = best[0] - best[1]
    bits = math.log(2) * plan["corpus"]["heldout_bytes"]
    return {
        "budget": plan["budgets"][-1],
        "bits_per_byte": float(difference.sum() / bits),
        "standard_error": float(difference.std(ddof=1) * math.sqrt(len(difference)) / bits),
    }
