"""A mistake on the command line ends with one line on stderr and exit code 2; a fault of the program shows itself."""

import os
import signal
import sys

import pytest
from omegaconf import OmegaConf

from experiments import train
from experiments.terminal import command, sentence


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
        ("data=nothing", "data=nothing is not known: choose one of associative_recall, base"),
        ("arch.widht=16", "arch.widht is no setting: did you mean width?"),
        ("nothing=1", "nothing is no setting: choose one of arch, budget, data"),
        ("arch.model.mixers.attention.window=8", "+arch.model.mixers.attention.window=..."),
        ("hydra/launcher=submitit_slurm", "others come with packages, such as hydra-submitit-launcher"),
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
