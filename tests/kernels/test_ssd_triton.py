"""The Triton kernels of the state space dual form against the recurrence in float64: on a GPU, or in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels.ssd import ssd
from kernels.ssd.torch import ssd_flops
from tests.kernels.conftest import assert_within_twice
from tests.kernels.test_ssd import inputs

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned")
slow = pytest.mark.slow
SMALL = dict(batch=1, H=2, G=1, P=16, N=32)


def run(tensors, backend, device="cpu", **options):
    """Outputs, final states and every gradient of a random projection of both."""
    leaves = {n: t if t is None else t.detach().to(device).requires_grad_() for n, t in tensors.items()}
    y, states = ssd(**leaves, return_final_states=True, backend=backend, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t) for t in (y, states)]
    used = {name: t for name, t in leaves.items() if t is not None}
    gradients = torch.autograd.grad((y * weights[0]).sum() + (states * weights[1]).sum(), used.values())
    return {"y": y, "final_states": states} | {f"d{name}": d for name, d in zip(used, gradients, strict=True)}


def compare(device, exact, low, **options):
    truth, *plain = (
        run(t, backend, **options) for t, backend in ((exact, "reference"), (low, "reference"), (low, "torch"))
    )
    on = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    assert_within_twice(run(low, "triton", device, **on), plain, truth)


def in_single(tensors):
    return {name: t if t is None else t.detach().float() for name, t in tensors.items()}


@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 100, pytest.param(1000, marks=slow)])
def test_outputs_states_and_gradients_are_right_at_every_length(triton_device, T):
    exact = inputs(T, decay=-1.0, **SMALL)
    compare(triton_device, exact, in_single(exact))


@pytest.mark.parametrize("decay", [0.0, -1e-4, -20.0, -500.0])
def test_decays_from_none_to_extreme(triton_device, decay):
    exact = inputs(70, decay=decay, **SMALL)
    compare(triton_device, exact, in_single(exact))


@pytest.mark.parametrize(
    ("P", "N"),
    [(16, 16), (48, 80), (80, 20), *(pytest.param(*s, marks=slow) for s in ((64, 128), (256, 64), (64, 256)))],
)
def test_head_and_state_sizes(triton_device, P, N):
    exact = inputs(66, decay=-1.0, batch=1, H=2, G=1, P=P, N=N)
    compare(triton_device, exact, in_single(exact))


@pytest.mark.parametrize(("H", "G"), [(2, 2), (3, 1), (4, 2)])
def test_heads_share_groups_and_batches_are_apart(triton_device, H, G):
    exact = inputs(66, decay=-1.0, batch=2, H=H, G=G, P=16, N=16)
    compare(triton_device, exact, in_single(exact))


def test_half_precision_errs_no_more_than_twice_as_much(triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    dtype = torch.bfloat16 if triton_device == "cuda" else torch.float16
    exact = inputs(70, decay=-1.0, **SMALL)
    kept = ("dt", "A", "initial_states")  # what a model keeps in float32
    low = {name: t.detach().to(torch.float32 if name in kept else dtype) for name, t in exact.items()}
    exact = {name: t.double() for name, t in low.items()}
    compare(triton_device, exact, low)


@pytest.mark.parametrize("plain", [False, True])
def test_time_steps_with_bias_softplus_and_limits_and_none_at_all(triton_device, plain):
    exact = inputs(40, decay=-1.0, **SMALL)
    if plain:
        exact |= {"dt": None, "D": None, "z": None, "A": -torch.rand(1, 40, 2, dtype=torch.float64)}
        options = {}
    else:
        exact |= {"dt_bias": torch.tensor([0.5, -3.0], dtype=torch.float64)}
        options = {"dt_softplus": True, "dt_limit": (0.1, 1.5)}
    compare(triton_device, exact, in_single(exact), **options)


@pytest.mark.parametrize("lengths", [[5, 64, 0, 1, 30], [0, 70, 0]])
def test_packed_sequences_of_several_lengths_one_of_them_empty(triton_device, lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    exact = inputs(sum(lengths), decay=-1.0, **SMALL)
    exact["initial_states"] = inputs(1, **SMALL | {"batch": len(lengths)})["initial_states"]
    compare(triton_device, exact, in_single(exact), cu_seqlens=cu)
    whole = {name: t.detach() for name, t in exact.items()}
    y, states = ssd(**whole, cu_seqlens=cu, return_final_states=True, backend="torch")
    for n, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        before = whole["initial_states"][n : n + 1]
        alone = {name: t[:, start:end] if t.dim() > 1 else t for name, t in whole.items()} | {"initial_states": before}
        if end > start:
            expected, before = ssd(**alone, return_final_states=True)
            torch.testing.assert_close(y[:, start:end], expected)
        torch.testing.assert_close(states[n], before[0])


def test_a_sequence_handed_over_in_pieces_equals_one(triton_device):
    tensors = {n: t.to(triton_device) for n, t in in_single(inputs(100, decay=-1.0, **SMALL)).items()}
    whole, end = ssd(**tensors, return_final_states=True, backend="triton")
    states, pieces = tensors["initial_states"], []
    for part in (slice(0, 37), slice(37, None)):
        piece = {n: t[:, part] if t.dim() > 1 else t for n, t in tensors.items()} | {"initial_states": states}
        y, states = ssd(**piece, return_final_states=True, backend="triton")
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("P", "N"), [(16, 32), (20, 12), pytest.param(64, 128, marks=slow)])
def test_a_few_tokens_are_decoded_one_by_one(triton_device, T, P, N):
    exact = {n: t.detach() for n, t in inputs(T, decay=-1.0, batch=2, H=4, G=2, P=P, N=N).items()}
    results = [
        ssd(**{n: t.to(device, dtype) for n, t in exact.items()}, return_final_states=True, backend=backend)
        for device, dtype, backend in (
            ("cpu", torch.float64, "reference"), ("cpu", torch.float32, "reference"), (triton_device, torch.float32, "triton")
        )
    ]  # fmt: skip
    truth, plain, got = (dict(zip(("y", "final_states"), found, strict=True)) for found in results)
    assert_within_twice(got, [plain], truth)
    on = {n: t.to(triton_device, torch.float32) for n, t in exact.items()}
    with FlopCounterMode(display=False) as counter:
        ssd(**on, backend="triton")
    assert counter.get_total_flops() == 2 * T * ssd_flops(1, 4, 2, P, N)


def test_two_runs_are_equal_bit_for_bit(triton_device):
    first, second = (run(in_single(inputs(70, **SMALL)), "triton", triton_device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flops_are_counted_for_the_operator(triton_device):
    tensors = {n: t.to(triton_device) for n, t in in_single(inputs(128, **SMALL)).items()}
    with FlopCounterMode(display=False) as counter:
        ssd(**tensors, backend="triton")
    assert counter.get_total_flops() == ssd_flops(128, 2, 1, 16, 32)


def test_the_operator_passes_pytorchs_own_checks(triton_device):
    from kernels.ssd.operator import forward

    t = {n: t.to(triton_device) for n, t in in_single(inputs(20, **SMALL)).items()}
    g = (t["dt"] * t["A"]).requires_grad_()
    packed = [x[0].contiguous().requires_grad_() for x in (t["x"], t["dt"], g.detach(), t["B"], t["C"])]
    cu = torch.tensor([0, 20], device=triton_device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, (*packed, t["initial_states"], cu, True), test_utils=checks)


def test_float64_is_refused(triton_device):
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, not torch.float64"):
        ssd(**{name: t.to(triton_device) for name, t in inputs(10, **SMALL).items()}, backend="triton")
