"""An ablation: variants are compared pair by pair of equal seeds, each at its own learning rate."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from experiments.harness.parts import build_model, build_objective
from experiments.harness.weights import FinishedRun
from experiments.studies import ablation
from experiments.studies.ablation import Ablation, additive, compared
from experiments.studies.sides import seeds_to_tell
from experiments.studies.study import Cell

RATES = [0.01, 0.02, 0.04]


def study(margin=0.0, better=("new",), than=("old",)):
    names = {"old": [], "new": [], "other": []}
    return Ablation(
        "c",
        "s",
        "r",
        names,
        list(better),
        list(than),
        margin,
        {},
        {},
        RATES,
        widen=2,
        tuning_seed=1000,
        seeds=[0, 1, 2],
    )


def table(effects, scatter=0.0, seeds=3, rate=0.02, seed_effects=0.05, rng=0):
    """Runs whose ln(loss) is ln 2 less the variant's effect, with an effect of the seed that all variants share."""
    rng = np.random.default_rng(rng)
    shared = seed_effects * rng.standard_normal(seeds)
    rows = [
        {"variant": name, "stage": "compare", "seed": seed, "learning_rate": rate, "status": "done", "state_bytes": 100,
         "bits_per_byte": 2 * math.exp(shared[seed] - effect + scatter * rng.standard_normal())}
        for name, effect in effects.items()
        for seed in range(seeds)
    ]  # fmt: skip
    tuning = {"stage": "tune", "seed": 1000, "status": "done", "bits_per_byte": 9.0, "state_bytes": 100}
    rows += [tuning | {"variant": name, "learning_rate": tried} for name in effects for tried in RATES]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("gain", "margin", "outcome"),
    [
        (0.02, 0.0, "holds"),
        (-0.02, 0.0, "does not hold"),
        (0.0001, 0.0, "cannot tell"),
        (-0.002, -0.01, "holds"),
        (0.02, 0.05, "does not hold"),
    ],
)
def test_the_verdict_asks_whether_the_best_is_lower_by_the_margin(gain, margin, outcome):
    verdict = study(margin).verdict(table({"old": 0.0, "new": gain, "other": 0.5}, scatter=0.001))
    assert verdict.outcome == outcome and verdict.rule == "r"
    assert verdict.effect.value == pytest.approx(gain, abs=0.003)


def test_the_seeds_that_it_would_take_go_by_the_scatter_of_all_variants():
    found = study().verdict(table({"old": 0.0, "new": 0.004, "other": 0.0}, scatter=0.01, seeds=8))
    assert found.outcome == "cannot tell"
    assert seeds_to_tell("cannot tell", found.effect, 0.0, seeds=8, groups=2) in found.sentence


def test_no_number_of_seeds_is_named_for_no_difference():
    runs = table({"old": 0.0, "new": 0.0}, scatter=0.01)
    none = study(margin=study().verdict(runs).effect.value).verdict(runs)
    assert none.outcome == "cannot tell" and "Not even 1000 seeds" in none.sentence


def test_the_best_of_each_side_counts():
    runs = table({"old": 0.0, "new": 0.01, "other": 0.03}, scatter=0.0005)
    assert study(than=["old"], better=["new", "other"]).verdict(runs).effect.value == pytest.approx(0.03, abs=0.002)
    assert study(than=["old", "other"], better=["new"]).verdict(runs).effect.value == pytest.approx(-0.02, abs=0.002)


def test_what_a_seed_does_to_all_variants_widens_no_interval():
    effects = {"old": 0.0, "new": 0.01, "other": 0.0}
    calm, wild = (study().verdict(table(effects, 0.002, seed_effects=x)).effect for x in (0.0, 0.5))
    assert wild.high - wild.low == pytest.approx(calm.high - calm.low)


def test_intervals_cover_what_was_planted():
    inside = 0
    for rng in range(300):
        runs = table({"old": 0.0, "new": 0.01, "other": 0.02, "more": 0.0}, scatter=0.01, rng=rng)
        inside += 0.01 in study().verdict(runs).effect
    assert 0.92 <= inside / 300 <= 0.98


def test_a_variant_that_lacks_a_run_is_left_out_and_too_few_tell_nothing():
    runs = table({"old": 0.0, "new": 0.02, "other": 0.0}, scatter=0.001)
    runs.loc[(runs.variant == "other") & (runs.seed == 1), "status"] = "diverged"
    assert list(compared(runs)) == ["old", "new"]
    assert study(than=["other"]).verdict(runs).outcome == "cannot tell"
    one_seed = table({"old": 0.0, "new": 0.02}, seeds=1)
    assert study().verdict(one_seed).effect is None


def test_a_learning_rate_at_the_end_of_those_tried_is_said():
    effects = {"old": 0.0, "new": 0.02, "other": 0.0}
    assert "Best at an end of the rates tried: old, new, other." in study().verdict(table(effects, rate=0.04)).sentence
    assert "at an end" not in study().verdict(table(effects, rate=0.02)).sentence


