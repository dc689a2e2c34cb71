"""Backends are chosen by name or said once, and refused where they cannot run."""

import logging
import subprocess
import sys

import pytest
import torch

import kernels
from kernels import backend, ssd, trial
from kernels.backend import choose

X = torch.zeros(1)


def test_what_auto_takes_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "said", set())
    with caplog.at_level(logging.INFO, "kernels"):
        assert [choose("op", "auto", ["a", "b"], "b", X) for _ in range(3)] == ["b"] * 3
    assert [r.getMessage() for r in caplog.records] == ["op runs on backend 'b': the fastest one measured on cpu"]


def test_a_backend_is_taken_by_name_and_an_unknown_one_refused():
    assert choose("op", "a", ["a", "b"], "b", X) == "a"
    with pytest.raises(ValueError, match="unknown backend 'c' for op: choose from auto, a, b"):
        choose("op", "c", ["a", "b"], "b", X)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run on cpu tensors here.*choose from auto, torch"):
        choose("op", "triton", ["torch", "triton"], "torch", X)


def test_the_kernels_are_imported_without_triton():
    code = "import sys, kernels; assert not {m for m in sys.modules if m.startswith('kernels') and 'triton' in m}"
    subprocess.run([sys.executable, "-c", code], check=True)


SIZES = {
    "gated_delta_rule": {"key_heads": 1, "heads": 2, "head_dim": 16, "value_dim": 32},
    "ssd": {"heads": 2, "groups": 1, "head_dim": 16, "state_size": 32},
    "causal_conv1d": {"channels": 8, "taps": 4},
}


@pytest.fixture
def untried(monkeypatch):
    """A process that has tried nothing and said nothing yet."""
    monkeypatch.setattr(backend, "said", set())
    trial._tried.cache_clear()
    yield
    trial._tried.cache_clear()


@pytest.mark.parametrize("operation", SIZES)
def test_triton_kernels_that_are_right_pass_their_trial(operation, triton_device, untried):
    before = torch.get_rng_state()
    assert trial.triton_is_right(operation, "float32", triton_device, tuple(SIZES[operation].items()))
    assert torch.equal(torch.get_rng_state(), before)


def spoilt(how):
    def on_backend(operation, name):
        run = original(operation, name)
        return run if name == "reference" else lambda **inputs: how(run(**inputs))

    original = trial.on_backend
    return on_backend


def fail(_):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(("how", "words"), [(lambda o: 1.01 * o, "are wrong on"), (fail, "no such instruction")])
def test_triton_kernels_that_are_wrong_or_fail_do_not_and_auto_leaves_them(
    how, words, triton_device, untried, monkeypatch, caplog
):
    monkeypatch.setattr(trial, "on_backend", spoilt(how))
    monkeypatch.setattr(backend, "_on_gpu", lambda x: True)
    x = torch.zeros(1, device=triton_device)
    with caplog.at_level(logging.INFO, "kernels"):
        assert choose("ssd", "auto", ["torch", "triton"], "torch", x, **SIZES["ssd"]) == "torch"
    assert words in caplog.text and "Triton's kernels were not right here" in caplog.text


def test_on_a_gpu_auto_takes_triton_once_it_has_proved_right(triton_device, untried, monkeypatch, caplog):
    monkeypatch.setattr(backend, "_on_gpu", lambda x: True)
    inputs = trial.leaves(trial.INPUTS["ssd"](20, batch=1, **SIZES["ssd"]), triton_device, torch.float32, False)
    with caplog.at_level(logging.INFO, "kernels"), torch.inference_mode():
        taken = [ssd(**inputs)[0] for _ in range(2)]
    assert torch.equal(taken[0], ssd(**inputs, backend="triton")[0])
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"ssd runs on backend 'triton': its kernels were right on {triton_device} when tried against the recurrence"
    ]


@pytest.mark.parametrize("operation", SIZES)
def test_torch_compile_goes_through_choice_trial_and_kernels_without_a_break(
    operation, triton_device, untried, monkeypatch
):
    monkeypatch.setattr(backend, "_on_gpu", lambda x: True)
    run = getattr(kernels, operation)
    inputs = trial.leaves(trial.INPUTS[operation](20, batch=1, **SIZES[operation]), triton_device, torch.float32, True)

    def loss(inputs):
        return run(**inputs)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(inputs), inputs.values()) for f in (compiled, loss)]
    for got, plain in zip(*results, strict=True):
        torch.testing.assert_close(got, plain)
