"""A sweep of three arms and its analysis, made by hand from planted laws, for whatever shows an analysis."""

import math

import numpy as np
import pandas as pd

from experiments.findings import Estimate, Verdict
from experiments.harness import ledger
from experiments.scaling.design import Design
from experiments.scaling.results import (
    Analysis,
    ArmResult,
    BestRun,
    CellCounts,
    Comparison,
    CostRatio,
    ErrorShares,
    Forecast,
    FormScore,
    HeldOut,
    IsoFlopCurve,
    Law,
    Minimum,
    Multiplier,
    PairedDifference,
    Point,
    Power,
    Prediction,
    PredictionRecord,
    RefusedMinimum,
    Remedy,
    Tuning,
    TuningCurve,
)

REFERENCE, HYBRID, MASKED = "transformer+next_token", "gated_delta_hybrid+next_token", "transformer+masked_diffusion"
BUDGETS, HOLDOUT, SIZES = (3e10, 6e10, 1.2e11, 2.4e11), 9.6e11, (-1.1, -0.5, 0.0, 0.5, 1.1)
RATES = (0.0025, 0.005, 0.01, 0.02)
CENTRE = math.exp(np.log(BUDGETS).mean())
LEVELS = {REFERENCE: (3.07, 0.092), HYBRID: (3.0, 0.094), MASKED: (4.26, 0.061)}


def frontier(arm: str, flops: float) -> float:
    """The lowest loss that the arm's planted law has at a budget."""
    level, slope = LEVELS[arm]
    return level * (flops / CENTRE) ** -slope


def near(x: float, factor: float) -> Estimate:
    return Estimate(x, x / factor, x * factor)


def rows() -> pd.DataFrame:
    """The ledger: four tuning runs and 23 others of each arm, one of which diverged."""
    rng, made = np.random.default_rng(0), []
    for i, arm in enumerate(LEVELS):
        cells = [("tune", BUDGETS[2], 0.0, rate) for rate in RATES]
        cells += [("fit", budget, offset, 0.01) for budget in BUDGETS for offset in SIZES]
        cells += [("holdout", HOLDOUT, offset, 0.01) for offset in (-0.7, 0.0, 0.7)]
        for kind, budget, offset, rate in cells:
            params = round(math.sqrt(budget / 300) * math.exp(offset))
            loss = frontier(arm, budget) * (1 + 0.05 * offset**2 + 0.01 * math.log(rate / 0.009) ** 2)
            made.append(dict.fromkeys(ledger.COLUMNS) | {
                "id": f"{i}{len(made):011x}", "status": "done", "kind": kind, "arm": arm, "arch": arm.split("+")[0],
                "objective": arm.split("+")[1], "budget_flops": budget, "flops": budget, "flops_6nd": 0.8 * budget,
                "params_total": params, "tokens": round(budget / 6 / params), "learning_rate": rate,
                "seed": 1000 if kind == "tune" else 0, "width": 16,
                "bits_per_byte": loss * math.exp(rng.normal(0, 0.008)),
                "bits_per_byte_se": 0.01 if arm == MASKED else 0.0, "bits_per_byte_data_se": 0.02,
                "bits_per_byte_kind": "bound" if arm == MASKED else "exact", "wall_seconds": 12.0,
                "train_seconds": 11.0, "tokens_per_second": 9e4, "peak_memory_bytes": 8e8, "state_bytes": 65536.0,
                "mfu": 0.08, "device": "a test's CPU", "versions": {"python": "3.11", "torch": "2.13"},
            })  # fmt: skip
    made[-9] |= {"status": "diverged", "bits_per_byte": None, "error": "loss inf at step 7"}
    return pd.DataFrame(made, columns=ledger.COLUMNS)


def design() -> Design:
    plan = {
        "name": "planted", "arms": list(LEVELS), "budgets": list(BUDGETS), "holdout_budget": HOLDOUT,
        "cells": [{}] * 82, "commands": ["python -m experiments.sweep sweep=planted"],
        "corpus": {"name": "python_stdlib", "digest": "c4ff560d", "train_tokens": 9_000_000, "heldout_bytes": 300_000},
    }  # fmt: skip
    return Design.from_plan(plan)


