"""The delta rule's Triton kernels: gates at their extremes, every form of read keys and writes, heads, decoding."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import delta_rule, delta_rule_flops
from tests.kernels.cases import FAST_WEIGHTS, assert_triton_is_right, assert_within_twice, run

pytestmark = [pytest.mark.usefixtures("triton_device", "poisoned")]
slow, thorough = pytest.mark.slow, pytest.mark.thorough
SMALL = dict(head_dim=16, value_dim=16)
GATES = {
    "none": lambda g: None,
    "per head": lambda g: g.mean(-1),
    "per channel": lambda g: g,
    "strong": lambda g: 20 * g,
    "extreme": lambda g: 1000 * g,
    "resets per head": lambda g: torch.where(g[..., 0] < -0.9, -torch.inf, 20 * g[..., 1]),
    "resets per channel": lambda g: torch.where(g < -0.9, -torch.inf, g),
    "nothing but resets": lambda g: torch.full_like(g, -torch.inf),
    "resets by the least number": lambda g: torch.where(g < -0.9, torch.finfo(torch.float32).min, g),
    "positive": lambda g: -0.1 * g,
    "of both signs": lambda g: 2 * g + 0.5,
}
QUICK = ("per channel", "resets per channel")
gates = pytest.mark.parametrize(
    "gate", [pytest.param(make, id=name, marks=() if name in QUICK else thorough) for name, make in GATES.items()]
)
# Whether there is erasing, and writes of a token.
forms = pytest.mark.parametrize(
    ("erases", "writes"), [(True, None), pytest.param(False, 2, marks=thorough), pytest.param(True, 3, marks=thorough)]
)


def problem(T, gate=GATES["per channel"], erases=True, **sizes):
    inputs = FAST_WEIGHTS.problem(T, **SMALL | sizes)
    return inputs | {"g": gate(inputs["g"])} | ({} if erases else {"a": None})


def single(inputs, device="cpu"):
    return {name: x if x is None else x.to(device, torch.float32) for name, x in inputs.items()}


@gates
@forms
def test_it_is_right_with_gates_of_any_strength(gate, erases, writes, triton_device):
    assert_triton_is_right(FAST_WEIGHTS, triton_device, problem(40, gate, erases, writes=writes))


@thorough
@pytest.mark.parametrize(("T", "writes"), [(33, 2), (43, 3), (9, 70), (65, 1)])
def test_a_token_may_begin_in_one_chunk_and_end_in_the_next(T, writes, triton_device):
    assert_triton_is_right(FAST_WEIGHTS, triton_device, problem(T, writes=writes))


@thorough
@pytest.mark.parametrize("writes", [None, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_several_writes_and_no_erasing_err_no_more_in_half_precision(dtype, writes, triton_device):
    inputs = problem(40, erases=writes is not None, writes=writes, head_dim=32, value_dim=32)
    assert_triton_is_right(FAST_WEIGHTS, triton_device, inputs, dtype)


@gates
@pytest.mark.parametrize("writes", [None, pytest.param(2, marks=thorough)])
def test_no_later_gate_or_token_reaches_an_output_by_a_single_bit(gate, writes, triton_device):
    before = single(problem(70, gate, writes=writes), triton_device)
    o, _ = delta_rule(**before, backend="triton")
    for s in (0, 15, 16, 40, 63, 64):
        later = {name: x if x is None else x.clone() for name, x in before.items()}
        for name in ("q", "k", "a", "u", "g"):
            if later[name] is not None:
                later[name][:, s + 1 :] *= 0.3
        if later["g"] is not None:
            later["g"][:, s + 2] = -torch.inf
        assert torch.equal(delta_rule(**later, backend="triton")[0][:, : s + 1], o[:, : s + 1])


@pytest.mark.parametrize("per_channel", [pytest.param(False, marks=thorough), True])
def test_a_reset_begins_a_new_sequence(per_channel, triton_device):
    inputs = problem(70, GATES["per channel" if per_channel else "per head"])
    inputs["initial_state"] = 1e30 * inputs["initial_state"]
    inputs["g"][:, 40] = -torch.inf
    inputs = single(inputs, triton_device)
    o, end = delta_rule(**inputs, output_final_state=True, backend="triton")
    alone = FAST_WEIGHTS.part(inputs, slice(40, None), torch.zeros_like(inputs["initial_state"]))
    o_alone, end_alone = delta_rule(**alone, output_final_state=True, backend="triton")
    torch.testing.assert_close(o[:, 40:], o_alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, end_alone, rtol=1e-4, atol=1e-5)


@thorough
@pytest.mark.parametrize("heads", [(1, 2, 4), (4, 4, 4), (2, 4, 1)], ids=str)
def test_queries_and_keys_may_each_have_fewer_heads_than_values(heads, triton_device):
    inputs = problem(10, batch=2, heads=4, key_heads=4)
    inputs |= {name: inputs[name][..., :n, :].contiguous() for name, n in zip("qka", heads, strict=True)}
    assert_triton_is_right(FAST_WEIGHTS, triton_device, inputs)


@thorough
@pytest.mark.parametrize(
    ("K", "V"),
    [(8, 4), (48, 80), (64, 32), *(pytest.param(*s, marks=slow) for s in ((128, 128), (256, 64), (64, 256)))],
)
def test_it_takes_head_sizes(K, V, triton_device):
    assert_triton_is_right(FAST_WEIGHTS, triton_device, problem(40, head_dim=K, value_dim=V))


@thorough
def test_it_takes_repeated_keys_with_full_writing_strength(triton_device):
    """The triangular system at its worst: entries of one below the diagonal."""
    inputs = problem(70, lambda g: 0 * g)
    inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
    inputs["a"] = inputs["k"]
    assert_triton_is_right(FAST_WEIGHTS, triton_device, inputs)


@pytest.mark.parametrize("writes", [None, pytest.param(3, marks=thorough)])
def test_packed_sequences_of_several_writes_equal_each_by_itself(writes, triton_device):
    lengths = [5, 0, 23, 1]
    inputs = single(problem(sum(lengths), writes=writes), triton_device)
    inputs["initial_state"] = single(problem(1, batch=4, seed=1), triton_device)["initial_state"]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], device=triton_device)
    got = run(FAST_WEIGHTS, inputs, "triton", triton_device, cu_seqlens=cu_seqlens)
    plain = run(FAST_WEIGHTS, inputs, "torch", triton_device, cu_seqlens=cu_seqlens)
    truth = run(FAST_WEIGHTS, inputs, "reference", triton_device, torch.float64, cu_seqlens=cu_seqlens)
    assert_within_twice(got, [plain], truth, 8)
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        if end > start:
            alone = FAST_WEIGHTS.part(inputs, slice(start, end), inputs["initial_state"][n : n + 1])
            y, state = delta_rule(**alone, output_final_state=True, backend="triton")
            torch.testing.assert_close(got["y"][:, start:end], y, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got["state"][n : n + 1], state, rtol=1e-5, atol=1e-5)


@thorough
@pytest.mark.parametrize("gate", [GATES["none"], GATES["per head"], GATES["resets per channel"]])
@pytest.mark.parametrize(("erases", "writes"), [(True, None), (False, None), (True, 2)])
def test_a_few_tokens_without_gradients_take_steps_and_are_counted_so(gate, erases, writes, triton_device):
    inputs = problem(3, gate, erases, batch=2, heads=2, key_heads=1, head_dim=20, value_dim=12, writes=writes)
    truth, plain = (
        delta_rule(
            **{name: x if x is None else x.to(dtype) for name, x in inputs.items()}, output_final_state=True,
            backend="reference",
        )
        for dtype in (torch.float64, torch.float32)
    )  # fmt: skip
    inputs = single(inputs, triton_device)
    got = delta_rule(**inputs, output_final_state=True, backend="triton")
    got, plain, truth = (dict(zip(("y", "state"), found, strict=True)) for found in (got, plain, truth))
    assert_within_twice(got, [plain], truth)
    with FlopCounterMode(display=False) as counter:
        delta_rule(**inputs, backend="triton")
    assert counter.get_total_flops() == 2 * 3 * delta_rule_flops(1, 2, 20, 12, writes=writes or 1, erases=erases)


def test_nothing_but_the_inputs_is_kept_for_the_backward_pass(triton_device):
    inputs = {name: x.requires_grad_() for name, x in single(problem(10), triton_device).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        delta_rule(**inputs, backend="triton")
    assert sum(kept) == sum(x.numel() for x in inputs.values())


def test_heads_above_256_dimensions_are_refused(triton_device):
    inputs = single(problem(9, head_dim=257), triton_device)
    with pytest.raises(ValueError, match=r"heads of 257 and 16 .* take up to 256; choose backend='torch'"):
        delta_rule(**inputs, backend="triton")


def test_transforms_of_torch_func_are_refused_by_name(triton_device):
    inputs = single(problem(9), triton_device)
    words = "backend 'triton' of delta_rule knows no transforms.*choose auto or reference"
    with pytest.raises(ValueError, match=words):
        torch.func.grad(lambda q: delta_rule(**inputs | {"q": q}, backend="triton")[0].sum())(inputs["q"])


@thorough
@pytest.mark.parametrize(("gate", "erases", "writes"), [("per head", True, 1), ("per channel", False, 2)])
def test_the_operators_pass_pytorchs_own_checks(gate, erases, writes, triton_device):
    from kernels.fast_weights.triton_operators import forward, steps

    inputs = single(problem(5, GATES[gate], erases, heads=2, key_heads=1, writes=writes), triton_device)
    q, k, a, u, g, state = inputs.values()
    k, a, u = (x if x is None else x.flatten(0, 2).requires_grad_() for x in (k, a, u))
    q, g = q[0].requires_grad_(), g.view(5, 2, -1).requires_grad_()
    cu_seqlens = torch.tensor([0, 2 * writes, 5 * writes], device=triton_device)
    state = state.repeat(2, 1, 1, 1)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, (q, k, a, u, g, state, cu_seqlens, 5 * writes, 0.3, True), test_utils=checks)
    with torch.no_grad():
        torch.library.opcheck(steps, (q, k, a, u, g, state[:1], 5, 0.3), test_utils=checks[:2])
