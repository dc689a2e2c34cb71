"""A disk that fills up at any write of a run: one sentence, nothing torn, and the run goes on when there is room."""

import errno
import json
import os
from pathlib import Path

import lightning
import numpy as np
import pytest
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from tensorboard.summary.writer.record_writer import RecordWriter

from experiments.harness import ledger, weights
from experiments.harness.run import execute
from experiments.harness.stopping import Checkpoints
from experiments.harness.training import EVALUATIONS
from experiments.terminal import mistakes_in_a_sentence

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full"),
]
SETTINGS = "trainer.evaluations=2", "session.checkpoint_seconds=0"


def fill(monkeypatch, run, name):
    """Make the disk full for one of the files of a run."""

    def no_room(self, path, *rest, **more):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room_for_tensors(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def no_room_for_a_row(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if name == "checkpoint":
        save = lightning.Trainer.save_checkpoint
        monkeypatch.setattr(
            lightning.Trainer,
            "save_checkpoint",
            lambda self, *rest: no_room(self, *rest) if self.global_step == 9 else save(self, *rest),
        )
    elif name == "model.safetensors":
        monkeypatch.setattr(weights, "save_file", no_room_for_tensors)
    elif name == "ledger.jsonl":
        monkeypatch.setattr(os, "fsync", no_room_for_a_row)
    elif name == "events":
        monkeypatch.setattr(RecordWriter, "write", no_room_for_a_row)
    else:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / f"{name}.tmp").symlink_to("/dev/full")


def check_nothing_is_torn(run):
    for path in run.folder.iterdir():
        assert path.suffix != ".tmp" and path.name != "unfinished.ckpt", path
    for name, read in (
        ("origin.json", lambda path: json.loads(path.read_text())),
        ("row.json", lambda path: json.loads(path.read_text())),
        ("config.yaml", OmegaConf.load),
        ("heldout_nats.npy", np.load),
        ("model.safetensors", load_file),
        (EVALUATIONS, lambda path: list(map(json.loads, path.read_text().splitlines()))),
    ):
        if (run.folder / name).exists():
            read(run.folder / name)
    if run.ledger.exists():
        list(map(json.loads, run.ledger.read_text().splitlines()))


WRITES = ["origin.json", "config.yaml", "events", "checkpoint", EVALUATIONS, "heldout_nats.npy", "model.safetensors"]
WRITES += ["row.json", "ledger.jsonl"]


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_disk_that_is_full_at_a_write_ends_the_run_in_a_sentence_and_loses_nothing(
    make_run, data, monkeypatch, capsys, name
):
    run = make_run(*SETTINGS)
    try:
        with monkeypatch.context() as patch, mistakes_in_a_sentence():
            fill(patch, run, name)
            said = execute(run, data)["error"]
    except SystemExit:
        said = capsys.readouterr().err
    assert ("disk full: free some and start again" in said) or (name == "events" and "No space left" in said)
    assert said.strip().count("\n") == 0
    check_nothing_is_torn(run)
    trained, due = [], Checkpoints.on_train_batch_end
    monkeypatch.setattr(Checkpoints, "on_train_batch_end", lambda *args: trained.append(None) or due(*args))
    row = execute(run, data)
    assert row["status"] == "done" and ledger.read(run.ledger).status.tolist() == ["done"]
    begun = {"origin.json": 0, "config.yaml": 0, "events": 0, "checkpoint": 8, EVALUATIONS: 24}.get(name, row["steps"])
    assert len(trained) == row["steps"] - begun, "what was done is kept"
    truth = execute(make_run(*SETTINGS, f"session.root={run.session.root}-whole"), data)
    assert row["bits_per_byte"] == truth["bits_per_byte"] and not list(run.folder.glob("*.ckpt"))
