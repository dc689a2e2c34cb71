"""Backends are chosen by name or said once, tried before they are trusted, and refused where they cannot run."""

import logging
from dataclasses import replace

import pytest
import torch

from kernels import cross_entropy, fast_weights, grouped
from kernels.common import dispatch, trial
from kernels.common.dispatch import choose_backend
from tests.kernels.cases import IN_TRITON, SSD

every = pytest.mark.parametrize("case", IN_TRITON, ids=lambda case: case.operation.name)
X = torch.zeros(1)
GROUPED = {"experts": 3, "width": 12, "outputs": 20}
ENTROPY = {"width": 12, "vocabulary": 33}
DELTA = {"heads": 2, "key_heads": 1, "head_dim": 8, "value_dim": 12}
FORMS = [{"erases": erases, "per_channel": channels} for erases in (True, False) for channels in (True, False)]


@pytest.fixture
def untried(monkeypatch):
    """A process that has tried nothing and said nothing yet, and tries on problems as small as can be."""
    monkeypatch.setattr(dispatch, "said", set())
    monkeypatch.setattr(trial, "TOKENS", 5)
    trial._tried.cache_clear()
    yield
    trial._tried.cache_clear()


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, "kernels")
    return lambda: [record.getMessage() for record in caplog.records]


def test_what_auto_takes_is_said_once(untried, said):
    assert [choose_backend(SSD.operation, "auto", ["a", "b"], "b", X) for _ in range(3)] == ["b"] * 3
    assert said() == ["ssd runs on backend 'b': the fastest one measured on cpu"]


def test_a_backend_is_taken_by_name_and_an_unknown_one_refused():
    assert choose_backend(SSD.operation, "a", ["a", "b"], "b", X) == "a"
    with pytest.raises(ValueError, match="unknown backend 'c' for ssd: choose from auto, a, b"):
        choose_backend(SSD.operation, "c", ["a", "b"], "b", X)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run on cpu tensors here.*choose from auto, torch"):
        choose_backend(SSD.operation, "triton", ["torch", "triton"], "torch", X)


@pytest.mark.thorough
@every
def test_triton_kernels_that_are_right_pass_their_trial(case, triton_device, untried, monkeypatch):
    monkeypatch.setattr(trial, "TOKENS", case.chunk + 1)
    before = torch.get_rng_state()
    assert trial.triton_is_right(case.operation, torch.float32, triton_device, tuple(case.sizes.items()))
    assert torch.equal(torch.get_rng_state(), before)


def fail(_):
    raise RuntimeError("no such instruction")


@pytest.mark.thorough
@pytest.mark.parametrize(("spoil", "words"), [(lambda o: 1.01 * o, "are wrong on"), (fail, "no such instruction")])
def test_triton_kernels_that_are_wrong_or_fail_do_not_and_auto_leaves_them(
    spoil, words, triton_device, untried, said, monkeypatch
):
    def ssd(backend, **inputs):
        y, states = SSD.operation.run(**inputs, backend=backend)
        return (spoil(y) if backend == "triton" else y), states

    monkeypatch.setattr(dispatch, "is_for_triton", lambda x: True)
    spoilt, x = replace(SSD.operation, run=ssd), torch.zeros(1, device=triton_device)
    assert choose_backend(spoilt, "auto", ["torch", "triton"], "torch", x, **SSD.sizes) == "torch"
    warned, taken = said()
    assert words in warned and taken == "ssd runs on backend 'torch': Triton's kernels were not right here"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("operation", "sizes", "tried"),
    [
        pytest.param(SSD.operation, SSD.sizes, SSD.sizes, id="ssd"),
        pytest.param(grouped.OPERATION, GROUPED, GROUPED | {"experts": 4}, id="grouped_matmul"),
        pytest.param(cross_entropy.OPERATION, ENTROPY, ENTROPY, id="linear_cross_entropy"),
        *(pytest.param(fast_weights.OPERATION, DELTA | form, DELTA | form, id=f"delta_rule {form}") for form in FORMS),
    ],
)
def test_on_a_gpu_auto_takes_triton_once_it_has_proved_right(
    operation, sizes, tried, triton_device, untried, said, monkeypatch
):
    monkeypatch.setattr(dispatch, "is_for_triton", lambda x: True)
    monkeypatch.setattr(trial, "TOKENS", 9)
    assert trial.triton_is_right(operation, torch.float32, triton_device, tuple(tried.items()))
    trial._tried.cache_clear()
    problem = operation.random_problem(7, batch=1, **sizes, generator=torch.Generator().manual_seed(0))
    inputs = operation.leaves(problem, triton_device, torch.float32, gradients=False)
    with torch.inference_mode():
        taken = [operation.on_backend("auto")(**inputs) for _ in range(2)]
    assert torch.equal(taken[0], operation.on_backend("triton")(**inputs))
    right = f"its kernels were right on {triton_device} when tried against the recurrence"
    assert said() == [f"{operation.name} runs on backend 'triton': {right}"]


@pytest.mark.parametrize("form", [*FORMS, {"writes": 2}], ids=str)
def test_the_delta_rule_is_tried_in_the_form_in_which_it_is_called(form, monkeypatch, untried):
    asked = []
    monkeypatch.setattr(dispatch, "is_for_triton", lambda x: True)
    monkeypatch.setattr(dispatch, "triton_is_right", lambda operation, dtype, device, sizes: asked.append(dict(sizes)))
    given = fast_weights.OPERATION.random_problem(3, batch=1, **DELTA | form)
    fast_weights.OPERATION.on_backend("auto")(**given)
    tried = fast_weights.OPERATION.random_problem(3, batch=1, **asked[0])
    assert {name: x.shape for name, x in tried.items()} == {name: x.shape for name, x in given.items()}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("operation", "sizes"),
    [(grouped.OPERATION, GROUPED), (cross_entropy.OPERATION, ENTROPY)],
    ids=["grouped", "entropy"],
)
def test_under_transforms_auto_runs_on_the_definition_and_triton_is_refused_by_name(operation, sizes, triton_device):
    inputs = operation.leaves(operation.random_problem(7, batch=1, **sizes), triton_device, torch.float32, False)
    name = next(iter(inputs))

    def total(x, backend):
        return operation.on_backend(backend)(**inputs | {name: x}).sum()

    gradients = [torch.func.grad(total)(inputs[name], backend) for backend in ("auto", "reference")]
    assert torch.equal(*gradients)
    with pytest.raises(ValueError, match=f"backend 'triton' of {operation.name} has no torch.func transforms"):
        torch.func.grad(total)(inputs[name], "triton")


@pytest.mark.thorough
@every
def test_torch_compile_goes_through_choice_trial_and_kernels_without_a_break(case, triton_device, untried, monkeypatch):
    monkeypatch.setattr(dispatch, "is_for_triton", lambda x: True)
    inputs = case.operation.leaves(case.problem(9), triton_device, torch.float32, gradients=True)

    def loss(inputs):
        return case.operation.run(**inputs)[0].square().sum()

    torch.compiler.reset()  # it would take the sizes that changed since the last operation for variables
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(inputs), inputs.values()) for f in (compiled, loss)]
    for got, plain in zip(*results, strict=True):
        torch.testing.assert_close(got, plain)
