"""Post-training on several processes is that on one but for rounding: answers, rewards, references, teachers, pairs."""

import pytest
import torch
from safetensors.torch import load_file

from experiments.harness.run import execute
from tests.harness.test_large_runs import BEGUN, STEPS, compare, on

ALL = ("session.threads=1", "trainer.compile=false", "data.allow_repeats=true", "optim.learning_rate=0.001")
SORTING = "{_target_: experiments.data.environments.sorting.Sorting, length: 2, digits: 1}"
CHANCE = "experiments.data.environments.chance.Chance"  # so that every group has answers that are better than others
# Five prompts, or pairs, in a step: neither two nor four processes have equal parts.
TASK = (
    *(
        "data=sorting",
        "~data.tokens.environment",
        f"+data.tokens.environment={{_target_: {CHANCE}, rate: 0.5, environment: {SORTING}}}",
    ),
    *("data.sequence_length=8", "data.tokens.train_problems=60", "data.tokens.heldout_problems=6"),
    *("data.tokens.demonstrations=1", "data.scoring={prompts: 6, samples: 4}", "budget.batch_tokens=40"),
)
FILLED = (*TASK, "data.tokens.fill=true")
PAIRS = (
    *("data=ranked_pairs", "data.sequence_length=15", "data.tokens.train_pairs=60", "data.tokens.heldout_pairs=10"),
    *("data.scoring=null", "budget.batch_tokens=150"),
)
RL = ("objective=grpo", "objective.build.group=4", "budget.flops=2e8")
TAUGHT = ("objective=distillation", "budget.flops=5e7")
MASKED = ("objective@objective.base=masked_diffusion",)
KL = "objective.build.kl={_target_: objectives.post_training.policy_gradient.KLPenalty, coefficient: 0.1}"
BASES = {
    "text": (*TASK, "budget.flops=4e8", "budget.batch_tokens=128"),
    "filled": (*FILLED, "objective=masked_diffusion", "budget.flops=4e8", "budget.batch_tokens=128"),
    "mixture": (*TASK, "arch=qwen3_moe", "budget.flops=2e8"),
    "pairs": (*PAIRS, "budget.flops=1e8"),
    "judge": (*PAIRS, "objective=reward_model", "budget.flops=1e8"),
}
DDP, FSDP, PASSES = ("trainer.strategy=ddp",), ("trainer.strategy=fsdp",), ("trainer.microbatch=3",)
# What each begins from, its settings, and how it is spread.
RUNS = {
    "rewards": ("text", (*TASK, *RL, "objective.build.updates=3", KL), DDP + FSDP),
    "tokens": ("text", (*TASK, *RL, "objective.build.normaliser=tokens"), DDP + PASSES),
    "adapters": ("text", (*TASK, *RL, "adapter=lora", "adapter.rank=2"), DDP + FSDP),
    "judged": ("pairs", (*PAIRS, *RL, "objective.models.reward=judge", "budget.flops=3e8"), DDP + FSDP),
    "trajectories": (
        "filled",
        (*FILLED, *RL, "objective=diffusion_grpo", "objective.build.updates=2", "budget.flops=8e8"),
        DDP,
    ),
    "preferences": (
        "pairs",
        (*PAIRS, "objective=dpo", *MASKED, "objective.build.draws=2", "budget.flops=3e8"),
        DDP + FSDP,
    ),
    "labels": ("pairs", (*PAIRS, "objective=reward_model", "budget.flops=5e7"), DDP + FSDP),
    "no reference": ("pairs", (*PAIRS, "objective=simpo", "budget.flops=5e7"), DDP + FSDP),
    "own text": (
        "filled",
        (*TASK, *TAUGHT, "objective.models.teacher=text", "objective.build.text=student"),
        DDP + FSDP,
    ),
    "taught": ("text", (*FILLED, *TAUGHT, *MASKED, "objective.models.teacher=filled", "data.scoring=null"), DDP + FSDP),
    "mixture": ("mixture", (*TASK, *RL, KL, "arch=qwen3_moe"), ("trainer.experts=2",)),
    "wiring": ("text", (*TASK, "objective=wiring", "objective.build.strength=0.01", "budget.flops=2e7"), DDP),
}


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "names"), [(2, tuple(RUNS)), (4, ("rewards", "trajectories", "preferences"))])
def test_a_tuning_on_several_processes_is_that_on_one_and_goes_on_on_another_number(make_run, tmp_path, number, names):
    bases = {}
    for name, settings in BASES.items():
        run = make_run(*ALL, *settings, f"session.root={tmp_path / 'bases'}")
        assert execute(run)["status"] == "done"
        bases[name] = run.folder

    def make(name, root, *more):
        of, settings, _ = RUNS[name]
        settings = [
            f"{setting.split('=')[0]}={bases[setting.split('=')[1]]}" if ".models." in setting else setting
            for setting in settings
        ]
        return make_run(*ALL, *settings, f"init_from={bases[of]}", f"session.root={tmp_path / root}", *more)

    done, jobs, stopped, later = [], [], [], []
    for name in names:
        truth = make(name, "alone")
        row = execute(truth)
        assert row["status"] == "done", row["error"]
        assert row["steps"] > STEPS
        begun, ended = (load_file(folder / "model.safetensors") for folder in (bases[RUNS[name][0]], truth.folder))
        assert not all(torch.equal(begun[n], ended[n]) for n in begun if begun[n].shape == ended[n].shape)
        known = {column: row[column] for column in BEGUN}
        for spread in RUNS[name][2]:
            run = make(name, spread.partition("=")[2], f"trainer.devices={number}", spread)
            assert run.id == truth.id
            done.append((run, truth, row))
            jobs.append((run, None, known, False))
        if name == "rewards":  # in the midst of the updates on one experience
            for spread in RUNS[name][2]:
                often = (f"{spread.partition('=')[2]}_on", spread, "session.checkpoint_seconds=0")
                first, then = (make(name, *often, f"trainer.devices={n}") for n in (number, number // 2))
                jobs.append((first, None, known, True))
                stopped.append((then, truth, row))
                later.append((then, None, known, False))
    found = on(number, jobs, tmp_path / "logs")
    assert all((row == {"status": "stopped"}) == job[3] for row, job in zip(found, jobs, strict=True))
    found = [row for row in found if row["status"] != "stopped"] + on(number // 2, later, tmp_path / "more_logs")
    for (run, truth, true_row), row in zip(done + stopped, found, strict=True):
        compare(run, row, truth, true_row)


def test_a_router_whose_losses_are_means_over_tokens_is_refused_where_sequences_bring_more_of_them_than_others(
    make_run,
):
    experts = ("arch=qwen3_moe", "+arch.model.channels.moe.z_loss=0.1", "objective=diffusion_grpo", "trainer.devices=2")
    with pytest.raises(ValueError, match="means over tokens.*take devices=1 and microbatch=null, or no balance_loss"):
        execute(make_run(*ALL, *FILLED, *experts))


def test_trajectories_are_refused_where_all_devices_pass_through_the_model_together(make_run):
    cut = ("objective=diffusion_grpo", "trainer.devices=2", "trainer.strategy=fsdp")
    with pytest.raises(ValueError, match="grpo brings some sequences through the model more often.*choose ddp"):
        execute(make_run(*ALL, *FILLED, *cut))
