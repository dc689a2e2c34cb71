"""Grokking: steps until a part is known, the energy of frequencies, and the verdict from made runs."""

import math

import pandas as pd
import pytest
import torch

from experiments.studies.grokking import Grokking, known_after, log_ratios, pooled, strongest

STUDY = Grokking(
    "c", "s", "r", models={"a": [], "b": []}, optimisers=["muon", "adamw"], steps=1000, learning_rates=[0.01, 0.02],
    widen=0, tuning_seed=9, seeds=[0, 1, 2],
)  # fmt: skip


def table(steps):
    """Runs that generalise after so many steps, by model and optimiser, one per seed."""
    rows = []
    for (model, optimiser), taken in steps.items():
        for seed, generalised in enumerate(taken):
            name = f"{model}, {optimiser}"
            labels = {"id": f"{name}{seed}", "variant": name, "model": model, "optimiser": optimiser, "seed": seed}
            found = {"memorised": 100, "generalised": generalised, "energy_before": 0.1, "energy_after": 0.5}
            for step in (500, 1000):
                curve = {"step": step, "train": 1.0, "heldout": 1.0, "bits": 7.0 - step / 500}
                rows.append(labels | found | curve | {"stage": "compare", "status": "done", "learning_rate": 0.01})
    return pd.DataFrame([*rows, rows[0] | {"id": "t", "seed": 9, "stage": "tune", "generalised": 1.0}])


SLOW = (400, 500, 600)
NEVER = (math.nan,) * 3


@pytest.mark.parametrize(
    ("muon", "outcome"),
    [
        (((200, 250, 310), (210, 250, 300)), "holds"),
        (((800, 960, 1000), (820, 1000, 990)), "does not hold"),
        (((math.nan,) * 3, (900, math.nan, math.nan)), "does not hold"),
        (((390, 510, 600), (400, 490, 620)), "cannot tell"),
        (((100, 900, 500), (900, 120, 600)), "cannot tell"),
        (((200, 250, 310), (900, 1000, 1000)), "cannot tell"),  # one model each way
    ],
)
def test_the_verdict_goes_by_the_ratio_of_steps_over_models_and_seeds(muon, outcome):
    steps = {("a", "muon"): muon[0], ("a", "adamw"): SLOW, ("b", "muon"): muon[1], ("b", "adamw"): SLOW}
    verdict = STUDY.verdict(table(steps))
    assert verdict.outcome == outcome and verdict.rule == "r"
    assert (
        "b with adamw 100 and 493" in verdict.sentence and "up to 6.0 (muon) and 6.0 (adamw) bits" in verdict.sentence
    )
    assert "0.10 of the embedding's energy at first and 0.50" in verdict.sentence


def test_a_run_that_does_not_generalise_has_taken_all_its_steps_and_a_seed_of_which_none_does_is_left_out():
    half = {("a", "muon"): (500, 500, math.nan), ("a", "adamw"): (math.nan, 1000, math.nan)}
    runs = table(half).query("stage == 'compare'").groupby("id").last().reset_index()
    (found,) = log_ratios(runs, "muon", "adamw", 1000).values()
    assert found.tolist() == pytest.approx([math.log(0.5)] * 2)
    assert STUDY.verdict(table({("a", "muon"): NEVER, ("a", "adamw"): NEVER})).outcome == "cannot tell"
    alone = STUDY.verdict(table({("a", "muon"): (500, *NEVER[1:]), ("a", "adamw"): NEVER}))
    assert alone.outcome == "cannot tell" and alone.effect is None


def test_the_scatter_is_that_of_seeds_about_their_model():
    found = pooled([pd.Series([-1.0, 0.0, 1.0]), pd.Series([9.0, 10.0, 11.0])])
    assert [found.high - 5.0, 5.0 - found.low] == pytest.approx([2.776 / math.sqrt(6)] * 2, rel=1e-3)


def test_a_part_is_known_after_the_first_evaluation_with_99_of_100_answers_right():
    accuracies = [0.5, 0.98, 0.99, 0.97, 1.0]
    lines = [{"step": 10 * i, "tasks": {"heldout": {"accuracy": [x, 0, 1]}}} for i, x in enumerate(accuracies)]
    assert known_after(lines, "heldout") == 20
    assert math.isnan(known_after(lines[:2], "heldout"))


def test_the_energy_of_waves_lies_in_their_frequencies_and_that_of_noise_in_all():
    numbers = torch.arange(97)[:, None]
    wave = lambda frequency: torch.cos(2 * math.pi * frequency * numbers / 97 + torch.arange(8))  # noqa: E731
    assert strongest(3 + wave(4) + 2 * wave(31)) == pytest.approx(1.0)  # a constant is no frequency
    assert strongest(sum(wave(frequency) for frequency in range(1, 11))) == pytest.approx(0.5)
    noise = torch.randn(97, 4096, generator=torch.Generator().manual_seed(0))
    assert strongest(noise) == pytest.approx(5 / 48, abs=0.01)
