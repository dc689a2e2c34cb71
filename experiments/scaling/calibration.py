"""How often the comparison is right: planted laws, runs with noise, and what is said of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from experiments.findings import Refused
from experiments.harness import ledger
from experiments.scaling.compare import multiplier, outcome_of
from experiments.scaling.design import Corpus, Design
from experiments.scaling.holdout import Alternative, alternatives, best_of
from experiments.scaling.joint import FEW, estimated, join

ARMS = ("reference", "new")
BEYOND = (4, 16)  # predictions are made at these multiples of the largest budget


@dataclass(frozen=True)
class PlantedLaw:
    """L = E + g ((A / (N / 1e5)^alpha)^(1 / gamma) + (B / (D / 1e7)^beta)^(1 / gamma))^gamma, with g such that an arm
    of `multiplier` 2 needs half the compute of one of 1 for any loss. N is FLOPs per token over six."""

    E: float = 1.2
    A: float = 0.9
    B: float = 0.7
    alpha: float = 0.4
    beta: float = 0.4
    gamma: float = 1.0
    multiplier: float = 1.0
    kind: str = "exact"

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """The loss of models of so many parameters after so many tokens."""
        gain = self.multiplier ** -(self.alpha * self.beta / (self.alpha + self.beta))
        terms = self.A * (params / 1e5) ** -self.alpha, self.B * (tokens / 1e7) ** -self.beta
        return self.E + gain * sum(term ** (1 / self.gamma) for term in terms) ** self.gamma

    def frontier(self, flops: float) -> float:
        """The lowest loss at C = 6 N D."""
        size = np.exp(np.linspace(math.log(flops) / 2 - 6, math.log(flops) / 2 + 4, 20001))
        return float(np.min(self.loss(size, flops / 6 / size)))

    def flops_for(self, loss: float) -> float:
        """The compute at which the frontier comes down to a loss, by bisection."""
        low, high = math.log(1e6), math.log(1e24)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.frontier(math.exp(middle)) > loss else (low, middle)
        return math.exp((low + high) / 2)


@dataclass(frozen=True)
class Grid:
    """The sizes of every budget lie evenly in ln N within a factor `span` of sqrt(C / (6 tokens_per_parameter))."""

    budgets: tuple[float, ...] = (1e12, 2e12, 4e12, 8e12)
    sizes: int = 6
    span: float = 3.67
    tokens_per_parameter: float = 20.0
    seeds: int = 1

    def params(self, budget: float) -> np.ndarray:
        """The sizes of a budget, smallest first."""
        centre, reach = math.sqrt(budget / 6 / self.tokens_per_parameter), math.log(self.span)
        return np.round(centre * np.exp(np.linspace(-reach, reach, self.sizes)))

    @property
    def design(self) -> Design:
        """The design of a sweep with this grid."""
        centre = float(np.log(self.budgets).mean())
        return Design("planted", ARMS, self.budgets, centre, None, 0, Corpus("", "", 0, 0), (), {})


def plant(laws: Sequence[PlantedLaw], grid: Grid, noise: float, rng: np.random.Generator) -> pd.DataFrame:
    """The ledger of finished fitted runs of arms that follow laws, with normal errors of ln(loss)."""
    cells = [(c, n, seed) for seed in range(grid.seeds) for c in grid.budgets for n in grid.params(c)]
    budget, params, seed = (np.array(column) for column in zip(*cells, strict=True))
    tables = []
    for arm, law in zip(ARMS, laws, strict=True):
        tokens = np.round(budget / 6 / params)
        loss = law.loss(params, tokens) * np.exp(noise * rng.standard_normal(len(cells)))
        tables.append(
            pd.DataFrame(None, range(len(cells)), ledger.COLUMNS, dtype=object).assign(
                status="done", kind="fit", arm=arm, budget_flops=budget, flops=6 * params * tokens, tokens=tokens,
                params_total=params, seed=seed, bits_per_byte=loss, bits_per_byte_kind=law.kind, bits_per_byte_se=0.0,
            )
        )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class Case:
    """Two arms, the noise of a run (standard deviation of ln(loss)), and the grid that they are run on."""

    noise: float
    new: PlantedLaw
    reference: PlantedLaw = PlantedLaw()
    grid: Grid = Grid()


def repetition(case: Case, seed: int) -> dict[str, float]:
    """Returns what is said of one set of runs: outcomes, whether each interval holds the truth, and how wide it is."""
    rng = np.random.default_rng(seed)
    rows, design = plant((case.reference, case.new), case.grid, case.noise, rng), case.grid.design
    joint, own = join(rows, design, {}), join(rows, design, {}, own_floors=True, draws=FEW)
    if isinstance(joint, Refused) or isinstance(own, Refused):
        raise ValueError(f"a planted sweep cannot be fitted: {joint if isinstance(joint, Refused) else own}")
    first, last = math.log(case.grid.budgets[0]), math.log(case.grid.budgets[-1])
    pair = joint.fit.surface, joint.draws

    def truth(log_flops: float) -> float:
        return math.log(case.reference.flops_for(case.new.frontier(math.exp(log_flops)))) - log_flops

    centre, *at_budgets = (
        multiplier(joint, 1, 0, log_flops, design).estimate for log_flops in (design.centre, *np.log(design.budgets))
    )
    trend = estimated(*(surface.trend(1, 0, first, last) for surface in pair))
    floor = estimated(*(s.E[:, 1] - s.E[:, 0] for s in (own.fit.surface, own.draws)))
    exponent = estimated(*(s.size_exponent(1) for s in pair))
    outcome = outcome_of(centre, at_budgets)
    said = {
        "better": outcome == "better",
        "cannot tell": outcome == "cannot tell",
        "multiplier": math.exp(truth(design.centre)) in centre,
        "half-width of ln multiplier": math.log(centre.high / centre.low) / 2,
        "trend": (truth(last) - truth(first)) / (last - first) in trend,
        "floor": case.new.E - case.reference.E in floor,
        "gamma": case.new.gamma in estimated(*(s.gamma[:, 1] for s in pair)),
        "exponent of N*": case.new.beta / (case.new.alpha + case.new.beta) in exponent,
    }
    candidates = alternatives(joint.fit)
    for factor in BEYOND:
        held, width = _prediction(case, candidates, factor, rng)
        said |= {f"prediction at {factor}x": held, f"its width over the gain, {factor}x": width}
    return {name: float(value) for name, value in said.items()}


def _prediction(
    case: Case, candidates: list[Alternative], factor: float, rng: np.random.Generator
) -> tuple[bool, float]:
    """Returns whether the best of three runs at a larger budget comes within what is predicted of the new arm, and the
    width of that as a fraction of what the larger budget gains."""
    budget = factor * case.grid.budgets[-1]
    params = replace(case.grid, sizes=3, span=2.0).params(budget)
    tokens = budget / 6 / params
    said = best_of(candidates, 1, np.log(params), np.log(tokens))
    outcome = float(np.min(case.new.loss(params, tokens) * np.exp(case.noise * rng.standard_normal(3))))
    gain = case.new.frontier(case.grid.budgets[-1]) - case.new.frontier(budget)
    return outcome in said, (said.high - said.low) / gain


def summary(case: Case, repetitions: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over repetitions: fractions of outcomes and of intervals that held, and mean widths; the standard deviation
    of a fraction near 0.95 among 200 is 0.015."""
    table = pd.DataFrame(repetitions)
    return {"noise": case.noise, "true multiplier": case.new.multiplier} | table.mean().to_dict()
