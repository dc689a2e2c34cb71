"""Duties of every operation: its Triton kernels against the definition in float64 (on a GPU, or in the interpreter),
packed sequences, sequences in pieces, autocast, FLOPs, and refusals."""

from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import (
    CASES,
    DELTA,
    IN_TRITON,
    SSD,
    assert_equal,
    assert_triton_is_right,
    assert_within_twice,
    run,
    triton_beside_plain,
)

pytestmark = pytest.mark.thorough

slow = pytest.mark.slow
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.operation.name)
every_in_triton = pytest.mark.parametrize("case", IN_TRITON, ids=lambda case: case.operation.name)
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")


def on(device, inputs):
    return {name: x.to(device, torch.float32) for name, x in inputs.items()}


@on_triton
@every_in_triton
@pytest.mark.parametrize(
    ("chunks", "more"), [(0, 1), (0, 7), (1, -1), (1, 0), (1, 1), (2, 7), pytest.param(15, 7, marks=slow)]
)
def test_triton_is_right_at_every_length(case, triton_device, chunks, more):
    assert_triton_is_right(case, triton_device, case.problem(chunks * case.chunk + more))


@on_triton
@every_in_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_triton_in_half_precision_errs_no_more_than_twice_as_much(case, triton_device, dtype):
    assert_triton_is_right(case, triton_device, case.problem(case.chunk + 2), dtype)


@on_triton
@every_in_triton
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=["bfloat16", "float16"]
)
def test_over_eight_sequences_half_precision_errs_no_more_than_twice_as_much(case, triton_device, dtype):
    """Without any allowance: what the errors of one sequence have of luck is averaged out."""
    sizes = {"heads": 2} if "heads" in case.sizes else {}
    exact = case.problem(case.chunk + 6, batch=8, **sizes)
    got, plain, truth = triton_beside_plain(case, triton_device, exact, dtype)
    for name, x in truth.items():
        error, *others = ((found[name].double().cpu() - x).square().mean().sqrt() for found in (got, *plain))
        assert error <= 2 * max(others), f"{name}: {error / max(others):.2f} times"


around = pytest.mark.parametrize("around", [([3], [0, 1, 2]), ([0], [0])], ids=["several", "one between empty ones"])


def packed(case, around):
    """Inputs of packed sequences, one of them longer than a chunk, and their boundaries."""
    before, after = around
    lengths = [*before, (case.chunk or 64) + 1, *after]
    inputs = case.problem(sum(lengths))
    inputs[case.state] = case.problem(1, batch=len(lengths), seed=1)[case.state]
    return inputs, torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


@every
@around
def test_packed_sequences_equal_each_by_itself(case, around):
    inputs, cu_seqlens = packed(case, around)
    truth = run(case, inputs, "reference", cu_seqlens=cu_seqlens)
    assert_equal(run(case, inputs, "torch", cu_seqlens=cu_seqlens), truth)
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        state = inputs[case.state][n : n + 1]
        if end > start:
            alone = case.part(inputs, slice(start, end), state)
            y, state = case.operation.run(**alone, **case.options)
            torch.testing.assert_close(truth["y"][:, start:end], y)
        torch.testing.assert_close(truth["state"][n : n + 1], state)


@on_triton
@every_in_triton
@around
def test_triton_takes_packed_sequences(case, triton_device, around):
    inputs, cu_seqlens = packed(case, around)
    assert_triton_is_right(case, triton_device, inputs, cu_seqlens=cu_seqlens)


def whole_and_pieces(case, inputs, backend, cuts):
    """Output and final state of a sequence at once, and of its pieces, each going on from the one before."""
    state, outputs = inputs[case.state], []
    for start, end in pairwise([0, *cuts, 67]):
        piece = case.part(inputs, slice(start, end), state)
        y, state = case.operation.run(**piece, **case.options, backend=backend)
        outputs.append(y)
    return case.operation.run(**inputs, **case.options, backend=backend), (torch.cat(outputs, 1), state)


@every
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("cuts", [[1], [63], [64], [66], [1, 2, 40]])
def test_a_sequence_handed_over_in_pieces_equals_one(case, backend, cuts):
    whole, pieces = whole_and_pieces(case, case.problem(67, batch=2), backend, cuts)
    torch.testing.assert_close(pieces, whole)


