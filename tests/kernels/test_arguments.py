"""What the public functions take and refuse, all by the same checks: boundaries, ranks, dtypes, tensors without tokens,
and the transforms of torch.func."""

import pytest
import torch
from torch.autograd import forward_ad

from kernels import check_boundaries
from kernels.common.packing import boundaries
from tests.kernels.cases import CASES, CONVOLUTION, SSD

every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation.name)
checked = pytest.mark.parametrize("case", [CONVOLUTION, SSD], ids=lambda case: case.operation.name)
BAD_BOUNDARIES = [
    ([3, 7], "cu_seqlens begins with 3, it must begin with 0"),
    ([0, 3], "cu_seqlens ends with 3, it must end with 7"),
    ([0, 3000000], "cu_seqlens ends with 3000000, it must end with 7"),
    ([0, 5, 2, 7], "cu_seqlens falls from 5 to 2, it must never fall"),
    ([0, -1, 7], "cu_seqlens falls from 0 to -1, it must never fall"),
]


@every
@pytest.mark.parametrize(("places", "words"), BAD_BOUNDARIES)
def test_boundaries_that_are_none_are_refused_with_the_number(case, places, words):
    with pytest.raises(ValueError, match=words):
        case.operation.run(**case.problem(7), cu_seqlens=torch.tensor(places))


@pytest.mark.parametrize(("places", "words"), BAD_BOUNDARIES)
def test_boundaries_are_checked_once_by_who_makes_them(places, words):
    with pytest.raises(ValueError, match=words):
        check_boundaries(torch.tensor(places, dtype=torch.int32), 7)
    check_boundaries(torch.tensor([0, 3, 3, 7]), 7)


@pytest.mark.parametrize("places", [*(places for places, _ in BAD_BOUNDARIES), [-5, 900, -900, 4], [2, 1]])
def test_kernels_never_reach_out_of_what_is_there_whatever_boundaries_were_let_through(places):
    bent = boundaries(7, torch.tensor(places))
    check_boundaries(bent, 7)


def test_right_boundaries_are_left_as_they_are():
    cu_seqlens = torch.tensor([0, 0, 3, 3, 7], dtype=torch.int32)
    assert torch.equal(boundaries(7, cu_seqlens), cu_seqlens)


@checked
def test_tensors_on_another_device_are_refused(case):
    inputs, other = case.problem(5), torch.tensor([0, 5], device="meta")
    with pytest.raises(ValueError, match="cu_seqlens is on meta and the tokens on cpu: move it"):
        case.operation.run(**inputs, cu_seqlens=other)
    with pytest.raises(ValueError, match=f"{case.state} of {case.operation.name} is on meta and x on cpu: move one"):
        case.operation.run(**inputs | {case.state: inputs[case.state].to("meta")})


@checked
def test_tensors_of_another_rank_are_refused(case):
    inputs = case.problem(5)
    words = f"x of {case.operation.name} must be .*; it has {inputs['x'].dim() - 1} dimensions"
    with pytest.raises(ValueError, match=words):
        case.operation.run(**inputs | {"x": inputs["x"][0]})


@checked
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_tensors_without_fractions_are_refused(case, dtype):
    inputs = case.problem(5)
    words = f"{case.state} of {case.operation.name} is {dtype}, it must be float32, bfloat16, float16 or float64"
    with pytest.raises(ValueError, match=words):
        case.operation.run(**inputs | {case.state: inputs[case.state].to(dtype)})


@checked
@pytest.mark.parametrize(
    ("mine", "other"),
    [(torch.float64, torch.float32), (torch.float64, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_dtypes_mix_with_float32_alone(case, mine, other):
    inputs = {name: x.to(mine) for name, x in case.problem(5).items()}
    with pytest.raises(ValueError, match=f"of {case.operation.name} is {mine} and {case.state} {other}: give all"):
        case.operation.run(**inputs | {case.state: inputs[case.state].to(other)})
    low = {name: x.to(torch.bfloat16) for name, x in inputs.items()}
    y, _ = case.operation.run(**low | {case.state: low[case.state].float()})
    assert y.dtype == torch.bfloat16


@every
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize(("T", "batch"), [(0, 2), (5, 0), (0, 0)])
def test_no_tokens_leave_the_state_as_it_is_and_have_gradients(case, backend, T, batch):
    inputs = {name: x.requires_grad_() for name, x in case.problem(T, batch=batch).items()}
    y, state = case.operation.run(**inputs, **case.options, backend=backend)
    assert y.shape[:2] == (batch, T)
    assert torch.equal(state, inputs[case.state])
    (y.sum() + state.sum()).backward()
    assert torch.equal(inputs[case.state].grad, torch.ones_like(state))


@every
def test_packed_sequences_without_tokens_keep_their_states(case):
    inputs = case.problem(0)
    states = case.problem(1, batch=2)[case.state]
    _, state = case.operation.run(**inputs | {case.state: states}, **case.options, cu_seqlens=torch.tensor([0, 0, 0]))
    assert torch.equal(state, states)


def along(case, name, backend, T=20):
    """The operation as a function of one input, and that input."""
    inputs = case.problem(T, batch=2)
    return lambda x: case.operation.run(**inputs | {name: x}, **case.options, backend=backend), inputs[name]


@checked
@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("T", [1, 20])
def test_derivatives_of_torch_func_are_those_of_autograd(case, backend, T):
    for name in case.problem(2):
        run, x = along(case, name, backend, T)
        plain, _ = along(case, name, "reference", T)
        v = torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)
        _, tangents = torch.func.jvp(run, (x,), (v,))
        expected = torch.autograd.functional.jvp(plain, x, v)[1]
        torch.testing.assert_close(tangents, expected, rtol=1e-9, atol=1e-9)
        with forward_ad.dual_level():
            y, _ = run(forward_ad.make_dual(x, v))
            torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected[0], rtol=1e-9, atol=1e-9)
        gradient = torch.func.grad(lambda x, run=run: sum(out.square().sum() for out in run(x)))(x)
        leaf = x.clone().requires_grad_()
        sum(out.square().sum() for out in plain(leaf)).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-9)
        one, many = run(x), torch.func.vmap(run)(torch.stack([x, 2 * x]))
        torch.testing.assert_close(tuple(out[0] for out in many), one, rtol=1e-9, atol=1e-9)


@checked
def test_triton_refuses_the_transforms_of_torch_func_by_name(case, triton_device):
    run, x = along(case, "x", "triton")
    words = f"backend 'triton' of {case.operation.name} has no torch.func transforms and no forward-mode derivatives"
    with pytest.raises(ValueError, match=words):
        torch.func.grad(lambda x: run(x)[0].sum())(x)
    with pytest.raises(ValueError, match=words):
        torch.func.vmap(run)(x[None])
    with pytest.raises(ValueError, match=words), forward_ad.dual_level():
        run(forward_ad.make_dual(x, x))
