"""The joint surface of a sweep's arms, with draws of it that carry every source of error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import ndtri

from experiments.findings import QUANTILES, Estimate, Refused
from experiments.scaling.arm_runs import finished
from experiments.scaling.design import Design
from experiments.scaling.results import ErrorShares
from experiments.scaling.surface import LEAST, Fit, Form, Runs, Surface, fit
from experiments.scaling.tuning import RateOptimum, find_optimum, rate_curves

DRAWS = 1000
FEW = 300  # draws for what is printed to two digits


@dataclass(frozen=True, eq=False)
class Joint:
    """The surface through the fitted runs of all arms that have enough.

    arms: by number. bounds: of each, whether it reports upper bounds. rows: of the runs, in their order. rates: of each
    arm, what tuning knows, or None. evaluation: of each arm, the standard error of its ln(loss) less the reference's
    over other held-out text, None where unknown. bound_errors: of each arm, the standard error of ln(loss) by Monte
    Carlo. count: of draws.
    """

    arms: tuple[str, ...]
    bounds: tuple[bool, ...]
    rows: pd.DataFrame
    fit: Fit
    rates: tuple[RateOptimum | None, ...]
    evaluation: tuple[float | None, ...]
    bound_errors: tuple[float, ...]
    count: int

    @cached_property
    def draws(self) -> Surface:
        """Surfaces that these runs allow, with all errors."""
        by_rate, by_text, by_bound = self._shifts(self.count, seed=0)
        return self.fit.draws(self.count, seed=0, shift=by_rate).shifted(by_text + by_bound)

    @cached_property
    def by_params(self) -> Surface | None:
        """The surface of the same runs over parameters in the place of FLOPs per token; None where it cannot be
        fitted."""
        runs = replace(self.fit.model.runs, size=np.log(self.rows.params_total.to_numpy(float)))
        try:
            return fit(runs, sharing(self.bounds)).surface
        except ValueError:
            return None

    def number(self, arm: str) -> int | None:
        """The arm's number, or None where it had too few runs."""
        return self.arms.index(arm) if arm in self.arms else None

    def law(self, arm: int, column: str, per: str | None = None) -> np.ndarray:
        """(slope, level) of the ln of a column, over another where given, over ln size: a power law through the arm's
        runs. Not a number where not all of them have it."""
        runs, mine = self.fit.model.runs, self.fit.model.runs.arm == arm
        values = self.rows[column].to_numpy(float)[mine]
        if per is not None:
            values = values / self.rows[per].to_numpy(float)[mine]
        if not (np.isfinite(values) & (values > 0)).all():
            return np.full(2, np.nan)
        return np.polyfit(runs.size[mine], np.log(values), 1)

    def params(self, arm: int, size: np.ndarray) -> np.ndarray:
        """Parameters of models of ln size [...], by the power law of those that were run."""
        return np.exp(np.polyval(self.law(arm, "params_total"), size))

    def errors(self, arm: int, reference: int, log_flops: float) -> ErrorShares:
        """Return the shares of the error of ln(multiplier) at C by source, as standard deviations of the normal
        distributions whose 95 % intervals are as wide: a rate that is hardly known allows draws without end."""

        def deviation(surface: Surface) -> float:
            drawn = surface.log_multiplier(arm, reference, log_flops)
            low, high = np.quantile(drawn[np.isfinite(drawn)], QUANTILES)
            return float((high - low) / (2 * ndtri(QUANTILES[1])))

        runs, (rates, evaluation, bound) = self.fit.model.runs, self._shifts(FEW, seed=1)
        fitted = np.broadcast_to(runs.loss - self.fit.residual, (FEW, len(runs)))
        pair = (arm, reference)
        return ErrorShares(
            runs=deviation(self.fit.draws(FEW, seed=1)),
            learning_rate=deviation(self.fit.refit(fitted + rates)) if any(self.rates[i] for i in pair) else None,
            evaluation=None if self.evaluation[arm] is None else deviation(self.fit.surface.shifted(evaluation)),
            bound=deviation(self.fit.surface.shifted(bound)) if any(self.bounds[i] for i in pair) else None,
        )

    def _shifts(self, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Errors of ln(loss) that do not differ from run to run: of the rate [draws, R], of the held-out text and of
        the Monte Carlo estimate of a bound, which has the same masks in all runs [draws, K]."""
        rng, runs = np.random.default_rng(seed), self.fit.model.runs
        rates = np.zeros((draws, len(runs)))
        for arm, known in enumerate(self.rates):
            if known is not None:
                mine = runs.arm == arm
                rates[:, mine] = -known.excess(runs.log_flops[mine], rng, draws)
        arms = len(self.arms)
        evaluation = rng.standard_normal((draws, arms)) * [error or 0.0 for error in self.evaluation]
        return rates, evaluation, rng.standard_normal((draws, arms)) * np.array(self.bound_errors)


def join(
    rows: pd.DataFrame,
    design: Design,
    evaluation: Mapping[str, float | None],
    own_floors: bool = False,
    draws: int = DRAWS,
) -> Joint | Refused:
    """Fit the surface of a sweep: exponents of each arm, one floor and one gamma for all exact likelihoods and one for
    each bound, or a floor for each arm.

    rows: of the ledger. evaluation: by arm, see `Joint`.
    """
    mine = {arm: finished(rows, arm, "fit") for arm in design.arms}
    arms = tuple(arm for arm, found in mine.items() if len(found) >= LEAST)
    if not arms:
        return Refused(f"no arm has the {LEAST} finished runs that a surface needs")
    bounds = tuple(bool((mine[arm].bits_per_byte_kind == "bound").any()) for arm in arms)
    table = pd.concat([mine[arm] for arm in arms], ignore_index=True)
    runs = runs_of(table, arms)
    try:
        fitted = fit(runs, sharing(bounds, own_floors))
    except ValueError as error:
        return Refused(str(error))
    rates = tuple(
        find_optimum(rate_curves(rows[(rows.kind == "tune") & (rows.arm == arm)]), fitted.spread[number])
        for number, arm in enumerate(arms)
    )
    relative = table.bits_per_byte_se.astype(float).fillna(0.0) / table.bits_per_byte.astype(float)
    bound_errors = tuple(float(relative[runs.arm == number].median()) for number in range(len(arms)))
    known = tuple(evaluation.get(arm) for arm in arms)
    return Joint(arms, bounds, table, fitted, rates, known, bound_errors, draws)


def sharing(bounds: Sequence[bool], own_floors: bool = False) -> Form:
    """Exponents of each arm's own; floors and gammas as `join` says."""
    numbers = tuple(range(len(bounds)))
    firsts = [bounds.index(False) if not bound else number for number, bound in enumerate(bounds)]
    kinds = sorted(set(firsts))
    shared = tuple(kinds.index(first) for first in firsts)
    return Form(numbers if own_floors else shared, numbers, shared)


def runs_of(table: pd.DataFrame, arms: Sequence[str]) -> Runs:
    """Rows of the ledger as runs of a surface. A cell is a budget, a seed, and the rank of the size among those that
    the arm ran there with that seed."""
    flops, tokens = table.flops.to_numpy(float), table.tokens.to_numpy(float)
    rank = table.groupby(["arm", "budget_flops", "seed"]).params_total.rank(method="dense")
    cell = pd.MultiIndex.from_arrays([table.budget_flops, rank, table.seed]).factorize()[0]
    return Runs(
        arm=np.array([list(arms).index(arm) for arm in table.arm]),
        size=np.log(flops / (6 * tokens)),
        data=np.log(tokens),
        loss=np.log(table.bits_per_byte.to_numpy(float)),
        cell=cell,
    )


def seed_spread(rows: pd.DataFrame) -> float | None:
    """Standard deviation of ln(bits per byte) between runs that differ by their seed alone; None without such."""
    loss = rows.bits_per_byte.astype(float).map(math.log)
    groups = loss.groupby([rows.budget_flops, rows.params_total])
    freedom = int((groups.size() - 1).sum())
    return math.sqrt(float(((loss - groups.transform("mean")) ** 2).sum()) / freedom) if freedom else None


def estimated(value: np.ndarray | float, draws: np.ndarray) -> Estimate:
    """Returns the value, a number or an array of one, with the interval of its draws."""
    return Estimate.of_draws(float(np.asarray(value).reshape(-1)[0]), draws)
