"""The cost of a format is that of pairs of runs of one seed, and every backbone has to bear it."""

import math

import numpy as np
import pandas as pd
import pytest

from experiments.studies.low_precision import FULL, LowPrecision, compared, costs

BACKBONES = "attention", "delta", "ssd"


def study():
    names = {name: [] for name in BACKBONES}
    return LowPrecision("c", "s", "r", names, {"fp8": True, "fp4": False}, 0.0025, [0.01, 0.02], 2, 1000, [0, 1, 2])


def table(lost, scatter=0.0002, seeds=4, rng=0):
    """Runs whose ln(loss) is that of their backbone and seed, and what their format loses."""
    rng = np.random.default_rng(rng)
    shared = {(name, seed): rng.standard_normal() for name in BACKBONES for seed in range(seeds)}
    noise = lambda format: 0.0 if format == FULL else scatter * rng.standard_normal()  # noqa: E731
    return pd.DataFrame(
        {"variant": name, "format": format, "stage": "compare", "seed": seed, "status": "done",
         "bits_per_byte": math.exp(0.1 * shared[name, seed] + cost + noise(format))}
        for (name, format), cost in ({(name, FULL): 0.0 for name in BACKBONES} | lost).items()
        for seed in range(seeds)
    )  # fmt: skip


def of_all(fp8, fp4=0.05):
    return {(name, format): cost for name in BACKBONES for format, cost in (("fp8", fp8), ("fp4", fp4))}


@pytest.mark.parametrize(
    ("lost", "outcome", "worst"),
    [
        (of_all(0.001), "holds", 0.001),
        (of_all(0.001) | {("ssd", "fp8"): 0.01}, "does not hold", 0.01),
        (of_all(0.001) | {("delta", "fp8"): 0.0025}, "cannot tell", 0.0025),
        (of_all(-0.01, fp4=0.0), "holds", -0.01),
    ],
)
def test_one_backbone_that_loses_more_in_fp8_is_enough_and_four_bits_do_not_count(lost, outcome, worst):
    verdict = study().verdict(table(lost))
    assert verdict.outcome == outcome and verdict.effect.value == pytest.approx(worst, abs=0.0005)


def test_the_sentence_has_every_backbone_in_every_format():
    sentence = study().verdict(table(of_all(0.001) | {("ssd", "fp4"): 0.02}, scatter=1e-9)).sentence
    assert "fp8 attention 0.10 [0.10, 0.10], delta 0.10 [0.10, 0.10], ssd 0.10 [0.10, 0.10]; fp4 attention" in sentence
    assert "delta 5.00 [5.00, 5.00], ssd 2.00 [2.00, 2.00]." in sentence


def test_a_backbone_that_lacks_a_run_keeps_the_claim_from_holding():
    runs = table(of_all(0.001))
    runs.loc[(runs.variant == "ssd") & (runs.format == "fp8") & (runs.seed == 1), "status"] = "diverged"
    verdict = study().verdict(runs)
    assert verdict.outcome == "cannot tell" and verdict.sentence.count("ssd") == 1
    nothing = study().verdict(runs[runs.seed == 0])
    assert nothing.outcome == "cannot tell" and nothing.effect is None


def test_intervals_cover_what_was_planted():
    inside = 0
    for rng in range(200):
        runs = compared(table(of_all(0.001), scatter=0.005, rng=rng))
        inside += 0.001 in costs(study().lost(runs, "fp8"))["delta"]
    assert 0.9 <= inside / 200 <= 0.99


def test_every_format_has_the_rate_and_the_seed_of_float32_and_no_autocast(make_config):
    compose = lambda overrides: make_config(*overrides)  # noqa: E731
    full, narrow = (study()._cell(compose, 1, format, "ssd", 0.02) for format in (FULL, "mxfp8"))
    assert full.labels | {"format": "mxfp8"} == narrow.labels and full.labels["stage"] == "compare"
    assert narrow.run.config.low_precision.format == "mxfp8" and "low_precision" not in full.run.config
    for cell in (full, narrow):
        config = cell.run.config
        assert (config.seed, config.optim.learning_rate, config.trainer.precision) == (1, 0.02, "float32")
