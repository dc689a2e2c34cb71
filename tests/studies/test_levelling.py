"""Levelling off: how much more a large model gains by more text than a small one, from pairs of equal seed."""

import math

import numpy as np
import pandas as pd
import pytest

from experiments.studies.levelling import Levelling

TOKENS = [1e6, 4e6]


def study(**sizes):
    return Levelling("c", "s", "r", sizes or {"small": [], "large": []}, TOKENS, [0.01, 0.02], 1, 1000, [0, 1, 2])


def table(gains, scatter=0.0, seeds=3):
    """Runs whose ln(loss) falls by the gain of their size from the first number of tokens to the last."""
    rng = np.random.default_rng(0)
    return pd.DataFrame([
        {"size": size, "asked": tokens, "tokens": tokens, "seed": seed, "stage": "compare", "status": "done",
         "params_total": 1000 * len(size), "learning_rate": 0.01,
         "bits_per_byte": 2 * math.exp(-gain * (tokens == TOKENS[-1]) + scatter * rng.standard_normal())}
        for size, gain in gains.items() for tokens in TOKENS for seed in range(seeds)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("gains", "scatter", "outcome"),
    [
        ({"small": 0.1, "large": 0.2}, 0.002, "holds"),
        ({"small": 0.2, "large": 0.1}, 0.002, "does not hold"),
        ({"small": 0.1, "large": 0.101}, 0.02, "cannot tell"),
    ],
)
def test_the_verdict_asks_which_of_the_two_gains_more(gains, scatter, outcome):
    verdict = study().verdict(table(gains, scatter))
    assert verdict.outcome == outcome
    assert verdict.effect.value == pytest.approx(gains["large"] - gains["small"], abs=3 * scatter)


def test_a_size_without_runs_is_too_few_and_the_figure_is_drawn_of_what_is_there():
    rows = table({"small": 0.1, "large": 0.2})
    assert study().verdict(rows[rows["size"] == "small"]).outcome == "cannot tell"
    assert len(study().figure(rows[rows["size"] == "small"]).axes[0].get_legend_handles_labels()[1]) == 1


def test_all_sizes_are_trained_on_as_many_tokens(make_config):
    cells = next(study(small=["arch.width=8"], large=["arch.width=16"]).stages(lambda words: make_config(*words)))
    tokens = {cell.labels["asked"]: set() for cell in cells}
    for cell in cells:
        per_token = cell.run.config.budget.flops / cell.labels["asked"]
        tokens[cell.labels["asked"]].add((cell.labels["size"], round(per_token)))
    assert all(len(found) == 2 for found in tokens.values()) and tokens[TOKENS[0]] == tokens[TOKENS[1]]
