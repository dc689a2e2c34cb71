"""A run that is told to stop writes a checkpoint, ends without a row, and goes on to the same result."""

import json
import os
import signal
import subprocess
from threading import Thread

import pytest

from experiments.harness import ledger
from experiments.harness.checkpoints import generations
from experiments.harness.run import execute
from experiments.harness.training import EVALUATIONS
from experiments.harness.training_module import TrainingModule
from experiments.terminal import stopped_in_a_sentence

SETTINGS = "trainer.evaluations=3", "trainer.evaluation_batch=8", "session.checkpoint_seconds=1000"


class Killed(BaseException):
    """A kill, where one can be counted on."""


def send(monkeypatch, number, hook="training_step", call=7, send_it=None):
    """Send this process a signal at a call of a step of training or of evaluation."""
    original, calls = getattr(TrainingModule, hook), []

    def told(self, *rest):
        calls.append(None)
        if len(calls) == call:
            (send_it or os.kill)(os.getpid(), number)
        return original(self, *rest)

    monkeypatch.setattr(TrainingModule, hook, told)


def evaluations(run):
    """By step; the last line of a step counts."""
    lines = map(json.loads, (run.folder / EVALUATIONS).read_text().splitlines())
    return {line["step"]: line for line in lines}


@pytest.fixture
def same_as_undisturbed(make_run, data):
    def check(run):
        whole = make_run(*SETTINGS, f"session.root={run.session.root}-whole")
        rows = [execute(each, data) for each in (whole, run)]
        for column in ("status", "bits_per_byte", "train_loss", "tasks"):
            assert rows[0][column] == rows[1][column]
        for name in ("model.safetensors", "heldout_nats.npy"):
            assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
        assert evaluations(run) == evaluations(whole)

    return check


@pytest.mark.parametrize(
    ("hook", "call", "steps"),
    [("training_step", 1, [1]), ("training_step", 7, [7]), ("validation_step", 2, [17]), ("validation_step", 12, [])],
    ids=["in the first step", "in a step", "in an evaluation", "in the last evaluation"],
)
def test_a_run_that_is_told_to_stop_writes_a_checkpoint_and_goes_on_to_the_same_result(
    make_run, data, monkeypatch, same_as_undisturbed, hook, call, steps
):
    run = make_run(*SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        send(patch, signal.SIGTERM, hook, call)
        execute(run, data)
    assert ended.value.code == 128 + signal.SIGTERM
    assert ledger.read(run.ledger).empty and not (run.folder / "row.json").exists()
    assert [found for found, _ in generations(run.folder)] == steps
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    same_as_undisturbed(run)


def test_an_evaluation_in_which_a_run_is_killed_is_made_again(make_run, data, monkeypatch, same_as_undisturbed):
    def kill(*_):
        raise Killed

    run = make_run(*SETTINGS[:2], "session.checkpoint_seconds=0")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        send(patch, None, "validation_step", 2, kill)
        execute(run, data)
    assert generations(run.folder)[0][0] == 16, "a checkpoint of step 17 would leave its evaluation out"
    same_as_undisturbed(run)


def test_all_processes_of_a_run_stop_at_the_step_at_which_one_is_told(make_run, data, monkeypatch):
    def agreed(self, decision, all=True):
        return self.lightning_module.global_step == 7  # another process says so

    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce_boolean_decision", agreed)
    run = make_run(*SETTINGS)
    with pytest.raises(SystemExit) as ended:
        execute(run, data)
    assert ended.value.code == 128 + signal.SIGTERM and generations(run.folder)[0][0] == 7


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_warning_of_slurm_stops_a_run_with_our_checkpoint_and_not_with_lightnings(
    make_run, data, monkeypatch, number
):
    for name, value in {"NTASKS": "1", "JOB_ID": "7", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(subprocess, "call", lambda *_: pytest.fail("requeued by Lightning"))
    send(monkeypatch, number)
    run = make_run(*SETTINGS)
    with pytest.raises(SystemExit) as ended:
        execute(run, data)
    assert ended.value.code == 128 + number
    assert [path.name for path in run.folder.glob("**/*.ckpt")] == [path.name for _, path in generations(run.folder)]


def test_a_launcher_that_has_a_use_for_the_signal_gets_it_after_the_checkpoint(make_run, data, monkeypatch):
    run, seen = make_run(*SETTINGS), []
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append(generations(run.folder)[0][0]))
    try:
        send(monkeypatch, signal.SIGUSR2)
        assert execute(run, data)["status"] == "done", "it did not ask for an end"
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen == [7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_is_stopped_in_a_step_says_what_is_kept(make_run, data, monkeypatch, capsys, number):
    send(monkeypatch, number)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are told to ignore it
    try:
        with pytest.raises(SystemExit) as ended, stopped_in_a_sentence():
            execute(make_run(*SETTINGS), data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and "what is finished is kept; start the same command" in capsys.readouterr().err


def test_a_run_in_another_thread_leaves_signals_as_they_are(make_run, data, monkeypatch):
    handlers = []
    send(monkeypatch, signal.SIGTERM, send_it=lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)))
    rows = []
    thread = Thread(target=lambda: rows.append(execute(make_run(*SETTINGS), data)))
    thread.start()
    thread.join()
    assert rows[0]["status"] == "done" and handlers == [signal.SIG_DFL]