def arm_result(arm: str, table: pd.DataFrame, warnings: tuple[str, ...] = ()) -> ArmResult:
    flops = np.geomspace(BUDGETS[0], HOLDOUT, 24)
    tuned = tuple(table[(table.arm == arm) & (table.kind == "tune")].bits_per_byte)
    minima = [Minimum(c, 5, (), math.sqrt(c / 300), frontier(arm, c)) for c in BUDGETS]
    if arm == MASKED:
        minima[0] = RefusedMinimum(BUDGETS[0], 5, (), "the best size is the smallest: add smaller ones")
    predicted = near(frontier(arm, HOLDOUT), 1.03)
    outcome = frontier(arm, HOLDOUT) * (0.955 if arm == MASKED else 0.99)
    return ArmResult(
        name=arm,
        bound=arm == MASKED,
        minima=tuple(minima),
        law=Law(
            centre_flops=CENTRE,
            bits_per_byte_at_centre=near(LEVELS[arm][0], 1.01),
            slope=Estimate(-LEVELS[arm][1], -LEVELS[arm][1] - 0.011, -LEVELS[arm][1] + 0.011),
            floor=Estimate(0.9, 0.1, 1.6),
            no_floor=False,
            alpha=near(0.34, 1.2),
            beta=near(0.29, 1.2),
            gamma=near(0.5, 1.3),
            size_exponent=near(0.47, 1.15),
            size_exponent_6nd=0.49,
            spread=0.012,
            seed_spread=0.008,
            frontier=tuple(Point(c, near(frontier(arm, c), 1.008 + 0.008 * abs(math.log(c / CENTRE)))) for c in flops),
            curves=tuple(
                IsoFlopCurve(
                    budget,
                    tuple(
                        Point(
                            math.sqrt(budget / 300) * math.exp(x), near(frontier(arm, budget) * (1 + 0.05 * x**2), 1.01)
                        )
                        for x in np.linspace(SIZES[0], SIZES[-1], 24)
                    ),
                )
                for budget in BUDGETS
            ),
        ),
        tuning=Tuning(0.01, 4.8e11, 4, (TuningCurve(1.2e11, 20000, RATES, tuned, near(0.009, 1.4)),), 0.01, 0.002),
        best=BestRun("0" * 12, BUDGETS[-1], 28284, frontier(arm, BUDGETS[-1]), 0.0, 9e4, 12.0, 8e8, 65536.0, 0.08),
        holdout=HeldOut(HOLDOUT, outcome, 56568, "lowest run", predicted, outcome in predicted),
        warnings=warnings,
    )


def comparison(arm: str, factor: float, outcome: str, effect: Estimate) -> Comparison:
    multipliers = tuple(Multiplier(c, near(effect.value * (c / CENTRE) ** 0.02, factor), c > 2e11) for c in BUDGETS)
    sentence = (
        f"{arm} against {REFERENCE}: {outcome}. The reference needs {effect} times the compute for the same bits per "
        f"byte at {CENTRE:.2g} FLOPs."
    )
    remedies = (Remedy(1.1, None, 0.31, 4e12), Remedy(1.25, 3, 0.85, 4e12))
    return Comparison(
        arm=arm,
        reference=REFERENCE,
        bounds=(MASKED,) if arm == MASKED else (),
        centre=Multiplier(CENTRE, effect, False),
        multipliers=multipliers,
        trend=Estimate(0.02, -0.08, 0.12),
        floor=None if arm == MASKED else Estimate(0.05, -0.3, 0.4),
        p={"offset": 0.21, "trend": 0.68, "floor": 0.8} if arm == HYBRID else {"offset": 1e-5, "trend": 0.4},
        costs=(CostRatio("training seconds", 15.0, near(0.7, 1.3)), CostRatio("peak memory, MB", 800.0, near(0.9, 2))),
        shares=ErrorShares(0.11, 0.04, 0.02, 0.03 if arm == MASKED else None),
        power=Power(1.38, remedies),
        paired=PairedDifference(BUDGETS[-1], -0.0321, 0.0074),
        verdict=Verdict(outcome, sentence, effect, "Better where the interval lies above 1, worse where below 1."),
    )


def analysis() -> Analysis:
    warning = "budget 3e10 has no minimum: its curve does not enter the parabolas, the law does not need it"
    return Analysis(
        loss="bits per byte",
        reference=REFERENCE,
        arms={arm: arm_result(arm, rows(), (warning,) if arm == MASKED else ()) for arm in LEVELS},
        comparisons=(
            comparison(HYBRID, 1.25, "cannot tell", Estimate(1.22, 0.93, 1.61)),
            comparison(MASKED, 1.4, "worse", Estimate(0.031, 0.019, 0.048)),
        ),
        warnings=(),
        cells=CellCounts(82, 80, 1, 0),
        record=PredictionRecord(9, 8),
    )


def prediction() -> Prediction:
    forecasts = {arm: Forecast(near(frontier(arm, HOLDOUT), 1.03), 56568.0, 20) for arm in LEVELS}
    scores = FormScore("own exponents", 0.011, True), FormScore("no floor", 0.041, False)
    return Prediction("2026-01-01T00:00:00+0000", HOLDOUT, forecasts, scores)
