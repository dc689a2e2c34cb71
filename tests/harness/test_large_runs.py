"""A run on several processes is the run on one: batches, noise, weights, evaluations and rows, but for rounding."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import Parallel, delayed
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from experiments.harness import launch, processes, rewinding
from experiments.harness.checkpoints import generations
from experiments.harness.run import execute
from experiments.harness.telemetry import Telemetry

# Nine sequences in a step: neither two nor four processes have equal parts.
SMALL = ("budget.batch_tokens=290", "budget.flops=1.5e8", "session.threads=1", "trainer.compile=false")
BEGUN = ("id", "arm", "budget_flops", "width", "learning_rate", "seed")
STEPS = 2  # after which a run is stopped
PROBLEMS = (
    *("data.tokens.train_problems=64", "data.tokens.heldout_problems=16"),
    *("data.sequence_length=15", "data.allow_repeats=true"),
)
RUNS = {
    "answers": (),
    "packed": ("objective=multi_token", "data.packed=true"),
    "masked": ("objective=masked_diffusion", "trainer.evaluations=2"),
    "blocks": ("objective=block_diffusion", "arch.model.tied=true"),
    "experts": (
        *("arch=qwen3_moe", "objective=uniform_diffusion"),
        *("arch.model.channels.moe.balance_loss=1.0", "+arch.model.channels.moe.bias_update_rate=0.01"),
    ),
    "tasks": ("data=countdown", *PROBLEMS, "data.scoring={prompts: 4, samples: 2}"),
    "muon": ("optim=muon", "arch=gated_delta_hybrid"),
    "clipped": ("arch.model.mixers.attention.head_dim=4", "+trainer.clip_logits=0.5"),
}
OFTEN = {
    "EVERY": 1,
    "LASTING": 1,
    "LEAST": STEPS,
    "TO_DEVIATION": -1e9,
}  # with two losses to compare with, all are high


class Stop(BaseException):
    """A kill in the middle of a run."""


def stop(self, trainer, *rest, begin=Telemetry.on_train_batch_start):
    if trainer.global_step == STEPS:
        raise Stop
    begin(self, trainer, *rest)


def data_of(name, data):
    """The data of a run: of `answers` only some tokens count, in some windows many more than in others; of `packed`
    documents end within windows."""
    if name == "packed":
        return replace(data, eot=3)
    if name == "tasks":
        return None
    if name != "answers":
        return data
    rng, density = np.random.default_rng(1), np.repeat([0.02, 0.9, 0.3], 64)
    marks = rng.random(401_000) < np.resize(density, 401_000)
    return replace(data, train_answers=marks[:400_000], heldout_answers=marks[400_000:])


def several(jobs: list, device: torch.device) -> list[dict]:
    """Train runs one after the other on the processes of one launch, each of them (run, data, the columns of
    its row that are known before, whether it is stopped)."""
    rows = []
    with processes.group(device, int(os.environ["LOCAL_RANK"])):
        for run, data, begun, stopped in jobs:
            run.folder.mkdir(parents=True, exist_ok=True)
            whole, Telemetry.on_train_batch_start = Telemetry.on_train_batch_start, stop if stopped else BEGIN
            try:
                rows.append(launch._take_part(run, data, begun, 1))
            except Stop:
                rows.append({"status": "stopped"})
            Telemetry.on_train_batch_start = whole
    return rows


BEGIN = Telemetry.on_train_batch_start


def going_back_often(jobs: list, device: torch.device) -> list[dict]:
    for name, value in OFTEN.items():
        setattr(rewinding, name, value)
    return several(jobs, device)


def on(number: int, jobs: list, logs: Path, work=several) -> list[dict]:
    config = LaunchConfig(
        1, 1, number, rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
    )  # fmt: skip
    found = elastic_launch(config, work)(jobs, torch.device("cpu"))
    assert all([row["status"] for row in found[rank]] == [row["status"] for row in found[0]] for rank in found)
    return found[0]


def compare(run, row, truth, true_row):
    same = (
        "status",
        "steps",
        "tokens",
        "flops",
        "params_total",
        "bits_per_byte_kind",
        "clipped_logits",
        "undone_steps",
    )
    for column in same:
        assert row[column] == true_row[column], row.get("error")
    for column in ("bits_per_byte", "train_loss", "bits_per_byte_se", "bits_per_byte_data_se"):
        assert row[column] == pytest.approx(true_row[column], rel=1e-5, abs=1e-7), column
    nats = [np.load(folder / "heldout_nats.npy") for folder in (run.folder, truth.folder)]
    np.testing.assert_allclose(*nats, rtol=1e-4)
    ours, theirs = (load_file(r.folder / "model.safetensors") for r in (run, truth))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")
    ours, theirs = (pd.read_json(r.folder / "evaluations.jsonl", lines=True) for r in (run, truth))
    assert list(ours.step) == list(theirs.step) and row["tasks"] == true_row["tasks"]


@pytest.mark.thorough
@pytest.mark.parametrize(("number", "names"), [(2, tuple(RUNS)), (4, ("answers", "masked", "muon"))])
def test_a_run_on_several_processes_is_that_on_one_and_goes_on_on_another_number(
    make_run, data, tmp_path, number, names
):
    spread = (f"trainer.devices={number}", "session.checkpoint_seconds=0")
    half = (f"trainer.devices={number // 2}", "session.checkpoint_seconds=0")
    make = lambda name, root, *more: make_run(*SMALL, *RUNS[name], f"session.root={tmp_path / root}", *more)  # noqa: E731
    truths = {name: make(name, "alone") for name in names}
    rows = {name: execute(run, data_of(name, data)) for name, run in truths.items()}
    begun = {name: {column: rows[name][column] for column in BEGUN} for name in names}
    done, jobs, later = [], [], []
    for name in names:
        for strategy in ("ddp", "fsdp"):
            run = make(name, strategy, f"trainer.strategy={strategy}", *spread)
            assert run.id == truths[name].id
            done.append((name, run))
            jobs.append((run, data_of(name, data), begun[name], False))
    stopped = []
    for strategy in ("ddp", "fsdp"):
        for name in ("masked", "muon"):
            first, then = (make(name, f"{strategy}_on", f"trainer.strategy={strategy}", *s) for s in (spread, half))
            jobs.append((first, data_of(name, data), begun[name], True))
            later.append((then, data_of(name, data), begun[name], False))
            stopped.append((name, then))
    found = on(number, jobs, tmp_path / "logs")
    for (name, run), row in zip(done, found, strict=False):
        compare(run, row, truths[name], rows[name])
        assert row["clipped_logits"] != 0
    assert [row["status"] for row in found[len(done) :]] == ["stopped"] * len(stopped)
    assert all([step for step, _ in generations(run.folder)] == [2, 1] for _, run in stopped)
    for (name, run), row in zip(stopped, on(number // 2, later, tmp_path / "more_logs"), strict=True):
        compare(run, row, truths[name], rows[name])


@pytest.mark.thorough
def test_processes_go_back_to_earlier_states_together_and_after_a_stop_on_another_number(
    make_run, data, tmp_path, monkeypatch
):
    for name, value in OFTEN.items():
        monkeypatch.setattr(rewinding, name, value)
    settings = (*SMALL, "budget.flops=5e8", "+trainer.rewind_spikes=1", "session.checkpoint_seconds=0")
    truth = make_run(*settings, f"session.root={tmp_path / 'alone'}")
    true_row = execute(truth, data)
    assert true_row["undone_steps"][0] == [STEPS - 1, STEPS]  # to the older of the states that the stop has left
    begun = {column: true_row[column] for column in BEGUN}

    def make(strategy, root, devices):
        spread = (f"trainer.strategy={strategy}", f"trainer.devices={devices}", f"session.root={tmp_path / root}")
        return make_run(*settings, *spread), data, begun, "on" in root

    jobs = [make(strategy, strategy + root, 2) for strategy in ("ddp", "fsdp") for root in ("", "_on")]
    later = [(*make(strategy, strategy + "_on", 1)[:3], False) for strategy in ("ddp", "fsdp")]
    rows = on(2, jobs, tmp_path / "logs", going_back_often)
    assert [row["status"] for row in rows[1::2]] == ["stopped"] * 2
    for (run, *_), row in zip(
        jobs[::2] + later, rows[::2] + on(1, later, tmp_path / "more_logs", going_back_often), strict=True
    ):
        compare(run, row, truth, true_row)


@pytest.mark.thorough
def test_a_run_on_shards_that_was_stopped_on_two_processes_goes_on_on_one(make_run, data, tmp_path):
    for number, part in enumerate(np.split(data.train[:1601], [555, 556])):  # in the middle of a window
        part.tofile(tmp_path / f"train_{number}.bin")
    data.heldout.tofile(tmp_path / "val.bin")
    shards = (
        *("data=token_bins", f"data.tokens.train={tmp_path}/train_*.bin", f"data.tokens.val={tmp_path}/val.bin"),
        *("data.tokens.format=nanogpt", "data.tokens.heldout_tokens=1000", "data.tokens.bytes_per_token=1.0"),
        *("data.tokens.vocab_size=17", "data.tokens.eot=16"),
    )
    truth = make_run(*SMALL, *shards, f"session.root={tmp_path / 'alone'}")
    true_row = execute(truth)
    first = make_run(*SMALL, *shards, "trainer.devices=2", "session.checkpoint_seconds=0")
    begun = {column: true_row[column] for column in BEGUN}
    assert [row["status"] for row in on(2, [(first, None, begun, True)], tmp_path / "logs")] == ["stopped"]
    then = make_run(*SMALL, *shards)
    assert [step for step, _ in generations(then.folder)] == [2, 1]
    row = execute(then)
    assert row["data_digest"] == true_row["data_digest"] and row["tokens"] > 1601 - 2 * 32
    compare(then, row, truth, true_row)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("trainer.devices=20",), "devices=20.*leave a pass without one: raise budget.batch_tokens or microbatch"),
        (("trainer.microbatch=2", "arch=qwen3_moe"), "balance of arch=qwen3_moe's experts.*take microbatch=null"),
        (("trainer.strategy=fsdp", "objective=wiring"), "wiring reads the weights of the model"),
    ],
)
def test_a_run_that_cannot_be_spread_as_it_is_asked_for_is_refused(make_run, data, changes, words):
    with pytest.raises(ValueError, match=words):
        execute(make_run(*SMALL, *changes), data)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["answers", "packed", "masked", "blocks"])
def test_several_passes_per_step_that_keep_no_more_than_they_need_are_one_pass(make_run, data, tmp_path, name):
    runs = [
        make_run(*SMALL, *RUNS[name], f"session.root={tmp_path / root}", *more)
        for root, more in (("one", ()), ("more", ("trainer.microbatch=2", "trainer.recompute=true")))
    ]
    rows = [execute(run, data_of(name, data)) for run in runs]
    compare(runs[1], rows[1], runs[0], rows[0])


@pytest.mark.thorough
def test_a_run_that_fails_in_its_processes_fails_with_their_reason_and_another_command_finds_it_done(
    make_run, data, monkeypatch
):
    first = make_run(*SMALL)
    execute(first, data)
    row = execute(make_run(*SMALL, "arch.width=32", f"init_from={first.id}", "trainer.devices=2"), data)
    assert row["status"] == "failed" and "of another model: embedding.weight" in row["error"]
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="ask for 1 processes, and torchrun has started 2"):
            execute(first, data)
    found = make_run(*SMALL, "trainer.devices=2")
    assert execute(found, data)["finished"] == execute(first, data)["finished"]


@pytest.mark.thorough
def test_a_cell_of_a_sweep_takes_processes_of_its_own_in_a_worker_of_joblib(make_run, data, tmp_path):
    alone = make_run(*SMALL, f"session.root={tmp_path / 'alone'}")
    run = make_run(*SMALL, "trainer.devices=2", "session.checkpoint_seconds=0")
    (row,) = Parallel(n_jobs=2)([delayed(execute)(run, data)])
    assert row["device"].startswith("2 x ") and not list(run.folder.glob("*.ckpt"))
    assert row["bits_per_byte"] == pytest.approx(execute(alone, data)["bits_per_byte"], rel=1e-5)
