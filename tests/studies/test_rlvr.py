"""Rewards against right answers: the verdict from the last evaluations of runs of equal seeds."""

import pandas as pd
import pytest

from experiments.studies.rlvr import RLVR
from experiments.studies.tuned import BASE, final, scores

MODELS = {name: {"overrides": [], "arms": []} for name in ("small", "hybrid", "sums")}
STUDY = RLVR("c", "s", "r", models=MODELS, tuning=[], arms={}, seeds=[0, 1, 2], working="sums")
NEAR = [0.0, 0.01, -0.01]


def rows(model, arm, value, spread=NEAR, status="done"):
    """Two evaluations of a run per seed, the first of which says nothing."""
    for seed, more in enumerate(spread):
        run = {"model": model, "arm": arm, "seed": seed, "id": f"{model} {arm} {seed}", "status": status}
        if status != "done":
            yield run
            continue
        for step, shown in ((10, 0.9), (20, value + more)):
            yield run | {"step": step, "pass@1": shown, "pass@1_high": shown + 0.02, "pass@16": 0.5, "length": 6.0}


def table(rewards=0.3, answers=0.2, chance=0.1, **rest):
    found = []
    for model in ("small", "hybrid"):
        arms = {"rewards": rewards, "right_answers": answers, "chance_rewards": chance}
        found += rows(model, BASE, 0.1, [0.0])
        for arm, value in arms.items():
            found += rows(model, arm, value, **rest)
    return pd.DataFrame(found + [*rows("sums", BASE, 0.4, [0.0]), *rows("sums", "rewards", 0.8)])


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (table(), "holds"),
        (table(answers=0.4), "does not hold"),
        (table(answers=0.3), "cannot tell"),
        (table(rewards=0.05, answers=0.01), "does not hold"),  # worse than before
        (table(rewards=0.3, chance=0.13), "cannot tell"),  # what cannot improve seems to
        (table(spread=[0.0]), "cannot tell"),
        (table(status="failed"), "cannot tell"),
    ],
    ids=["above", "below", "equal", "no lift", "control lifts", "one seed", "failed"],
)
def test_rewards_are_compared_with_right_answers_with_the_start_and_with_chance(made, outcome):
    assert STUDY.verdict(made).outcome == outcome


def test_the_effect_is_paired_and_leaves_the_model_with_a_working_out():
    verdict = STUDY.verdict(table())
    assert verdict.effect.value == pytest.approx(0.1) and 0.09 < verdict.effect.low <= 0.1, "seeds cancel"
    assert "sums: base 0.400, 0.50, 6.0; rewards 0.800, 0.50, 6.0" in verdict.sentence


def test_the_last_evaluation_of_each_run_counts():
    ends = final(table())
    assert set(ends.step) == {20} and len(ends) == 2 * (1 + 9) + 4
    assert ends.arm.tolist()[:3] == [BASE, "rewards", "rewards"], "in the order of the table"


def test_scores_are_by_the_true_check_where_the_reward_is_another():
    value = [0.5, 0.4, 0.6]
    plain = scores({"countdown": {"pass@1": value, "majority": value}})
    assert plain["reward"] == plain["pass@1"] == 0.5 and plain["majority_high"] == 0.6
    bent = scores(
        {"chance": {"pass@1": value, "pass@4": value, "gold@1": [0.1] * 3, "gold@4": [0.2] * 3, "majority": value}}
    )
    assert (bent["reward"], bent["pass@1"], bent["pass@4"], bent["pass@4_low"]) == (0.5, 0.1, 0.2, 0.2)
    assert "majority" not in bent and not any(name.startswith("gold") for name in bent)


def test_an_arm_that_there_is_none_of_is_refused():
    study = RLVR("c", "s", "r", {"small": {"overrides": [], "arms": ["rewrads"]}}, [], {"rewards": []}, [0], "sums")
    with pytest.raises(ValueError, match="model 'small' has an arm 'rewrads': choose from rewards"):
        next(study.stages(lambda _: None))  # pyrefly: ignore
