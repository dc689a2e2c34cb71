"""Runs that tune what another has taught: each kind end to end, what it is charged, and how it goes on when stopped."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.data.environments.sorting import Sorting
from experiments.harness.assembly import measure
from experiments.harness.parts import build_model, build_objective, open_data
from experiments.harness.run import execute
from experiments.harness.tasks import texts_of
from experiments.harness.training import EVALUATIONS
from experiments.harness.weights import load_run
from objectives.contracts import Batch

TASK = [
    "data=sorting",
    "data.tokens.environment.length=2",
    "data.tokens.environment.digits=1",
    "data.sequence_length=8",
]
TASK += ["data.tokens.train_problems=60", "data.tokens.heldout_problems=6", "data.tokens.demonstrations=1"]
TASK += ["data.scoring={prompts: 6, samples: 4}", "data.allow_repeats=true", "budget.batch_tokens=128"]
PAIRS = ["data=ranked_pairs", "data.sequence_length=15", "data.tokens.train_pairs=60"]
PAIRS += ["data.tokens.heldout_pairs=10", "data.scoring={prompts: 4, samples: 4}", "data.allow_repeats=true"]
RL = ["objective=grpo", "objective.build.group=4", "budget.flops=2e8"]
KL = "objective.build.kl={_target_: objectives.post_training.policy_gradient.KLPenalty, coefficient: 0.1}"


@pytest.fixture
def base(make_run):
    """A run under next-token prediction, and one under masked diffusion, on the task."""
    return lambda *more: execute(make_run(*TASK, "budget.flops=4e8", *more))


def trained(row: dict) -> dict:
    assert row["status"] == "done", row["error"]
    return row


@pytest.mark.thorough
def test_a_run_is_scored_by_the_tasks_of_its_data_at_each_evaluation(base, make_run):
    row = trained(base("trainer.evaluations=2"))
    (name, scores), *rest = row["tasks"].items()
    assert not rest and name.startswith("sorting")
    assert set(scores) == {"pass@1", "pass@4", "majority", "length", "ended"}
    assert all(low <= value <= high for value, low, high in scores.values())
    lines = [json.loads(line) for line in (make_run().session.root / "cells" / row["id"] / EVALUATIONS).open()]
    assert [line["step"] for line in lines] == [row["steps"] // 2 + row["steps"] % 2, row["steps"]]
    assert lines[-1]["tasks"] == row["tasks"] and lines[-1]["flops"] == row["flops"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        [*PAIRS, "budget.batch_tokens=150", "objective=dpo", "budget.flops=1e8"],
        [*TASK, *RL, "objective.build.updates=3", KL],
    ],
    ids=["preferences", "rewards"],
)
def test_a_reference_stands_still_beside_a_model_that_is_compiled(make_run, monkeypatch, tmp_path, settings):
    task = [setting for setting in settings if setting.startswith("data")]
    start = make_run(*task, "budget.flops=1e8", "budget.batch_tokens=150")
    trained(execute(start))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    runs = [
        make_run(*settings, f"init_from={start.folder}", f"trainer.compile={way}", f"session.root={tmp_path / way}")
        for way in ("false", "true")
    ]
    rows = [trained(execute(run)) for run in runs]
    assert [row["compiled"] for row in rows] == [False, True]
    assert rows[1]["train_loss"] == pytest.approx(rows[0]["train_loss"], rel=1e-4)
    begun, plain, compiled = (load_file(run.folder / "model.safetensors") for run in (start, *runs))
    assert not torch.equal(begun["embedding.weight"], plain["embedding.weight"])
    for name, weights in plain.items():
        torch.testing.assert_close(compiled[name], weights, rtol=1e-3, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("settings", "of_base"),
    [
        ([], []),
        (["objective.build.updates=3", "objective.build.normaliser=length"], []),
        ([KL], []),
        (["adapter=lora", "adapter.rank=2"], []),
        (
            ["objective=diffusion_grpo", "data.tokens.fill=true"],
            ["objective=masked_diffusion", "data.tokens.fill=true"],
        ),
    ],
    ids=["as it is", "updates", "kl", "lora", "diffusion"],
)
def test_rewards_are_learnt_from_and_what_it_cost_is_charged(base, make_run, settings, of_base):
    start = trained(base(*of_base))
    run = make_run(*TASK, *RL, *settings, f"init_from={start['id']}")
    row = trained(execute(run))
    assert row["flops"] <= row["budget_flops"] and row["init_from"].startswith(start["id"])
    # Four answers to each prompt are written once and learnt from: more than four times a step of the base.
    assert row["flops_per_token"] > 4 * start["flops_per_token"] * (2 / 3 if "lora" in str(settings) else 1)
    assert load_run(run.folder).objective.__class__.__name__ == ("MaskedDiffusion" if of_base else "NextToken")
    events = list(run.folder.glob("events.out.tfevents*"))
    assert events and b"groups_without_signal" in b"".join(path.read_bytes() for path in events)
    assert b"train/written" in b"".join(path.read_bytes() for path in events)
    weights = load_file(run.folder / "model.safetensors")
    before = load_file(run.folder.parent / start["id"] / "model.safetensors")
    assert weights.keys() == before.keys()
    moved = {name for name in weights if not torch.equal(weights[name], before[name])}
    lora = "adapter=lora" in settings
    assert moved and (run.folder / "adapter" / "adapter_config.json").exists() == lora
    assert not (lora and {"embedding.weight", "norm.weight", "head.weight"} & moved)


@pytest.mark.thorough
def test_a_run_that_was_stopped_between_two_updates_on_one_experience_resumes_exactly(base, make_run, killed_at):
    start = trained(base())["id"]
    settings = [*TASK, *RL, "objective.build.updates=4", "session.checkpoint_seconds=0", "budget.flops=6e8"]
    whole = trained(execute(make_run(*settings, f"init_from={start}")))
    other = make_run().session.root
    root = other.with_name("other")
    (root / "cells").mkdir(parents=True)
    (root / "cells" / start).symlink_to(other / "cells" / start)
    again = make_run(*settings, f"init_from={start}", f"session.root={root}")
    assert again.id == whole["id"] and whole["steps"] > 8
    with killed_at(6):
        execute(again)
    row = trained(execute(again))
    assert row["bits_per_byte"] == whole["bits_per_byte"] and row["tasks"] == whole["tasks"]


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo", "reward_model"])
def test_pairs_are_learnt_from_and_never_torn_apart(make_run, objective):
    start = trained(execute(make_run(*PAIRS, "budget.flops=4e8", "budget.batch_tokens=150")))
    run = make_run(
        *PAIRS, f"objective={objective}", f"init_from={start['id']}", "budget.flops=3e8", "budget.batch_tokens=150"
    )
    row = trained(execute(run))
    assert row["batch_tokens"] % 30 == 0 or row["tokens"] % 30 == 0
    assert (row["tasks"] is None) == (objective == "reward_model")
    if objective == "reward_model":
        model = load_run(run.folder).model
        assert model.score.weight.abs().sum() > 0
        with_rewards = make_run(
            *PAIRS, *RL, f"init_from={start['id']}", f"objective.models.reward={row['id']}", "budget.batch_tokens=60"
        )
        assert trained(execute(with_rewards))["flops_per_token"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize("text", ["data", "student", "teacher"])
def test_a_student_learns_from_a_teacher_of_another_backbone_and_the_teachers_passes_are_charged(base, make_run, text):
    teacher = trained(base("arch.width=32"))
    student = ["arch=gated_delta_hybrid", "objective=distillation", f"objective.models.teacher={teacher['id']}"]
    run = make_run(*TASK, *student, f"objective.build.text={text}", "budget.flops=3e8")
    row = trained(execute(run))
    alone = measure(make_run(*TASK, "arch=gated_delta_hybrid").config, open_data(run.config)).costs.flops_per_token
    assert row["flops_per_token"] > alone + teacher["flops_per_token"] / 3.01


def test_what_does_not_fit_together_is_refused_in_a_sentence(base, make_run, data):
    with pytest.raises(ValueError, match="cycle has no environment that could check an answer: choose data that does"):
        execute(make_run("objective=grpo"), data)
    with pytest.raises(ValueError, match=r"objective.models.teacher must be given, as objective.models.teacher=\.\.\."):
        make_run("objective=distillation")
    with pytest.raises(ValueError, match="objective.models.teacher=nowhere: neither"):
        make_run("objective=distillation", "objective.models.teacher=nowhere")
    with pytest.raises(ValueError, match="would set apart each end that fills a window"):
        execute(make_run(*TASK, "data.tokens.fill=true", "data.packed=true"))


@pytest.mark.thorough
def test_a_teacher_of_another_kind_teaches_by_its_text_alone(base, make_run):
    teacher = trained(base())["id"]
    settings = [*TASK, "objective=distillation", "objective@objective.base=masked_diffusion", "data.tokens.fill=true"]
    settings += [f"objective.models.teacher={teacher}", "budget.flops=3e8"]
    with pytest.raises(ValueError, match="choose text=teacher hard=true"):
        execute(make_run(*settings))
    trained(execute(make_run(*settings, "objective.build.text=teacher", "objective.build.hard=true")))


def test_a_policy_is_not_told_the_answers_of_its_data(make_run):
    """Its experience is made of the prompts alone: with other answers behind them it is the same."""
    run = make_run(*TASK, "objective=grpo")
    tasks = open_data(run.config)
    objective = build_objective(run.config, tasks)
    model = build_model(run.config, objective)
    tokens = torch.from_numpy(tasks.train[:80].astype(np.int64)).view(-1, 8)
    marks = torch.from_numpy(tasks.train_answers[:80]).view(-1, 8)
    batch = Batch(tokens, marks.float())
    other = replace(batch, tokens_BT=tokens.masked_fill(marks, 3))
    first, second = (objective.experience(model, b, torch.Generator().manual_seed(0)) for b in (batch, other))
    assert torch.equal(first.tokens_BT, second.tokens_BT)
    assert torch.equal(first.extras["advantage"], second.extras["advantage"])
    group = objective.group
    prompts = {text[0] for text in texts_of(tasks, tokens, marks)}
    answers = first.extras["order"] >= 0
    assert {text[0] for text in texts_of(tasks, first.tokens_BT, answers)} == prompts
    assert len(first.tokens_BT) == group * len(tokens) and isinstance(tasks.environment, Sorting)