@on_triton
@every_in_triton
def test_a_sequence_handed_over_in_pieces_equals_one_in_triton(case, triton_device):
    whole, pieces = whole_and_pieces(case, on(triton_device, case.problem(67)), "triton", [37])
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)


@on_triton
@every_in_triton
def test_two_runs_of_triton_are_equal_bit_for_bit(case, triton_device):
    inputs = case.problem(case.chunk + 1)
    first, second = (run(case, inputs, "triton", triton_device, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every
def test_without_a_state_it_starts_from_zeros(case):
    inputs = case.problem(67)
    zeros = torch.zeros_like(inputs[case.state])
    none, zero = (case.operation.run(**inputs | {case.state: state})[0] for state in (None, zeros))
    assert torch.equal(none, zero)


@pytest.mark.parametrize(("case", "T"), [*((case, 67) for case in CASES), (SSD, 1)])
def test_autocast_changes_nothing(case, T):
    leaves = {name: x.float().requires_grad_() for name, x in case.problem(T).items()}
    plain = case.operation.run(**leaves, **case.options)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.operation.run(**leaves, **case.options)
    torch.testing.assert_close(got, plain, rtol=0, atol=0)
    gradients = [torch.autograd.grad(sum(x.sum() for x in pair), leaves.values()) for pair in (got, plain)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@on_triton
@every_in_triton
def test_flops_of_the_triton_operator_are_counted(case, triton_device):
    triton = case.operation.on_backend("triton")
    triton(**on(triton_device, case.problem(1)))  # a counter knows the operators that were there before it
    with FlopCounterMode(display=False) as counter:
        triton(**on(triton_device, case.problem(2 * case.chunk)))
    assert counter.get_total_flops() == case.flops(2 * case.chunk, **case.sizes)


@on_triton
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (DELTA, {"heads": 4, "key_heads": 2}),
        (DELTA, {"head_dim": 20, "value_dim": 12}),
        pytest.param(DELTA, {"head_dim": 128, "value_dim": 128}, marks=slow),
        (SSD, {"heads": 4, "groups": 2}),
        (SSD, {"head_dim": 20, "state_size": 12}),
        pytest.param(SSD, {"head_dim": 64, "state_size": 128}, marks=slow),
    ],
)
def test_a_few_tokens_are_decoded_one_by_one_and_counted_so(case, triton_device, T, sizes):
    inputs = case.problem(T, batch=2, **sizes)
    truth, plain = (
        case.operation.run(**{name: x.to(dtype) for name, x in inputs.items()}, **case.options, backend="reference")
        for dtype in (torch.float64, torch.float32)
    )
    got = case.operation.run(**on(triton_device, inputs), **case.options, backend="triton")
    with FlopCounterMode(display=False) as counter:
        case.operation.run(**on(triton_device, inputs), backend="triton")
    got, plain, truth = (dict(zip(("y", "state"), found, strict=True)) for found in (got, plain, truth))
    assert_within_twice(got, [plain], truth)
    assert counter.get_total_flops() == 2 * T * case.flops(1, **case.sizes | sizes)


@on_triton
@every_in_triton
def test_float64_is_refused_by_triton(case, triton_device):
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, not torch.float64"):
        run(case, case.problem(5), "triton", triton_device)


@every
@pytest.mark.parametrize(
    ("cu_seqlens", "batch", "words"),
    [
        (torch.tensor([0, 5]), 2, "packed in a batch of 1, not of 2"),
        (torch.tensor([0.0, 5.0]), 1, r"must be \[sequences \+ 1\] of int32 or int64"),
    ],
)
def test_bad_boundaries_are_refused(case, cu_seqlens, batch, words):
    with pytest.raises(ValueError, match=words):
        case.operation.run(**case.problem(5, batch=batch), cu_seqlens=cu_seqlens)


@every
def test_an_unknown_backend_is_refused_with_the_names_of_the_others(case):
    with pytest.raises(
        ValueError, match=f"unknown backend 'cuda' for {case.operation.name}: choose from auto, reference"
    ):
        case.operation.run(**case.problem(5), backend="cuda")
