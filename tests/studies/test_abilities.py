"""Abilities: whether the loss alone tells what models of other sizes and kinds can do."""

import numpy as np
import pandas as pd
import pytest

from experiments.studies.abilities import Abilities, errors, expected, halfway, jump

NAMES = ["small", "medium", "large"]
STUDY = Abilities("c", "s", "r", dict.fromkeys(NAMES, []), ["small", "medium"], [0, 1, 2], margin=0.1)
LOSSES = np.geomspace(4, 0.25, 16)


def ability(loss, half):
    return 1 / (1 + (loss / half) ** 4)


def table(large=1.0, spread=0.0, seeds=3):
    """Runs that answer half of two tasks at a loss of 1 and of a half, the large ones at so many times that, which
    spreads over seeds."""
    return pd.DataFrame([
        {"id": f"{name}{seed}", "status": "done", "architecture": name, "seed": seed, "step": step, "loss": loss,
         "task": task, "accuracy": ability(loss, half * (large * (1 + spread * (seed - 1)) if name == "large" else 1))}
        for name in NAMES for seed in range(seeds) for step, loss in enumerate(LOSSES)
        for task, half in (("first", 1.0), ("second", 0.5))
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("large", "spread", "outcome"), [(1.0, 0.0, "does not hold"), (2.0, 0.0, "holds"), (1.3, 0.6, "cannot tell")]
)
def test_abilities_are_predicted_where_the_others_lie_on_the_curve_of_the_known(large, spread, outcome):
    verdict = STUDY.verdict(table(large, spread))
    assert verdict.outcome == outcome
    if not spread:
        rows = table(large)
        learning = rows[(rows.architecture == "large")].assign(known=table().accuracy)
        inside = learning[learning[["accuracy", "known"]].apply(lambda both: both.between(0.05, 0.95)).any(axis=1)]
        assert verdict.effect.value == pytest.approx((inside.accuracy - inside.known).abs().mean(), abs=1e-6)


def test_one_seed_is_too_few_and_an_unknown_name_is_refused():
    assert STUDY.verdict(table(seeds=1)).outcome == "cannot tell"
    with pytest.raises(ValueError, match="study knows 'tiny': choose from small"):
        Abilities("c", "s", "r", {"small": []}, ["tiny"], [0], 0.1).cells(lambda words: None)


def test_the_curve_falls_with_the_loss_and_joins_what_rises_again():
    known = pd.DataFrame({"loss": [4.0, 2.0, 1.0, 0.5], "accuracy": [0.0, 0.4, 0.2, 0.8]})
    np.testing.assert_allclose(expected(known, np.array([4.0, 2.0, 1.0, 2**-0.5])), [0.0, 0.3, 0.3, 0.55])


def test_losses_that_the_known_never_had_and_tasks_that_nobody_is_learning_are_left_out():
    known = pd.DataFrame({"task": "t", "loss": [2.0, 1.0], "accuracy": [0.0, 0.5]})
    asked = pd.DataFrame({"task": "t", "loss": [3.0, 2.0, 1.9, 1.0, 0.5], "accuracy": [0.5, 0.0, 0.4, 0.5, 1.0]})
    assert errors(known, asked).loss.to_list() == [1.9, 1.0]


def test_a_jump_lies_at_the_loss_where_half_of_the_answers_are_right():
    run = table()[lambda rows: (rows.id == "small0") & (rows.task == "second")]
    assert halfway(run) == pytest.approx(0.5, rel=0.02)
    assert np.isnan(halfway(run[run.accuracy < 0.5]))
    slow = run[run.accuracy < 0.5].assign(seed=1)
    assert jump(run) == "0.500" and jump(pd.concat([run, slow])) == "0.500 (1 of 2 runs)" and jump(slow)[0] == "–"


def test_the_figure_has_a_panel_per_task_and_names_who_is_known():
    canvas = STUDY.figure(table())
    assert [axes.get_title() for axes in canvas.axes] == ["first", "second"]
    assert [text.get_text() for text in canvas.legends[0].get_texts()] == [*NAMES, "curve"]
