"""Answers: which variant gets more of them right, pair by pair, and with how many passes."""

import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf

from experiments import study as command
from experiments.data.environment_data import environment_data
from experiments.data.environments.sudoku import Sudoku
from experiments.harness.parts import build_model, build_objective
from experiments.harness.tasks import heldout_problems
from experiments.harness.weights import FinishedRun
from experiments.studies.answers import Answers, answered
from experiments.studies.study import Cell
from objectives.contracts import Samples

NAMES = ["chain_next_token", "chain_diffusion", "middle_next_token", "middle_diffusion"]
STUDY = Answers(
    "c", "s", "r", dict.fromkeys(NAMES, []), better=[NAMES[0], NAMES[3]], than=[NAMES[1], NAMES[2]], margin=0.0,
    shares={}, begins={}, learning_rates=[0.01], widen=0, tuning_seed=1000, seeds=[0, 1, 2], passes=[1],
)  # fmt: skip
SCATTER = {"next_token": [-0.01, 0.0, 0.01], "diffusion": [0.01, 0.0, -0.01]}  # by seed


def table(means, seeds=3):
    """Runs whose diffusion gets nothing right in one pass, and these fractions in as many as tokens."""
    rows = []
    for name, mean in means.items():
        objective = name.partition("_")[2]
        for seed, noise in enumerate(SCATTER[objective][:seeds]):
            run = {"id": f"{name}{seed}", "variant": name, "stage": "compare", "seed": seed, "learning_rate": 0.01}
            run |= {"status": "done", "objective": objective}
            rows.append(run | {"passes": 4.0, "accuracy": mean + noise})
            if objective == "diffusion":
                rows.append(run | {"passes": 1.0, "accuracy": 0.0})
    tuning = {"id": "t", "variant": NAMES[0], "stage": "tune", "seed": 1000, "status": "done", "learning_rate": 0.01}
    return pd.DataFrame([tuning, *rows])


@pytest.mark.parametrize(
    ("right", "outcome", "task", "difference"),
    [
        ([0.9, 0.5, 0.4, 0.6], "holds", "middle", "0.200 [0.150, 0.250]"),
        ([0.9, 0.5, 0.6, 0.4], "does not hold", "middle", "-0.200 [-0.250, -0.150]"),
        ([0.5, 0.8, 0.4, 0.6], "does not hold", "chain", "-0.300 [-0.350, -0.250]"),
        ([0.9, 0.5, 0.5, 0.52], "cannot tell", "middle", "0.020 [-0.030, 0.070]"),
    ],
)
def test_the_claimed_winner_of_every_pair_must_be_ahead(right, outcome, task, difference):
    means = dict(zip(NAMES, right, strict=True))
    verdict = STUDY.verdict(table(means))
    assert verdict.outcome == outcome and verdict.rule == "r"
    assert f"Read from {task}." in verdict.sentence and f"difference {difference}" in verdict.sentence
    assert f"chain: next token {right[0]:.3f}, diffusion {right[1]:.3f} (0.000 in one pass)" in verdict.sentence


def test_one_seed_or_a_missing_variant_is_too_little():
    assert STUDY.verdict(table(dict.fromkeys(NAMES, 0.5), seeds=1)).effect is None
    missing = STUDY.verdict(table({NAMES[0]: 0.9, NAMES[1]: 0.5, NAMES[2]: 0.5}))
    assert missing.outcome == "cannot tell" and "too few seeds" in missing.sentence


DATA = environment_data(Sudoku(4), 22, train_problems=20, heldout_problems=10)


class Knowing:
    """An objective that writes the right answers to all but the first three problems, and for those nothing else than
    the digit 1."""

    def sample(self, model, request, sampler):
        assert request.draw.temperature == 0 and request.stop == (DATA.eot,)
        problems = heldout_problems(DATA, 22)
        assert [len(prompt) for prompt in request.prompts] == [17] * 10
        tokens_BT, drawn_BT = problems.tokens_BT.clone(), problems.counted_BT
        tokens_BT[:3] = tokens_BT[:3].masked_fill(drawn_BT[:3], DATA.pieces.index(b"1"))
        nothing = torch.zeros(tokens_BT.shape)
        return Samples(tokens_BT, torch.full((10,), 22), nothing, drawn_BT.int() - 1, evaluations=5.0, predictions=5.0)


def test_the_fraction_right_is_of_whole_answers_to_held_out_prompts():
    trained = FinishedRun(OmegaConf.create({"data": {"sequence_length": 22}}), torch.nn.Linear(1, 1), Knowing(), DATA)
    assert answered(trained, heldout_problems(DATA, 22), None) == {"accuracy": 0.7, "passes": 5}


def test_diffusion_answers_in_fewer_passes_as_well_and_runs_that_tune_do_not(make_config):
    def measured(name, stage="compare"):
        config = make_config(f"objective={name}", "data.sequence_length=22")
        objective = build_objective(config, DATA)
        return STUDY.measure(
            Cell({"stage": stage}, None), FinishedRun(config, build_model(config, objective), objective, DATA)
        )

    assert [(row["objective"], row["passes"]) for row in measured("masked_diffusion")] == [
        ("masked_diffusion", 1),
        ("masked_diffusion", 5),
    ]
    assert [(row["objective"], row["passes"]) for row in measured("next_token")] == [("next_token", 5)]
    assert measured("next_token", "tune") == [{}]


@pytest.mark.thorough
def test_of_each_pair_both_have_the_same_flops_and_an_accuracy_for_every_number_of_passes(tmp_path):
    command.run_study("chains_and_middles", [f"session.root={tmp_path}"], True, tmp_path / "out")
    rows = pd.read_csv(tmp_path / "out" / "table.csv")
    assert rows.groupby("variant").size().to_dict() == {
        f"{task}_{objective}": 2 * count
        for task, passes in (("permutations", 6), ("arithmetic", 4), ("sudoku", 4), ("gaps", 6))
        for objective, count in (("next_token", 1), ("diffusion", passes))
    }
    task = rows.variant.str.partition("_")[0]
    spread = rows.flops.groupby(task).agg(["min", "max"])
    assert (spread["max"] < 1.1 * spread["min"]).all() and rows.accuracy.between(0, 1).all()
