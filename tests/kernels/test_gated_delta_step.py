"""One fused step of a gated delta mixer is what its parts give one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import causal_conv1d, gated_delta_rule, gated_delta_step, gated_delta_step_flops
from kernels.delta_step import OPERATION
from tests.kernels.cases import assert_within_twice

SIZES = {"batch": 2, "heads": 4, "key_heads": 2, "head_dim": 20, "value_dim": 12}
STATIC = {"a": None, "A_log": None, "dt_bias": None}


def problem(**changes):
    return OPERATION.random_problem(1, **SIZES | changes, generator=torch.Generator().manual_seed(0))


def in_parts(qkv, a, b, z, conv, memory, conv_weight, A_log, dt_bias, norm_weight, eps=1e-6):
    """The same by the operations that make up the mixer."""
    HV, K, V = memory.shape[1:]
    x, conv = causal_conv1d(qkv[:, None], conv_weight, initial_state=conv)
    keys = (x.shape[-1] - HV * V) // 2
    q, k, v = (
        part.unflatten(-1, (-1, n)) for part, n in zip(x.split([keys, keys, HV * V], -1), (K, K, V), strict=True)
    )
    o, memory = gated_delta_rule(
        q, k, v, None if a is None else a[:, None], b[:, None].sigmoid(), A_log=A_log, dt_bias=dt_bias,
        initial_state=memory, output_final_state=True, use_qk_l2norm=True,
    )  # fmt: skip
    return F.rms_norm(o[:, 0], (V,), norm_weight, eps) * F.silu(z), conv, memory


@pytest.mark.parametrize("change", [{}, STATIC], ids=["decaying", "static"])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_the_definition_is_the_parts_one_after_the_other(change, taps):
    inputs = problem(taps=taps) | change
    torch.testing.assert_close(gated_delta_step(**inputs, backend="reference"), in_parts(**inputs))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "change", [{}, STATIC, {"taps": 1}, {"taps": 2}, {"head_dim": 128, "value_dim": 128}, {"key_heads": 4}], ids=str
)
def test_the_triton_step_is_right(triton_device, change, dtype):
    sizes = {} if change is STATIC else change
    exact = problem(**sizes) | (STATIC if change is STATIC else {})
    low = exact | OPERATION.leaves({k: x for k, x in exact.items() if x is not None}, "cpu", dtype, gradients=False)
    given = {name: x if x is None else x.to(triton_device) for name, x in low.items()}
    truth, *plain, got = (
        {name: x for name, x in zip(("y", "conv", "memory"), found, strict=True) if x.numel()}
        for found in (
            gated_delta_step(**exact, backend="reference"),
            gated_delta_step(**low, backend="reference"),
            in_parts(**low),
            gated_delta_step(**given, backend="triton"),
        )
    )
    assert_within_twice(got, plain, truth)


@pytest.mark.parametrize("large", [30.0, -30.0])
def test_extreme_gates_leave_no_nan_and_forget_or_keep_all(triton_device, large):
    inputs = {name: x.float() for name, x in problem().items()}
    inputs |= {"a": torch.full_like(inputs["a"], large), "b": torch.full_like(inputs["b"], -80.0)}
    _, _, memory = gated_delta_step(**{k: x.to(triton_device) for k, x in inputs.items()}, backend="triton")
    kept = inputs["memory"] if large < 0 else torch.zeros_like(inputs["memory"])
    torch.testing.assert_close(memory.cpu(), kept, rtol=1e-5, atol=1e-5)


def test_flops_are_those_of_one_token_of_the_parts(triton_device):
    inputs = {name: x.float().to(triton_device) for name, x in problem().items()}
    gated_delta_step(**inputs, backend="triton")  # a counter knows the operators that were there before it
    with FlopCounterMode(display=False) as counter:
        gated_delta_step(**inputs, backend="triton")
    assert counter.get_total_flops() == 2 * gated_delta_step_flops(4, 2, 20, 12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": torch.zeros(2, 129)}, "129 channels are not the queries and keys of some heads of 20"),
        ({"a": None}, "a, A_log and dt_bias go together"),
        ({"z": torch.zeros(2, 4, 11)}, r"z is \(2, 4, 11\), it must be \(2, 4, 12\)"),
        ({"backend": "cuda"}, "unknown backend 'cuda' for gated_delta_step: choose from auto, reference, triton"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        gated_delta_step(**problem() | change)


def test_heads_that_do_not_fit_into_a_program_are_refused_by_triton(triton_device):
    inputs = {name: x.float().to(triton_device) for name, x in problem(head_dim=130).items()}
    with pytest.raises(ValueError, match="130 and 12 dimensions: the Triton step takes up to 128"):
        gated_delta_step(**inputs, backend="triton")
