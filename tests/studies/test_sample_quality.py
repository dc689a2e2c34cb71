"""Sample quality: the measures of samples, and the verdict that follows from them."""

import math

import pandas as pd
import pytest
import torch

from experiments.data.hidden_markov import HiddenMarkovLanguage
from experiments.studies.sample_quality import SampleQuality, judge

LANGUAGE = HiddenMarkovLanguage(states=4, symbols=5, concentration=0.3, seed=0)
STUDY = SampleQuality("c", "s", "r", samples=1, batch=1, tolerance=0.2, curves={})


def test_true_sequences_have_the_entropy_and_the_pairs_of_the_language():
    got = judge(LANGUAGE, LANGUAGE.sample(4000, 16, torch.Generator().manual_seed(0)))
    entropy, error = LANGUAGE.entropy_per_token(16, 4000, torch.Generator().manual_seed(1))
    assert abs(got["nats"] - entropy) < 4 * math.hypot(got["nats_se"], error)
    assert got["pair_distance"] < 0.02 and got["impossible"] == 0


def test_dull_samples_are_likely_and_their_pairs_give_them_away():
    true = LANGUAGE.sample(500, 16, torch.Generator().manual_seed(0))
    dull = true[(-LANGUAGE.log_likelihood(true)).argmin()].expand(500, -1)
    got, expected = (judge(LANGUAGE, x) for x in (dull, true))
    assert got["nats"] < expected["nats"] and got["pair_entropy"] < expected["pair_entropy"]
    assert got["pair_distance"] > expected["pair_distance"] + 0.2


def test_sequences_with_an_id_that_is_no_symbol_are_counted_and_left_out():
    tokens = LANGUAGE.sample(10, 16, torch.Generator().manual_seed(0))
    tokens[3, 5] = LANGUAGE.symbols
    assert judge(LANGUAGE, tokens)["impossible"] == pytest.approx(0.1)


def test_the_interval_of_the_distance_narrows_with_the_number_of_sequences():
    widths = []
    for n in (100, 1600):
        got = judge(LANGUAGE, LANGUAGE.sample(n, 16, torch.Generator().manual_seed(0)))
        assert got["pair_distance_low"] <= got["pair_distance"] <= got["pair_distance_high"]
        widths.append(got["pair_distance_high"] - got["pair_distance_low"])
    assert 2.5 < widths[0] / widths[1] < 6


@pytest.mark.parametrize(
    ("distance", "seconds", "spread", "outcome"),
    [
        (0.11, 0.5, 0.01, "holds"),
        (0.11, 2.0, 0.01, "does not hold"),
        (0.30, 0.5, 0.01, "does not hold"),
        (0.14, 0.5, 0.10, "cannot tell"),
    ],
)
def test_the_verdict_is_the_rule_applied_to_trained_models(distance, seconds, spread, outcome):
    def row(objective, model, distance, seconds):
        ends = {"pair_distance_low": distance - spread, "pair_distance_high": distance + spread}
        return {"objective": objective, "curve": objective, "model": model, "pair_distance": distance} | ends | {
            "seconds": seconds, "evaluations": 8,
        }  # fmt: skip

    rows = [row("next_token", model, 0.1, 1.0) for model in ("trained", "optimal")]
    rows += [row("masked", "trained", distance, seconds), row("masked", "optimal", 0.1, seconds)]
    assert STUDY.verdict(pd.DataFrame(rows)).outcome == outcome
