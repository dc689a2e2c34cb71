"""A run is a pure function of its config: done once, found again, resumed exactly, honest when it fails."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import sample
from experiments.data.windows import heldout_windows
from experiments.harness import ledger
from experiments.harness import run as run_module
from experiments.harness.run import execute, plan, run_id
from experiments.harness.telemetry import Telemetry

PAIRS = [(a, o) for a in ("transformer", "gated_delta_hybrid") for o in ("next_token", "masked_diffusion")]
pairs = pytest.mark.parametrize(("arch", "objective"), PAIRS)


def cell(config):
    return f"{config.root}/cells/{run_id(config)}"


@pairs
def test_every_backbone_trains_under_every_objective_and_learns(make_config, data, arch, objective):
    config = make_config(f"arch={arch}", f"objective={objective}", "budget.flops=4e9")
    row = execute(config, data)
    assert row["status"] == "done", row["error"]
    assert list(row) == ledger.COLUMNS
    assert row["bits_per_byte"] < math.log2(16) - 0.3  # below a uniform guess
    entropy = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2))
    assert row["bits_per_byte"] > entropy - 3 * row["bits_per_byte_data_se"]  # and not below the truth
    exact = objective == "next_token"
    assert (row["bits_per_byte_kind"] == "exact") == exact and (row["bits_per_byte_se"] == 0) == exact
    assert row["flops"] == row["flops_per_token"] * row["tokens"] <= row["budget_flops"]
    nats = np.load(cell(config) + "/heldout_nats.npy")
    assert nats.sum() / math.log(2) / data.heldout_bytes == pytest.approx(row["bits_per_byte"])


def test_a_finished_run_is_not_trained_again(make_config, data, monkeypatch):
    first = execute(make_config(), data)
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained again"))
    again = execute(make_config(), data)
    assert again["finished"] == first["finished"] and again["bits_per_byte"] == first["bits_per_byte"]
    assert len(ledger.read(f"{make_config().root}/ledger.jsonl")) == 1


def test_a_row_that_did_not_reach_the_ledger_is_added_from_the_runs_folder(make_config, data, monkeypatch):
    config = make_config()
    first = execute(config, data)
    path = f"{config.root}/ledger.jsonl"
    open(path, "w").close()
    monkeypatch.setattr(run_module, "_train", lambda *_: pytest.fail("trained again"))
    execute(config, data)
    assert ledger.read(path).iloc[0].bits_per_byte == first["bits_per_byte"]


class Stop(BaseException):
    """A kill in the middle of a run."""


@pairs
def test_a_run_that_was_stopped_resumes_exactly(make_config, data, monkeypatch, arch, objective):
    settings = [f"arch={arch}", f"objective={objective}", "trainer.checkpoint_seconds=0"]
    whole = make_config(*settings, "root=" + str(make_config().root) + "-whole")
    truth = execute(whole, data)
    config = make_config(*settings)
    original = Telemetry.on_train_batch_start

    def stop_at_7(self, trainer, *rest):
        if trainer.global_step == 7:
            raise Stop
        original(self, trainer, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Telemetry, "on_train_batch_start", stop_at_7)
        execute(config, data)
    assert ledger.read(f"{config.root}/ledger.jsonl").empty
    steps = []

    def watch(self, trainer, *rest):
        steps.append(trainer.global_step)
        original(self, trainer, *rest)

    monkeypatch.setattr(Telemetry, "on_train_batch_start", watch)
    row = execute(config, data)
    assert steps[0] > 0, "started from the beginning"
    assert row["bits_per_byte"] == truth["bits_per_byte"] and row["train_loss"] == truth["train_loss"]
    for name in ("model.safetensors", "heldout_nats.npy"):
        assert open(f"{cell(config)}/{name}", "rb").read() == open(f"{cell(whole)}/{name}", "rb").read()


def test_divergence_is_a_row_and_not_a_crash(make_config, data):
    row = execute(make_config("optim.learning_rate=1e30"), data)
    assert row["status"] == "diverged" and row["bits_per_byte"] is None and "step" in row["error"]
    again = execute(make_config("optim.learning_rate=1e30"), data)
    assert json.loads(json.dumps(again, allow_nan=False)) == json.loads(json.dumps(row))


def test_a_crash_is_a_row_and_is_tried_again(make_config, data, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "_train", broken)
        row = execute(make_config(), data)
    assert row["status"] == "failed" and row["error"] == "RuntimeError: out of memory"
    assert execute(make_config(), data)["status"] == "done"
    assert ledger.read(f"{make_config().root}/ledger.jsonl").status.tolist() == ["done"]


@pytest.mark.parametrize(
    "change", ["seed=1", "arch.width=32", "budget.flops=4e8", "optim.learning_rate=0.02", "objective=masked_diffusion"]
)
def test_what_changes_the_result_changes_the_id(make_config, change):
    assert run_id(make_config()) != run_id(make_config(change))


@pytest.mark.parametrize("change", ["root=elsewhere", "trainer.checkpoint_seconds=1", "kind=fit", "arm=x"])
def test_what_does_not_change_the_result_does_not_change_the_id(make_config, change):
    assert run_id(make_config()) == run_id(make_config(change))


def test_tensorboard_has_every_curve_over_steps_tokens_and_flops(make_config, data):
    config = make_config("trainer.evaluations=2")
    row = execute(config, data)
    events = EventAccumulator(cell(config))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    names = ("loss", "gradient_norm", "tokens_per_second", "model_flops_utilisation", "petaflops", "learning_rate")
    for axis in ("", "_by_tokens", "_by_megaflops"):
        assert {f"train{axis}/{name}" for name in names} | {f"heldout{axis}/bits_per_byte"} <= tags
    assert events.Scalars("train/loss")[-1].step == row["steps"]
    assert events.Scalars("train_by_tokens/loss")[-1].step == row["tokens"]
    assert events.Scalars("heldout/bits_per_byte")[-1].value == pytest.approx(row["bits_per_byte"], rel=1e-5)
    assert len(events.Scalars("heldout/bits_per_byte")) == 2


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(make_config, data):
    rows = [
        execute(make_config(f"seed={seed}", f"root={make_config().root}{i}"), data) for i, seed in enumerate((3, 3, 4))
    ]
    assert rows[0]["bits_per_byte"] == rows[1]["bits_per_byte"] != rows[2]["bits_per_byte"]


@pytest.mark.slow
def test_compiled_and_eager_runs_agree(make_config, data):
    eager = execute(make_config("trainer.compile=false"), data)
    compiled = execute(make_config("trainer.compile=true"), data)
    assert compiled["compiled"] and not eager["compiled"]
    assert compiled["bits_per_byte"] == pytest.approx(eager["bits_per_byte"], abs=2e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("budget.flops=10", "does not pay for one step"),
        ("budget.flops=1e13", "data.allow_repeats=true"),
        ("arch.model.pattern=[attention,attention,attention]", "depth 4"),
        ("trainer.precision=fp8", "choose auto, float32 or bf16"),
        ("trainer.accelerator=tpu", "choose auto, cpu or cuda"),
    ],
)
def test_a_config_that_cannot_run_says_what_to_do(make_config, data, change, words):
    with pytest.raises((ValueError, InstantiationException), match=words):
        execute(make_config(change), data)
    assert ledger.read(f"{make_config().root}/ledger.jsonl").empty


def test_blocks_on_a_recurrent_backbone_and_blocks_that_do_not_divide_the_length_are_refused(make_config, data):
    config = make_config("objective=block_diffusion", "arch=gated_delta_hybrid")
    with pytest.raises(
        ValueError, match="needs block-causal visibility.*gated_delta_hybrid can only do.*choose another"
    ):
        execute(config, data)
    with pytest.raises(ValueError, match="block_size=7 does not divide sequence_length=32"):
        execute(make_config("objective=block_diffusion", "objective.build.block_size=7"), data)


def test_an_objective_that_a_mixer_cannot_serve_is_refused_in_a_sentence(make_config, data, monkeypatch):
    from archs.mixers.gated_delta import GatedDelta
    from archs.visibility import CAUSAL

    monkeypatch.setattr(GatedDelta, "visibilities", frozenset({CAUSAL}))
    with pytest.raises(
        ValueError, match="needs bidirectional visibility.*gated_delta_hybrid can only do.*choose another"
    ):
        plan(make_config("arch=gated_delta_hybrid", "objective=masked_diffusion"), data)


def test_the_row_is_plain_json(make_config, data):
    assert json.loads(json.dumps(execute(make_config(), data), allow_nan=False))["status"] == "done"


def test_a_finished_run_loads_again_and_gives_the_same_bits(make_config, data, monkeypatch):
    config = make_config("arch.model.tied=true")
    execute(config, data)
    monkeypatch.setattr(sample, "open_data", lambda config: data)
    model, objective, _ = sample.load(Path(cell(config)))
    tokens_BT, _ = heldout_windows(data.heldout, 32)
    nats_B = objective.bound(model, tokens_BT, torch.Generator()).nats_B
    assert nats_B.numpy() == pytest.approx(np.load(cell(config) + "/heldout_nats.npy")[: len(nats_B)], rel=1e-4)


def test_prompts_are_spelled_without_loss(data):
    assert data.decode(sample.encode("abcpa", data)) == "abcpa"


def test_sampling_from_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no finished run"):
        sample.load(tmp_path)


def test_a_prompt_may_have_gaps(data):
    ids = sample.encode_with_gaps("ab__p", "_", data)
    assert ids == [*sample.encode("ab", data), -1, -1, *sample.encode("p", data)]
    assert sample.encode_with_gaps("ab", None, data) == sample.encode("ab", data)
