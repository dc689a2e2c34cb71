"""Studies of a sweep that was run: their rules on made tables, and what they read of a surface."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from experiments.scaling.surface import Surface
from experiments.studies.cost_factor import CostFactor
from experiments.studies.cost_ratio import CostRatio, Factor
from experiments.studies.early_leads import EarlyLeads
from experiments.studies.extrapolation import Extrapolation
from experiments.studies.served_tokens import ServedTokens, cheapest

SWEEP = ("c", "s", "r", "results/architectures", 20)


@pytest.mark.parametrize(
    "low, high, outcome",
    [(9, 30, "holds"), (33, 50, "does not hold"), (2, 7, "does not hold"), (20, 40, "cannot tell")],
)
def test_a_factor_holds_within_the_range_that_counts_as_the_claimed_one(low, high, outcome):
    study = CostFactor(*SWEEP, "slow", "quick", [], factor=16, within=2)
    rows = [("slow", 1e9, 1.0, 1.0, 1.0), ("slow", 1e10, (low + high) / 2, low, high)]
    verdict = study.verdict(pd.DataFrame(rows, columns=["arm", "budget", "factor", "low", "high"]))
    assert verdict.outcome == outcome and "at 1e10 FLOPs" in verdict.sentence


@pytest.mark.parametrize(
    "low, high, outcome", [(0.4, 0.9, "holds"), (1.1, 1.4, "does not hold"), (0.9, 1.2, "cannot tell")]
)
def test_a_ratio_of_factors_holds_within_the_claimed_range(low, high, outcome):
    late, early = Factor("slow", "quick", 1e10), Factor("slow", "quick", 1e9)
    study = CostRatio(*SWEEP, late, early, (0.0, 1.0))
    rows = [("factor", "slow", "quick", x, y, y, y) for x, y in ((1e9, 4.0), (1e10, 3.0))]
    rows.append(("ratio", "slow", "slow", np.nan, (low + high) / 2, low, high))
    verdict = study.verdict(pd.DataFrame(rows, columns=["kind", "arm", "reference", "budget", "factor", "low", "high"]))
    assert verdict.outcome == outcome and "at 1e10 FLOPs slow takes 3.0" in verdict.sentence


def test_the_ratio_of_a_pair_at_two_budgets_is_that_of_its_factors():
    late, early = (Factor("masked diffusion", "transformer", budget) for budget in (6e11, 2e10))
    table = CostRatio(*SWEEP, late, early, (0.0, 1.0)).table(pd.DataFrame())
    factors = table[table.kind == "factor"].set_index("budget").factor
    ratio = table[table.kind == "ratio"].iloc[0]
    assert ratio.factor == pytest.approx(factors[6e11] / factors[2e10]) and ratio.low < ratio.factor < ratio.high
    assert list(factors.index) == [2e10, 6e10, 2e11, 6e11]


@pytest.mark.parametrize(
    "low, high, outcome", [(0.2, 0.4, "holds"), (0.6, 0.8, "does not hold"), (0.4, 0.6, "cannot tell")]
)
def test_the_cheapest_size_is_judged_at_the_tokens_served_that_the_claim_is_about(low, high, outcome):
    study = ServedTokens(*SWEEP, ["one"], served=[1.0, 10.0], judged=10.0, smaller=0.5)
    size = {"size": [0.9, (low + high) / 2], "size_low": [0.8, low], "size_high": [1.0, high]}
    table = pd.DataFrame({"arm": "one", "served": [1.0, 10.0], **size, "tokens": 2.0, "flops": 0.8})
    verdict = study.verdict(table)
    assert verdict.outcome == outcome and "saves 20% of the FLOPs" in verdict.sentence


@pytest.mark.parametrize("gamma", [0.4, 1.0])
@pytest.mark.parametrize("served", [1e-6, 1.0, 30.0])
def test_the_cheapest_size_is_the_minimum_of_the_cost_of_training_and_serving(gamma, served):
    constants = (1.5, 0.3, 0.1, 0.45, 0.35, gamma)
    surface = Surface((9.0, 14.0), *(np.full((1, 1), x) for x in constants))
    log_flops = np.log(6) + 23.0
    best_size, best_data = (float(x[0]) for x in surface.optimum(0, log_flops))
    goal = surface.frontier(0, log_flops)[0]

    def data_for(size):  # ln tokens at which a model of this size has the loss of the optimum
        lines = np.linspace(best_data - 3, best_data + 20, 200_000)
        losses = surface.loss(0, np.full_like(lines, size), lines)[0]
        return float(np.interp(-goal, -losses, lines))

    def cost(size):
        return size + np.log(6 * np.exp(data_for(size)) + 2 * served * np.exp(best_data))

    least = best_size + 0.99 * gamma * np.log(0.35 / 0.8) / 0.45  # nearly where no number of tokens is enough
    found = minimize_scalar(cost, bounds=(least, best_size + 0.5), method="bounded", options={"xatol": 1e-5})
    size, data, flops = (float(x[0]) for x in cheapest(surface, 0, log_flops, served))
    assert size == pytest.approx(found.x - best_size, abs=5e-3)
    assert data == pytest.approx(data_for(found.x) - best_data, abs=1e-2)
    assert flops == pytest.approx(found.fun - cost(best_size), abs=1e-4)


@pytest.mark.parametrize(
    "measured, half, outcome",
    [((2.0, 2.0), 0.1, "holds"), ((2.0, 3.0), 0.1, "does not hold"), ((2.0, 2.0), 0.6, "cannot tell")],
)
def test_a_law_extrapolates_where_its_intervals_are_right_and_sharp(measured, half, outcome):
    study = Extrapolation(*SWEEP, seen=1e11, inside=2, sharp=0.25)
    table = pd.DataFrame({"arm": ["a", "b"], "budget": 1e13, "predicted": 2.0, "measured": measured, "last_seen": 3.0})
    verdict = study.verdict(table.assign(low=2.0 - half, high=2.0 + half))
    assert verdict.outcome == outcome and "100 times as much" in verdict.sentence


@pytest.mark.parametrize(
    "late, outcome", [((-1, -1, 0), "holds"), ((1, 1, -1), "does not hold"), ((-1, 0, 0), "cannot tell"),
                      ((-1, -1, 1), "cannot tell")],
)  # fmt: skip
def test_leads_survive_where_most_pairs_are_told_apart_and_none_has_turned(late, outcome):
    def column(signs):
        middle = np.array(signs, float)
        return middle, middle - 0.5, middle + 0.5

    names = [f"{when}{end}" for when in ("early", "late") for end in ("", "_low", "_high")]
    values = dict(zip(names, (*column([-1, -1, -1]), *column(late)), strict=True))
    table = pd.DataFrame({"arm": ["a", "a", "b"], "other": ["b", "c", "c"]} | values)
    verdict = EarlyLeads(*SWEEP, seen=1e10).verdict(table)
    assert verdict.outcome == outcome and "From the lowest loss: a, b, c before" in verdict.sentence


@pytest.mark.parametrize(
    "study, said",
    [
        (CostFactor(*SWEEP, "nobody", "transformer", [], 16, 2), "no fitted arm 'nobody': choose from transformer"),
        (CostFactor("c", "s", "r", "results/none", 20, "a", "b", [], 16, 2), "results/none"),
        (EarlyLeads(*SWEEP, seen=1e9), "has no surface up to 1e.09 FLOPs"),
        (Extrapolation(*SWEEP, seen=1e9, inside=5, sharp=0.25), "no arm with runs up to 1e.09"),
        (ServedTokens(*SWEEP, ["transformer"], [1.0], 10.0, 0.5), "judged=10.0 must be one of study.served"),
    ],
)  # fmt: skip
def test_what_a_sweep_does_not_have_is_refused_by_name(study, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        study.table(pd.DataFrame())
