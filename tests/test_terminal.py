"""A mistake on the command line ends with one line on stderr and exit code 2; a fault of the program shows itself."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import train
from experiments.terminal import command, sentence

ROOT = Path(__file__).parents[1]


@pytest.fixture
def train_command(monkeypatch, tmp_path):
    def run(*overrides):
        monkeypatch.setattr(sys, "argv", ["train", f"session.root={tmp_path}", *overrides])
        train.main()

    return run


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("arch=transfomer", "arch=transfomer is not known: did you mean transformer?"),
        ("data=quux", "data=quux is not known: choose one of addition, associative_recall, base"),
        ("arch.widht=16", "arch.widht is no setting: did you mean width?"),
        ("nothing=1", "nothing is no setting: choose one of adapter, arch, budget, data"),
        ("arch.model.mixers.attention.window=8", "+arch.model.mixers.attention.window=..."),
        ("hydra/launcher=submitit_slurm", "hydra/launcher=submitit_slurm is not known: did you mean submitit?"),
        ("budget.flops=[1,", "budget.flops=[1, cannot be read: write name=value"),
        ("budget.flops=lots", "budget.flops='lots' must be a number"),
        ("data=text_files", "data.path must be given, as data.path=..."),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(train_command, capsys, override, words):
    with pytest.raises(SystemExit) as ended:
        train_command(override)
    said = capsys.readouterr().err
    assert os.environ["HYDRA_FULL_ERROR"] == "0", "the programs that are started next are not to show tracebacks"
    assert ended.value.code == 2 and said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("fault", [KeyError("x"), ZeroDivisionError()])
def test_a_fault_of_the_program_is_not_hidden(train_command, monkeypatch, fault):
    def broken(config):
        raise fault

    monkeypatch.setattr(sys, "argv", ["train"])
    with pytest.raises(type(fault)):
        command("train")(broken)()


def interrupt(config):
    raise KeyboardInterrupt  # what Python makes of Ctrl-C


def terminate(config):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stop", [interrupt, terminate])
def test_a_command_that_is_stopped_says_what_is_kept(capsys, stop):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        command("train")(stop)(OmegaConf.create())
    assert ended.value.code == 130 and "what is finished is kept; start the same command" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_a_library_is_not_taken_for_a_mistake_of_the_user():
    with pytest.raises(ValueError) as raised:
        __import__("numpy").zeros(2).reshape(3)
    assert sentence(raised.value) is None


def test_a_place_that_cannot_be_written_is_named():
    assert sentence(PermissionError(13, "Permission denied", "/proc/x")) == "/proc/x: Permission denied"


@pytest.mark.thorough
def test_a_run_says_what_it_does_and_is_found_again_without_torch_and_lightning(
    train_command, capsys, tmp_path, monkeypatch
):
    monkeypatch.setenv("ARCHIPELAGO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my.txt").write_text("".join(f"line number {i}\n" for i in range(5_000)))
    small = [f"data.path={tmp_path / 'my.txt'}", "data.tokens.heldout_bytes=2000", "arch.width=16", "budget.flops=2e8"]
    arguments = ["data=text_files", *small, "data.sequence_length=32"]
    train_command(*arguments)
    row, said = capsys.readouterr()
    assert said.splitlines()[0] == "transformer under next_token: reading the settings"
    for words in (
        r"data text_files: opening",
        r"[\d,]+ parameters, \d+ steps of 32 tokens",
        r"loss \d",
        r"bits per byte$",
    ):
        assert re.search(words, said, re.MULTILINE), words
    code = "import sys; sys.modules['torch'] = sys.modules['lightning'] = None; from experiments.train import main; "
    command = [sys.executable, "-c", code + "main()", f"session.root={tmp_path}", *arguments]
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(again.stdout) == json.loads(row.splitlines()[-1]) and "found in" in again.stderr