def test_the_scatter_is_that_of_runs_about_variant_and_seed():
    losses = compared(table({name: 0.0 for name in "abcdefgh"}, scatter=0.01, seeds=20, seed_effects=0.3))
    _, error, reach = additive(losses)
    assert error == pytest.approx(0.01, rel=0.2) and 1.95 < reach < 2.0


def test_the_use_of_experts_is_said_of_those_that_have_them():
    runs = table({"old": 0.0, "new": 0.02, "other": 0.0})
    assert "fullest" not in study().verdict(runs).sentence
    counted = (runs.stage == "compare") & (runs.variant == "new")
    runs.loc[counted, "expert_load"], runs.loc[counted, "dead_experts"] = [1.0, 2.0, 4.5], [0.0, 0.25, 0.5]
    assert " and the share of experts never chosen: new 2.50 and 0.25." in study().verdict(runs).sentence


def test_a_trained_mixture_is_measured_and_a_dense_model_has_nothing_to_say(make_config, data):
    def measured(*overrides):
        config = make_config(*overrides)
        objective = build_objective(config, data)
        trained = FinishedRun(config, build_model(config, objective).eval(), objective, data)
        return study().measure(Cell({}, None), trained)

    (found,) = measured("arch=qwen3_moe")
    assert 1 <= found["expert_load"] <= 8 and 0 <= found["dead_experts"] < 1
    assert measured("arch=transformer") == [{}]


class Run:
    def __init__(self, name, rate, seed, init_from):
        self.name, self.rate, self.seed, self.init_from = name, rate, seed, init_from
        self.id = f"{name} {seed}"


def tuned(monkeypatch, best, diverging=math.inf, **settings):
    """Returns the stages of a study, as (variant, rate, seed), where ln(rate / best of the variant) squared is added to
    the loss and runs above a rate diverge."""
    losses = lambda run: {"bits_per_byte": 2 + math.log(run.rate / best[run.name]) ** 2}  # noqa: E731
    monkeypatch.setattr(ablation, "finished", losses)

    def cell(self, compose, seed, name, rate, init_from=None):
        return Cell({"variant": name, "learning_rate": rate, "seed": seed}, Run(name, rate, seed, init_from))

    monkeypatch.setattr(Ablation, "_cell", cell)
    stages = replace(study(), **settings).stages(lambda overrides: None)
    cells, found = next(stages), []
    while True:
        begun = lambda run: (run.init_from,) if run.init_from else ()  # noqa: E731
        found.append([(cell.run.name, cell.run.rate, cell.run.seed, *begun(cell.run)) for cell in cells])
        try:
            cells = stages.send([cell for cell in cells if cell.run.rate < diverging])
        except StopIteration:
            return found


def test_rates_are_widened_until_the_best_is_inside_and_the_best_is_taken(monkeypatch):
    first, *more, last = tuned(monkeypatch, {"old": 0.02, "new": 0.045, "other": 0.0001})
    assert len(first) == 9
    assert more == [[("new", 0.08, 1000), ("other", 0.005, 1000)], [("other", 0.0025, 1000)]], "two at most"
    assert last == [
        (name, rate, seed) for name, rate in (("old", 0.02), ("new", 0.04), ("other", 0.0025)) for seed in (0, 1, 2)
    ]


def test_a_rate_beyond_which_runs_diverge_is_the_best_and_nothing_is_tried_beyond_it(monkeypatch):
    *_, last = tuned(monkeypatch, dict.fromkeys(("old", "new", "other"), 0.05), diverging=0.03)
    assert {rate for _, rate, _ in last} == {0.02}


def test_a_variant_that_goes_on_from_another_is_not_tuned_and_takes_a_fraction_of_its_rate(monkeypatch):
    first, *_, last = tuned(monkeypatch, {"old": 0.02, "new": 0.02}, begins={"other": ("old", 0.5)})
    assert {name for name, *_ in first} == {"old", "new"}
    assert last == [("other", 0.01, seed, f"old {seed}") for seed in (0, 1, 2)]


def test_a_variant_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="compares 'young': choose from old, new, other"):
        next(study(better=["young"]).stages(lambda overrides: None))


def test_a_variant_that_names_another_has_its_overrides_and_a_share_is_of_the_budget(make_config):
    variants = {"one": ["arch.width=8"], "two": ["one", "seed=3"], "three": ["two", "arch.width=16"]}
    ablation = replace(study(), variants=variants, shares={"three": 0.5})
    assert ablation.overrides("three") == ["arch.width=8", "seed=3", "arch.width=16"]
    whole, part = (
        ablation._cell(lambda overrides: make_config(*overrides), 0, name, 0.1).run.config for name in ("two", "three")
    )
    assert part.budget.flops == whole.budget.flops / 2 and part.arch.width == 2 * whole.arch.width
