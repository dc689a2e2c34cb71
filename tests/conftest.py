"""What tests of several folders share: composed configs and a corpus that fits in a test."""

import os
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# Read when Triton is first imported, as by what is imported below: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from experiments.data.token_data import TokenData
from experiments.harness.identity import run_of
from experiments.harness.telemetry import Telemetry

CONFIGS = Path(__file__).parents[1] / "configs"


@cache  # composing takes longer than most tests
def composed(*overrides: str) -> DictConfig:
    small = ["budget.flops=3e8", "arch.width=16", "trainer.evaluations=1", "data.sequence_length=32"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*small, "session.root=ROOT", "session.progress=false", *overrides])


@pytest.fixture
def make_config(tmp_path):
    """Returns overrides -> the config of `experiments.train`, small, rooted in the test's own folder."""

    def make(*overrides: str):
        config = composed(*overrides).copy()
        if config.session.root == "ROOT":
            config.session.root = str(tmp_path / "runs")
        return config

    return make


@pytest.fixture
def make_run(make_config):
    """Returns overrides -> a small run."""
    return lambda *overrides: run_of(make_config(*overrides))


@pytest.fixture
def first_steps(monkeypatch):
    """The step that each training begins at."""
    steps, original = [], Telemetry.on_train_batch_start

    def watch(self, trainer, *rest):
        if not hasattr(self, "step_started"):
            steps.append(trainer.global_step)
        original(self, trainer, *rest)

    monkeypatch.setattr(Telemetry, "on_train_batch_start", watch)
    return steps


class Kill(BaseException):
    """Raised to end a run at once: no part of it catches this."""


@pytest.fixture
def killed_at(monkeypatch):
    """Returns step -> a context in which a run is killed as it begins that step."""

    @contextmanager
    def killing(step: int):
        begin = Telemetry.on_train_batch_start

        def kill(self, trainer, *rest):
            if trainer.global_step == step:
                raise Kill
            begin(self, trainer, *rest)

        with monkeypatch.context() as patch, pytest.raises(Kill):
            patch.setattr(Telemetry, "on_train_batch_start", kill)
            yield

    return killing


@pytest.fixture(scope="session")
def data():
    """Sixteen symbols in a noisy cycle: something to learn, in 400,000 tokens."""
    rng = np.random.default_rng(0)
    steps = rng.choice([1, 2], size=401_000, p=[0.8, 0.2])
    stream = (np.cumsum(steps) % 16).astype(np.uint16)
    pieces = [bytes([97 + i]) for i in range(16)] + [b""]
    return TokenData(
        train=stream[:400_000], heldout=stream[400_000:], heldout_bytes=1000, vocab_size=17, eot=16, digest="0" * 64,
        name="cycle", pieces=pieces,
    )  # fmt: skip
