"""Length extrapolation: growth of the loss over the same bytes, and the verdict that follows."""

import math

import pandas as pd
import pytest
from omegaconf import OmegaConf

from experiments import study as command
from experiments.studies.length_extrapolation import LengthExtrapolation

STUDY = LengthExtrapolation(
    "c", "s", "r", {"rotary": [], "alibi": [], "other": []}, better=["alibi"], than=["rotary"], margin=0.01, shares={},
    begins={}, learning_rates=[0.01], widen=0, tuning_seed=1000, seeds=[0, 1, 2], lengths=[8, 16], stretched=["rotary"],
)  # fmt: skip


def table(growth, seeds=3):
    """Runs whose loss in windows of 4 differs from seed to seed, and grows by a factor in those of 16."""
    rows = [
        {"variant": name, "stage": "compare", "seed": seed, "learning_rate": 0.01, "status": "done", "length": length,
         "bits": (2 + seed) * math.exp((by + 0.001 * seed) * (length == 16))}
        for name, by in growth.items()
        for seed in range(seeds)
        for length in (4, 8, 16)
    ]  # fmt: skip
    tuned = {"variant": "alibi", "stage": "tune", "seed": 1000, "learning_rate": 0.01, "status": "done"}
    return pd.DataFrame([*rows, tuned])


@pytest.mark.parametrize(
    ("growth", "outcome"),
    [
        ({"rotary": 0.3, "alibi": -0.02, "other": 0.5}, "holds"),
        ({"rotary": 0.3, "alibi": 0.05, "other": -0.5}, "does not hold"),
        ({"rotary": -0.01, "alibi": -0.02}, "does not hold"),
        ({"rotary": 0.3, "alibi": 0.009}, "cannot tell"),
        ({"rotary": 0.3}, "cannot tell"),
    ],
)
def test_the_growth_in_the_longest_windows_decides(growth, outcome):
    verdict = STUDY.verdict(table(growth))
    assert verdict.outcome == outcome and verdict.rule == "r"


def test_the_growth_is_that_of_each_run():
    growth = STUDY.growth(table({"rotary": 0.3, "alibi": 0.0}))
    assert growth.rotary.loc[16].tolist() == pytest.approx([0.3, 0.301, 0.302])
    assert growth.loc[4].abs().to_numpy().max() == 0


def test_the_sentence_names_every_reading_and_what_decided():
    verdict = STUDY.verdict(table({"rotary": 0.3, "rotary_yarn": 0.1, "alibi": 0.0}))
    assert "rotary_yarn 3.000, 3.320 (+10.1 %)" in verdict.sentence and "Read from alibi" in verdict.sentence
    assert verdict.effect.value == pytest.approx(0.001)


def test_one_seed_and_no_seed_are_too_few():
    assert STUDY.verdict(table({"rotary": 0.3, "alibi": 0.0}, seeds=1)).effect is None
    assert STUDY.verdict(table({})).outcome == "cannot tell"


@pytest.mark.thorough
def test_the_same_weights_are_read_at_every_length_with_and_without_yarn(tmp_path):
    command.run_study("length_extrapolation", [f"session.root={tmp_path}"], True, tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "table.csv")
    assert set(rows.length) == {32, 64, 128} and rows.bits[rows.length == 32].tolist() == pytest.approx(
        rows.bits_per_byte[rows.length == 32].tolist(), rel=1e-4
    )
    of = {name: part.set_index(["seed", "length"]).sort_index() for name, part in rows.groupby("variant")}
    plain, yarn = of["rotary"], of["rotary_yarn"]
    assert (plain.id == yarn.id).all()
    assert ((plain.bits == yarn.bits) == (plain.index.get_level_values("length") == 32)).all()
    learned = OmegaConf.load(tmp_path / "cells" / of["learned"].id.iloc[0] / "config.yaml")
    assert learned.arch.model.max_length >= 128 and learned.data.sequence_length == 32
