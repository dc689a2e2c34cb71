"""The Triton kernels of the short convolution against the definition in float64: on a GPU, or in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import causal_conv1d
from tests.kernels.conftest import assert_within_twice

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned")


def inputs(T, *, B=2, C=70, W=4, biased=True, N=None):
    rng = torch.Generator().manual_seed(0)
    shapes = {"x": (B, T, C), "weight": (C, W), "bias": (C,), "initial_state": (N or B, W - 1, C)}
    tensors = {name: torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    return tensors if biased else {name: x for name, x in tensors.items() if name != "bias"}


def run(tensors, backend, device="cpu", dtype=torch.float64, **options):
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in tensors.items()}
    y, state = causal_conv1d(**leaves, backend=backend, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (y, state)]
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    gradients = torch.autograd.grad(loss, leaves.values(), allow_unused=True)
    found = zip((f"d{name}" for name in leaves), gradients, strict=True)
    return {"y": y, "state": state} | {name: x for name, x in found if x is not None and x.numel()}


def compare(device, tensors, dtype=torch.float32, **options):
    truth = run(tensors, "reference", **options)
    plain = [run(tensors, backend, dtype=dtype, **options) for backend in ("reference", "torch")]
    on = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert_within_twice(run(tensors, "triton", device, dtype, **on), plain, truth)


@pytest.mark.parametrize("T", [1, 2, 15, 63, 64, 65, 100, pytest.param(1000, marks=pytest.mark.slow)])
def test_outputs_states_and_gradients_are_right_at_every_length(triton_device, T):
    compare(triton_device, inputs(T))


@pytest.mark.parametrize("W", [2, 3, 4, 7])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [False, True])
def test_taps_activations_and_biases(triton_device, W, activation, biased):
    compare(triton_device, inputs(20, W=W, biased=biased, C=6), activation=activation)


def test_half_precision_errs_no_more_than_twice_as_much(triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    compare(triton_device, inputs(70), torch.bfloat16 if triton_device == "cuda" else torch.float16)


@pytest.mark.parametrize("lengths", [[5, 64, 0, 1, 30], [2, 0, 70]])
def test_packed_sequences_of_several_lengths_one_of_them_empty(triton_device, lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    tensors = inputs(sum(lengths), B=1, C=5, N=len(lengths))
    compare(triton_device, tensors, cu_seqlens=cu)
    y, states = causal_conv1d(**tensors, cu_seqlens=cu)
    for n, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        before = tensors["initial_state"][n : n + 1]
        alone = {**tensors, "x": tensors["x"][:, start:end], "initial_state": before}
        expected, state = causal_conv1d(**alone) if end > start else (tensors["x"][:, :0], before)
        torch.testing.assert_close(y[:, start:end], expected)
        torch.testing.assert_close(states[n : n + 1], state)


def test_two_runs_are_equal_bit_for_bit_and_flops_are_counted(triton_device):
    first, second = (run(inputs(70), "triton", triton_device, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    single = {name: x.float().to(triton_device) for name, x in inputs(64).items()}
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(**single, backend="triton")
    assert counter.get_total_flops() == 2 * (2 * 4 * 70 * 64)


def test_float64_is_refused(triton_device):
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, not torch.float64"):
        run(inputs(5), "triton", triton_device)


@pytest.mark.parametrize(
    ("cu", "B", "words"),
    [
        (torch.tensor([0, 5]), 2, "packed in a batch of 1, not of 2"),
        (torch.tensor([0.0, 5.0]), 1, r"must be \[sequences \+ 1\] of int32 or int64"),
    ],
)
def test_bad_boundaries_are_refused(triton_device, cu, B, words):
    with pytest.raises(ValueError, match=words):
        causal_conv1d(torch.zeros(B, 5, 3), torch.zeros(3, 4), cu_seqlens=cu)
