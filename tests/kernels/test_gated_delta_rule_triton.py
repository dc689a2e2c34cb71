"""The Triton kernels of the gated delta rule against the recurrence in float64: on a GPU, or in the interpreter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import gated_delta_rule
from kernels.gated_delta_rule.torch import gated_delta_rule_flops
from tests.kernels.conftest import assert_within_twice
from tests.kernels.test_gated_delta_rule import inputs

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned")
slow = pytest.mark.slow
SMALL = dict(B=1, H=1, HV=2, K=32, V=16)


def run(tensors, backend, device="cpu", **options):
    """Outputs, final state and every gradient of a random projection of both."""
    leaves = {name: x.detach().to(device).requires_grad_() for name, x in tensors.items()}
    o, state = gated_delta_rule(**leaves, output_final_state=True, backend=backend, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (o, state)]
    gradients = torch.autograd.grad((o * weights[0]).sum() + (state * weights[1]).sum(), leaves.values())
    return {"o": o, "final_state": state} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def compare(device, dtype=torch.float32, **sizes):
    exact, same = inputs(**sizes), inputs(**sizes, dtype=dtype)
    truth, *plain = run(exact, "reference"), run(same, "reference"), run(same, "torch")
    assert_within_twice(run(same, "triton", device), plain, truth)


@pytest.mark.parametrize("T", [1, 15, 63, 64, 65, 100, pytest.param(1000, marks=slow)])
def test_outputs_states_and_gradients_are_right_at_every_length(triton_device, T):
    compare(triton_device, T=T, gate=-1.0, **SMALL)


@pytest.mark.parametrize("gate", [0.0, -1e-4, -20.0, -500.0])
def test_gates_from_none_to_extreme(triton_device, gate):
    compare(triton_device, T=70, gate=gate, **SMALL)


@pytest.mark.parametrize(
    ("K", "V"),
    [(16, 16), (64, 32), (48, 80), *(pytest.param(*s, marks=slow) for s in ((128, 128), (256, 64), (64, 256)))],
)
def test_head_sizes(triton_device, K, V):
    compare(triton_device, T=66, gate=-1.0, B=1, H=1, HV=1, K=K, V=V)


@pytest.mark.parametrize(("H", "HV"), [(2, 2), (1, 3)])
def test_value_heads_share_key_heads_and_batches_are_apart(triton_device, H, HV):
    compare(triton_device, T=66, gate=-1.0, B=2, H=H, HV=HV, K=16, V=16)


def test_half_precision_errs_no_more_than_twice_as_much(triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    dtype = torch.bfloat16 if triton_device == "cuda" else torch.float16
    compare(triton_device, dtype, T=70, gate=-1.0, **SMALL)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_repeated_keys_with_no_and_with_full_writing_strength(triton_device, beta):
    """The triangular system at its worst: entries of one below the diagonal."""
    tensors = {name: x.detach() for name, x in inputs(80, gate=0.0, **SMALL).items()}
    tensors["k"] = tensors["k"][:, :1].expand_as(tensors["k"]).contiguous()
    tensors["beta"] = torch.full_like(tensors["beta"], beta)
    single = {name: x.float() for name, x in tensors.items()}
    plain = [run(single, "reference"), run(single, "torch")]
    assert_within_twice(run(single, "triton", triton_device), plain, run(tensors, "reference"))


def packed(lengths, dtype):
    tensors = inputs(sum(lengths), gate=-1.0, **SMALL, dtype=dtype)
    states = inputs(1, **SMALL | {"B": len(lengths)}, dtype=dtype)["initial_state"]
    return tensors | {"initial_state": states}


@pytest.mark.parametrize("lengths", [[5, 64, 0, 1, 30], [0, 70, 0]])
def test_packed_sequences_of_several_lengths_one_of_them_empty(triton_device, lengths):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    exact, single = packed(lengths, torch.float64), packed(lengths, torch.float32)
    truth, plain, torch_ = (
        run(x, backend, cu_seqlens=cu) for x, backend in ((exact, "reference"), (single, "reference"), (exact, "torch"))
    )
    for name in truth:
        torch.testing.assert_close(torch_[name], truth[name], rtol=1e-9, atol=1e-9)
    got = run(single, "triton", triton_device, cu_seqlens=cu.to(triton_device))
    assert_within_twice(got, [plain], truth)
    for n, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        alone = {k: x.detach()[:, start:end] for k, x in exact.items() if k != "initial_state"}
        if end > start:
            o, state = gated_delta_rule(
                **alone, initial_state=exact["initial_state"][n : n + 1].detach(), output_final_state=True
            )
            torch.testing.assert_close(truth["o"][:, start:end], o)
            torch.testing.assert_close(truth["final_state"][n], state[0])
        else:
            torch.testing.assert_close(truth["final_state"][n], exact["initial_state"][n])


def test_a_sequence_handed_over_in_two_pieces_equals_one(triton_device):
    tensors = {name: x.detach().to(triton_device) for name, x in inputs(100, dtype=torch.float32, **SMALL).items()}
    whole, end = gated_delta_rule(**tensors, output_final_state=True, backend="triton")
    state, pieces = tensors.pop("initial_state"), []
    for part in (slice(0, 37), slice(37, None)):
        piece = {name: x[:, part] for name, x in tensors.items()}
        o, state = gated_delta_rule(**piece, initial_state=state, output_final_state=True, backend="triton")
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)


def test_the_fused_gate_and_norm_are_what_a_caller_would_compute(triton_device):
    tensors = inputs(40, **SMALL)
    rng = torch.Generator().manual_seed(0)
    for name, shape in (("A_log", (2,)), ("dt_bias", (2,)), ("g", (1, 40, 2))):
        tensors[name] = torch.randn(shape, generator=rng, dtype=torch.float64)
    truth = run(tensors, "reference", use_qk_l2norm=True)
    g = -tensors["A_log"].exp() * torch.nn.functional.softplus(tensors["g"] + tensors["dt_bias"])
    q, k = (torch.nn.functional.normalize(tensors[name] + 0, dim=-1) for name in ("q", "k"))
    o, _ = gated_delta_rule(q, k, tensors["v"], g, tensors["beta"], initial_state=tensors["initial_state"])
    torch.testing.assert_close(truth["o"], o, rtol=1e-5, atol=1e-5)  # 1e-6 is added under the root
    single = {name: x.detach().float() for name, x in tensors.items()}
    plain = [run(single, backend, use_qk_l2norm=True) for backend in ("reference", "torch")]
    assert_within_twice(run(single, "triton", triton_device, use_qk_l2norm=True), plain, truth)


def test_without_a_gate_it_is_the_delta_rule(triton_device):
    tensors = {name: x.detach().float().to(triton_device) for name, x in inputs(70, gate=0.0, **SMALL).items()}
    with_zeros, _ = gated_delta_rule(**tensors, backend="triton")
    without, _ = gated_delta_rule(**tensors | {"g": None}, backend="triton")
    assert torch.equal(with_zeros, without)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("K", "V"), [(16, 32), (20, 12), pytest.param(128, 128, marks=slow)])
def test_a_few_tokens_are_decoded_one_by_one(triton_device, T, K, V):
    exact = {n: t.detach() for n, t in inputs(T, gate=-1.0, B=2, H=2, HV=4, K=K, V=V).items()}
    results = [
        gated_delta_rule(**{n: t.to(device, dtype) for n, t in exact.items()}, output_final_state=True, backend=backend)
        for device, dtype, backend in (
            ("cpu", torch.float64, "reference"), ("cpu", torch.float32, "reference"), (triton_device, torch.float32, "triton")
        )
    ]  # fmt: skip
    truth, plain, got = (dict(zip(("o", "final_state"), found, strict=True)) for found in results)
    assert_within_twice(got, [plain], truth)
    on = {n: t.to(triton_device, torch.float32) for n, t in exact.items()}
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule(**on, backend="triton")
    assert counter.get_total_flops() == 2 * T * gated_delta_rule_flops(1, 4, K, V)


def test_two_runs_are_equal_bit_for_bit(triton_device):
    first, second = (run(inputs(70, dtype=torch.float32, **SMALL), "triton", triton_device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_flops_are_counted_for_the_operator(triton_device):
    tensors = {name: x.detach().float().to(triton_device) for name, x in inputs(128, **SMALL).items()}
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule(**tensors, backend="triton")
    assert counter.get_total_flops() == gated_delta_rule_flops(128, 2, 32, 16)


def test_the_operator_passes_pytorchs_own_checks(triton_device):
    from kernels.gated_delta_rule.operator import forward

    x = {name: t.detach().float().to(triton_device) for name, t in inputs(20, **SMALL).items()}
    cu = torch.tensor([0, 20], device=triton_device)
    packed = [x[name].flatten(0, 1).contiguous().requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    torch.library.opcheck(
        forward,
        (*packed, x["initial_state"], cu, 0.3),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"v": torch.zeros(1, 10, 2, 16, dtype=torch.float64)},
            "take float32, bfloat16 and float16, not torch.float64",
        ),
        (dict(q=torch.zeros(1, 10, 1, 300), k=torch.zeros(1, 10, 1, 300), initial_state=None), "up to 256"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(triton_device, change, words):
    tensors = {name: x.detach().float() for name, x in inputs(10, **SMALL).items()} | change
    with pytest.raises(ValueError, match=words):
        gated_delta_rule(**{n: x if x is None else x.to(triton_device) for n, x in tensors.items()}, backend="triton")
