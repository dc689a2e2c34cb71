"""A run is a pure function of its config: done once, found again, resumed exactly, honest when it fails."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import sample
from experiments.data.windows import heldout_windows
from experiments.harness import ledger, training, weights
from experiments.harness import run as run_module
from experiments.harness.assembly import prepare_run
from experiments.harness.run import execute
from experiments.harness.trainer import Trainer
from experiments.harness.weights import load_run
from objectives.contracts import Batch
from objectives.next_token import NextToken

PAIRS = [(a, o) for a in ("transformer", "gated_delta_hybrid") for o in ("next_token", "masked_diffusion")]
pairs = pytest.mark.parametrize(("arch", "objective"), PAIRS)


@pytest.mark.thorough
@pairs
def test_every_backbone_trains_under_every_objective_and_learns(make_run, data, arch, objective):
    run = make_run(f"arch={arch}", f"objective={objective}", "budget.flops=4e9")
    row = execute(run, data)
    assert row["status"] == "done", row["error"]
    assert list(row) == ledger.COLUMNS
    assert row["bits_per_byte"] < math.log2(16) - 0.3  # below a uniform guess
    entropy = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2))
    assert row["bits_per_byte"] > entropy - 3 * row["bits_per_byte_data_se"]  # and not below the truth
    exact = objective == "next_token"
    assert (row["bits_per_byte_kind"] == "exact") == exact and (row["bits_per_byte_se"] == 0) == exact
    assert row["flops"] == row["flops_per_token"] * row["tokens"] <= row["budget_flops"]
    nats = np.load(run.folder / "heldout_nats.npy")
    assert nats.sum() / math.log(2) / data.heldout_bytes == pytest.approx(row["bits_per_byte"])


def test_every_seed_and_step_draws_noise_of_its_own(make_run, data, monkeypatch):
    drawn, original = [], NextToken.loss

    def loss(self, model, batch, generator):
        drawn.append(float(torch.rand((), generator=generator)))
        return original(self, model, batch, generator)

    monkeypatch.setattr(NextToken, "loss", loss)
    for seed in (0, 1, 20261123):
        execute(make_run(f"seed={seed}"), data)
    assert len(set(drawn)) == len(drawn)


def test_a_finished_run_is_not_trained_again(make_run, data, monkeypatch):
    first = execute(make_run(), data)
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
    again = execute(make_run(), data)
    assert again["finished"] == first["finished"] and again["bits_per_byte"] == first["bits_per_byte"]
    assert len(ledger.read(make_run().ledger)) == 1


def test_a_row_that_did_not_reach_the_ledger_is_added_from_the_runs_folder(make_run, data, monkeypatch):
    run = make_run()
    first = execute(run, data)
    run.ledger.write_text("")
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trained again"))
    execute(run, data)
    assert ledger.read(run.ledger).iloc[0].bits_per_byte == first["bits_per_byte"]


@pytest.mark.thorough
@pytest.mark.parametrize(("arch", "objective"), PAIRS[1:3])
def test_a_run_that_was_stopped_resumes_exactly(make_run, data, first_steps, killed_at, arch, objective):
    settings = [f"arch={arch}", f"objective={objective}", "session.checkpoint_seconds=0"]
    whole = make_run(*settings, f"session.root={make_run().session.root}-whole")
    truth = execute(whole, data)
    run = make_run(*settings)
    with killed_at(7):
        execute(run, data)
    assert ledger.read(run.ledger).empty
    row = execute(run, data)
    assert first_steps == [0, 0, 7], "started from the beginning"
    assert row["bits_per_byte"] == truth["bits_per_byte"] and row["train_loss"] == truth["train_loss"]
    for name in ("model.safetensors", "heldout_nats.npy"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_divergence_is_a_row_and_not_a_crash(make_run, data):
    row = execute(make_run("optim.learning_rate=1e30"), data)
    assert row["status"] == "diverged" and row["bits_per_byte"] is None and "step" in row["error"]
    again = execute(make_run("optim.learning_rate=1e30"), data)
    assert json.loads(json.dumps(again, allow_nan=False)) == json.loads(json.dumps(row))


def test_tensorboard_has_every_curve_over_steps_tokens_and_flops(make_run, data):
    run = make_run("trainer.evaluations=2")
    row = execute(run, data)
    events = EventAccumulator(str(run.folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    names = ("loss", "gradient_norm", "tokens_per_second", "model_flops_utilisation", "petaflops", "learning_rate")
    for axis in ("", "_by_tokens", "_by_megaflops"):
        assert {f"train{axis}/{name}" for name in names} | {f"heldout{axis}/bits_per_byte"} <= tags
    assert events.Scalars("train/loss")[-1].step == row["steps"]
    assert events.Scalars("train_by_tokens/loss")[-1].step == row["tokens"]
    assert events.Scalars("heldout/bits_per_byte")[-1].value == pytest.approx(row["bits_per_byte"], rel=1e-5)
    assert len(events.Scalars("heldout/bits_per_byte")) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system keeps no maximum that can be reset")
def test_the_memory_in_a_row_is_that_of_this_run_with_the_preparing_of_its_data(make_run, data, monkeypatch):
    def in_much_memory(config):
        np.ones(25_000_000).sum()
        return data

    execute(make_run(), data)  # what a first run imports stays in memory
    monkeypatch.setattr(run_module, "open_data", in_much_memory)
    much = execute(make_run("seed=1"))
    little = execute(make_run("seed=2"), data)
    assert much["peak_memory_bytes"] - little["peak_memory_bytes"] > 150_000_000


@pytest.mark.parametrize(
    ("evaluations", "share", "taken"),
    [("auto", 0.5, 1), ("auto", 0.06, 1), ("auto", 0.04, 2), ("auto", 0.001, 4), (7, 0.5, 7)],
)
def test_evaluations_cost_a_tenth_of_the_training_unless_more_are_asked_for(make_config, evaluations, share, taken):
    trainer = instantiate(make_config(f"trainer.evaluations={evaluations}").trainer)
    assert trainer.evaluations_in(1e12, share * 1e12) == taken


@pytest.mark.parametrize("objective", ["next_token", "masked_diffusion"])
def test_the_price_of_an_evaluation_is_that_of_its_passes(make_run, data, monkeypatch, objective):
    priced, run = [], make_run(f"objective={objective}", "trainer.evaluations=auto")
    monkeypatch.setattr(Trainer, "evaluations_in", lambda self, training, one: priced.append(one) or 1)
    row = execute(run, data)
    draws = {"next_token": 1, "masked_diffusion": 2}[objective]
    assert priced == [pytest.approx(draws * row["flops_per_token"] / 3 * len(data.heldout))]


@pytest.mark.thorough
def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(make_run, data):
    rows = [
        execute(make_run(f"seed={seed}", f"session.root={make_run().session.root}{i}"), data)
        for i, seed in enumerate((3, 3, 4))
    ]
    assert rows[0]["bits_per_byte"] == rows[1]["bits_per_byte"] != rows[2]["bits_per_byte"]


@pytest.mark.slow
def test_compiled_and_eager_runs_agree(make_run, data):
    eager = execute(make_run("trainer.compile=false"), data)
    compiled = execute(make_run("trainer.compile=true"), data)
    assert compiled["compiled"] and not eager["compiled"]
    assert compiled["bits_per_byte"] == pytest.approx(eager["bits_per_byte"], abs=2e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("budget.flops=10", "does not pay for one step"),
        ("budget.flops=1e13", "data.allow_repeats=true"),
        ("arch.model.pattern=[attention,attention,attention]", "depth 4"),
        ("trainer.precision=fp8", "trainer.precision='fp8': choose one of auto, float32, bf16"),
        ("trainer.accelerator=tpu", "choose one of auto, cpu, cuda"),
        ("trainer.devices=2", "trainer.devices=2.*steps of 1 to 2 sequences leave a pass without one"),
        ("trainer.nodes=2", "trainer.nodes=2: start it on each node with torchrun"),
        ("trainer.strategy=zero", "trainer.strategy='zero' must be one of 'auto', 'ddp' or 'fsdp'"),
        ("trainer.microbatch=0", "trainer.microbatch=0 must be at least 1"),
        ("trainer.evaluations=0", "trainer.evaluations=0 must be at least 1"),
        ("optim.learning_rate=-1", "optim.learning_rate=-1 must be above 0"),
        ("schedule.warmup=2", "schedule.warmup=2 must be a fraction"),
    ],
)
def test_a_config_that_cannot_run_says_what_to_do(make_run, data, change, words):
    with pytest.raises((ValueError, InstantiationException), match=words):
        execute(make_run(change), data)
    assert ledger.read(make_run().ledger).empty


def test_blocks_on_a_recurrent_backbone_and_blocks_that_do_not_divide_the_length_are_refused(make_run, data):
    run = make_run("objective=block_diffusion", "arch=gated_delta_hybrid")
    with pytest.raises(
        ValueError, match="block_diffusion with arch=gated_delta_hybrid: it needs block-causal.*choose another"
    ):
        execute(run, data)
    with pytest.raises(ValueError, match="block_size=7 does not divide sequence_length=32"):
        execute(make_run("objective=block_diffusion", "objective.build.block_size=7"), data)


def test_an_objective_that_a_mixer_cannot_serve_is_refused_in_a_sentence(make_run, data, monkeypatch):
    from archs.mixers.gated_delta import GatedDelta
    from archs.visibility import Kind

    monkeypatch.setattr(GatedDelta, "visibilities", frozenset({Kind.CAUSAL}))
    with pytest.raises(ValueError, match="arch=gated_delta_hybrid: it needs bidirectional visibility.*choose another"):
        prepare_run(make_run("arch=gated_delta_hybrid", "objective=masked_diffusion"), data)


@pytest.mark.thorough
@pytest.mark.parametrize("scoring", ["{prompts: 4, samples: 2}", "null"])
def test_a_run_is_scored_by_its_tasks_unless_scoring_is_null(make_run, scoring):
    problems = "data.tokens.train_problems=64", "data.tokens.heldout_problems=16", "data.sequence_length=15"
    row = execute(make_run("data=countdown", *problems, "data.allow_repeats=true", f"data.scoring={scoring}"))
    assert row["status"] == "done", row["error"]
    assert (row["tasks"] is None) == (scoring == "null")


def test_the_row_is_plain_json(make_run, data):
    assert json.loads(json.dumps(execute(make_run(), data), allow_nan=False))["status"] == "done"


def test_a_finished_run_loads_again_and_gives_the_same_bits(make_run, data, monkeypatch):
    run = make_run("arch.model.tied=true")
    execute(run, data)
    monkeypatch.setattr(weights, "open_data", lambda config: data)
    loaded = load_run(run.folder)
    tokens_BT, _ = heldout_windows(data.heldout, 32)
    nats_B = loaded.objective.evaluate(loaded.model, Batch.of(tokens_BT), torch.Generator()).nats_B
    assert nats_B.numpy() == pytest.approx(np.load(run.folder / "heldout_nats.npy")[: len(nats_B)], rel=1e-4)


def test_prompts_are_spelled_without_loss(data):
    assert data.decode(sample.encode("abcpa", data)) == "abcpa"
    assert sample.encode_with_masks("ab__c", "_", data) == [0, 1, -1, -1, 2]
    with pytest.raises(ValueError, match="prompt='ax': cycle is written without 'x'; its pieces are 'a', 'b'"):
        sample.encode("ax", data)


def test_sampling_from_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        load_run(tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("objective", ["next_token", "multi_token", "masked_diffusion", "uniform_diffusion"])
def test_packed_windows_train_and_cost_what_their_documents_cost_alone(make_run, data, objective):
    """The end of a document is the symbol 3 here, so documents of several lengths stand in each window."""
    ended = replace(data, eot=3)
    apart, together = (
        execute(make_run(f"objective={objective}", f"data.packed={packed}", "budget.flops=6e8"), ended)
        for packed in ("true", "false")
    )
    assert apart["status"] == together["status"] == "done", apart["error"]
    assert apart["flops_per_token"] < together["flops_per_token"]
    if objective == "next_token":
        assert apart["bits_per_byte"] > together["bits_per_byte"]  # each document begins without a past


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("optim", "schedule"),
    [("adamw", "linear"), ("adamw", "cosine"), ("adamw", "constant_then_decay"), ("muon", "linear")],
)
def test_every_optimiser_and_schedule_trains_from_its_config(make_run, data, optim, schedule):
    row = execute(make_run(f"optim={optim}", f"schedule={schedule}", "arch=qwen3_moe", "budget.flops=1e9"), data)
    assert row["status"] == "done", row["error"]
    assert (row["optimiser"], row["schedule"]) == (
        {"muon": "Muon", "adamw": "AdamW"}[optim],
        {"linear": "Linear", "cosine": "Cosine"}.get(schedule, "ConstantThenDecay"),
    )
    assert row["bits_per_byte"] < math.log2(16) - 0.3
    steps_cost = row["flops"] - row["flops_per_token"] * row["tokens"]
    assert (steps_cost > 0) == (optim == "muon") and row["flops"] <= row["budget_flops"] * (1 + 1e-9)
