"""Mixtures: the best one by a regression on small runs, and whether larger runs on it and on others bear it out."""

import math

import numpy as np
import pandas as pd
import pytest

from experiments.studies.mixtures import Mixtures, label, shares_of, terms

PARTS, TESTS = ["a", "b", "c"], ["one", "two"]
DESIGN = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [4, 1, 1], [1, 4, 1], [1, 1, 4]]
BEST = {"one": (0.7, 0.2, 0.1), "two": (0.1, 0.3, 0.6)}
STUDY = Mixtures(
    "c", "s", "r", PARTS, TESTS, DESIGN, steps=20, margin=0.01, sizes={"small": [], "large": []},
    learning_rates=[0.01, 0.02], widen=1, tuning_seed=1000, seeds=[0, 1, 2],
)  # fmt: skip


def table(small=BEST, large=BEST, scatter=0.0, seeds=3):
    """Runs whose ln(loss) on a test rises with the squared distance of roots from the mixture that is best for it."""
    rng, rows = np.random.default_rng(0), []
    mixtures = [*map(shares_of, DESIGN), *small.values()]
    for size, best in (("small", small), ("large", large)):
        for mixture in mixtures[: None if size == "large" else len(DESIGN)]:
            for seed in range(seeds):
                row = {"variant": size, "stage": "compare", "status": "done", "seed": seed, "learning_rate": 0.01}
                row |= {"mixture": label(mixture), "flops": 1e9 if size == "small" else 5e9}
                row |= dict(zip(PARTS, mixture, strict=True))
                noise = scatter * rng.standard_normal(len(TESTS))
                for test, away in zip(TESTS, noise, strict=True):
                    row[test] = 2 * math.exp(np.square(np.sqrt(mixture) - np.sqrt(best[test])).sum() + away)
                rows.append(row)
    return pd.DataFrame(rows).drop_duplicates(["variant", "mixture", "seed"])


def test_the_surface_finds_a_planted_best_mixture_of_each_test():
    rows = table()
    found = STUDY.predicted_best(rows[rows.variant == "small"])
    assert {test: pytest.approx(mixture) for test, mixture in found.items()} == BEST


def test_the_surface_needs_no_constant_and_is_steep_where_a_part_is_left_out():
    shares_RP = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    wanted = 3 + shares_RP[:, 0] - 2 * np.sqrt(shares_RP[:, 1])
    fitted = terms(shares_RP) @ np.linalg.lstsq(terms(shares_RP), wanted)[0]
    assert fitted == pytest.approx(wanted)


ELSEWHERE = {"one": (0.5, 0.5, 0.0), "two": (0.0, 0.5, 0.5)}
SAME = {"one": (0.5, 0.2, 0.3), "two": (0.5, 0.2, 0.3)}


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        ({}, "holds"),
        ({"large": ELSEWHERE}, "does not hold"),  # a mixture of the design is better by more than the margin
        ({"large": {"one": BEST["two"], "two": BEST["one"]}}, "does not hold"),
        ({"small": SAME, "large": SAME}, "does not hold"),  # it does not move with the test
        ({"scatter": 0.05}, "cannot tell"),
        ({"seeds": 1}, "cannot tell"),
    ],
)
def test_the_verdict_asks_whether_larger_runs_bear_the_predicted_mixtures_out(made, outcome):
    small = table(**{name: value for name, value in made.items() if name != "scatter"})
    rows = table(**made)
    rows = pd.concat([small[small.variant == "small"], rows[rows.variant == "large"]])
    assert STUDY.verdict(rows).outcome == outcome


def test_a_mixture_of_the_design_may_be_better_by_the_margin():
    near = {"one": tuple(np.array(BEST["one"]) + [-0.02, 0.0, 0.02]), "two": BEST["two"]}
    assert STUDY.verdict(table(large=near)).outcome == "holds"


def test_figure_and_verdict_are_made_of_what_is_there():
    rows = table()
    few = rows[rows.variant == "small"]
    assert STUDY.verdict(few).outcome == STUDY.verdict(few.assign(status="failed")).outcome == "cannot tell"
    for some in (rows, few, few.assign(status="failed")):
        assert len(STUDY.figure(some).axes) >= 2 * len(TESTS)


def test_parts_of_which_a_mixture_has_nothing_are_left_out_of_its_data(make_config):
    def compose(words):
        return make_config("data=kinds", "data.tokens.tokens=64", *words)

    study = Mixtures(
        "c",
        "s",
        "r",
        PARTS,
        [*TESTS, "three"],
        DESIGN,
        20,
        0.01,
        {"small": [], "large": []},
        [0.01, 0.02],
        1,
        1000,
        [0],
    )
    stages = study.stages(compose)
    assert [cell.labels["mixture"] for cell in next(stages)] == ["33/33/33"] * 4
    cell = study._cell(compose, 0, shares_of([0, 3, 1]), "small", 0.01)
    mixed = cell.run.config.data.tokens.data
    assert [part.corpus.get("name") for part in mixed.parts] == ["torch_headers", None] and mixed.weights == [
        0.75,
        0.25,
    ]


def test_parts_and_tests_must_be_those_of_the_data(make_config):
    with pytest.raises(ValueError, match="must name the three parts and all tests of data=kinds, which has 3 and 3"):
        next(STUDY.stages(lambda words: make_config("data=kinds", *words)))
