"""The gated delta rule's own options and extremes, against the recurrence in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import gated_delta_rule, gated_delta_rule_flops
from tests.kernels.cases import DELTA, assert_equal, assert_triton_is_right, assert_within_twice, run

slow = pytest.mark.slow
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
LENGTHS = [1, 63, 64, 65, 130]
SHARED = dict(batch=2, heads=4, key_heads=2, head_dim=8, value_dim=16)  # two value heads read each key head


def problem(T, gate=-1.0, **sizes):
    """Inputs with gates from U(gate, 0)."""
    inputs = DELTA.problem(T, **SHARED | sizes)
    return inputs | {"g": -gate * inputs["g"]}


@pytest.mark.parametrize("T", [*LENGTHS, pytest.param(1000, marks=slow)])
@pytest.mark.parametrize("gate", [0.0, -0.1, -20.0])
def test_chunked_equals_the_recurrence_in_float64(T, gate):
    inputs = problem(T, gate)
    assert_equal(run(DELTA, inputs, "torch"), run(DELTA, inputs, "reference"))


@pytest.mark.thorough
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gate", [0.0, -0.1, -20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_errs_at_most_twice_as_much_as_the_recurrence_in_the_same_dtype(T, gate, dtype):
    inputs = problem(T, gate, head_dim=32)
    truth = run(DELTA, inputs, "reference")
    plain, got = (run(DELTA, inputs, backend, dtype=dtype) for backend in ("reference", "torch"))
    for name in truth:
        assert got[name].dtype == plain[name].dtype
        error = (got[name].double() - truth[name]).abs()
        allowed = 2 * (plain[name].double() - truth[name]).abs().max() + 1e-6 * truth[name].abs().max()
        assert error.max() <= allowed, name


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("gate", [0.0, -1e-4, -20.0, -500.0])
def test_triton_takes_gates_from_none_to_extreme(triton_device, gate):
    inputs = DELTA.problem(66)
    assert_triton_is_right(DELTA, triton_device, inputs | {"g": -gate * inputs["g"]})


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize(
    ("K", "V"),
    [(16, 16), (64, 32), (48, 80), *(pytest.param(*s, marks=slow) for s in ((128, 128), (256, 64), (64, 256)))],
)
def test_triton_takes_head_sizes(triton_device, K, V):
    inputs = DELTA.problem(66, heads=1, key_heads=1, head_dim=K, value_dim=V)
    assert_triton_is_right(DELTA, triton_device, inputs)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize(("B", "T", "H", "HV"), [(2, 10, 2, 2), (2, 10, 1, 3), (1, 65, 1, 2)])
def test_in_triton_value_heads_share_key_heads_and_batches_are_apart(triton_device, B, T, H, HV):
    inputs = DELTA.problem(T, batch=B, heads=HV, key_heads=H, head_dim=16)
    assert_triton_is_right(DELTA, triton_device, inputs)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_triton_takes_repeated_keys_with_no_and_with_full_writing_strength(triton_device, beta):
    """The triangular system at its worst: entries of one below the diagonal."""
    inputs = DELTA.problem(80)
    inputs |= {"g": torch.zeros_like(inputs["g"]), "k": inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()}
    inputs["beta"] = torch.full_like(inputs["beta"], beta)
    assert_triton_is_right(DELTA, triton_device, inputs)


def test_a_step_is_counted_as_pytorch_counts_it():
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule(**{name: x.to("meta") for name, x in problem(1).items()})
    assert counter.get_total_flops() == 2 * gated_delta_rule_flops(1, 4, 8, 16)


@pytest.mark.thorough
def test_the_triton_operator_passes_pytorchs_own_checks(triton_device):
    from kernels.delta.triton_operators import forward

    inputs = {name: x.float().to(triton_device) for name, x in DELTA.problem(5, head_dim=16, heads=2).items()}
    packed = [inputs[name][0].requires_grad_() for name in ("q", "k", "v", "g", "beta")]
    cu_seqlens = torch.tensor([0, 5], device=triton_device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*packed, inputs["initial_state"], None, None, cu_seqlens, 5, 0.3, True, True)
    torch.library.opcheck(forward, arguments, test_utils=checks)


@slow  # half a minute of compilation
def test_it_compiles_without_a_break():
    inputs = {name: x.float().requires_grad_() for name, x in problem(100, -0.1).items()}

    def loss(q, k, v, g, beta, initial_state):
        o, state = gated_delta_rule(q, k, v.exp(), g, beta, initial_state=initial_state, output_final_state=True)
        return o.square().sum() + state.sum()

    results = [torch.autograd.grad(f(**inputs), inputs.values()) for f in (loss, torch.compile(loss, fullgraph=True))]
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_strong_decay_overflows_nowhere():
    got = run(DELTA, problem(130, -500.0), "torch", dtype=torch.float32)
    assert all(x.isfinite().all() for x in got.values())


def test_repeated_keys_with_full_writing_strength_stay_stable():
    inputs = problem(300, 0.0, heads=2)
    inputs |= {"k": inputs["k"][:, :1].expand_as(inputs["k"]), "beta": torch.ones_like(inputs["beta"])}
    single = {name: x.float() for name, x in inputs.items()}
    truth, _ = gated_delta_rule(**{name: x.double() for name, x in single.items()}, backend="reference")
    got, _ = gated_delta_rule(**single, backend="torch")
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4)


def test_zero_writing_strength_leaves_an_empty_memory_silent():
    inputs = problem(70) | {"beta": torch.zeros(2, 70, 4, dtype=torch.float64), "initial_state": None}
    assert gated_delta_rule(**inputs)[0].abs().max() == 0


def test_perfect_recall_of_orthogonal_keys():
    """With beta = 1, no decay and orthonormal keys, reading with a key returns its value (scale 1)."""
    k = torch.eye(8, dtype=torch.float64)[None, :, None]
    v = torch.randn(1, 8, 1, 4, dtype=torch.float64)
    zero, one = torch.zeros(1, 8, 1, dtype=torch.float64), torch.ones(1, 8, 1, dtype=torch.float64)
    _, state = gated_delta_rule(k, k, v, zero, one, scale=1.0, output_final_state=True)
    o, _ = gated_delta_rule(k, k, v, zero, 0 * one, scale=1.0, initial_state=state)
    torch.testing.assert_close(o, v)


@pytest.mark.thorough
@on_triton
def test_the_fused_gate_and_norm_are_what_a_caller_would_compute(triton_device):
    inputs = DELTA.problem(20, heads=2)
    rng = torch.Generator().manual_seed(0)
    for name, shape in (("A_log", (2,)), ("dt_bias", (2,)), ("g", (1, 20, 2))):
        inputs[name] = torch.randn(shape, generator=rng, dtype=torch.float64)
    truth = run(DELTA, inputs, "reference", use_qk_l2norm=True)
    g = -inputs["A_log"].exp() * torch.nn.functional.softplus(inputs["g"] + inputs["dt_bias"])
    q, k = (torch.nn.functional.normalize(inputs[name], dim=-1) for name in ("q", "k"))
    o, _ = gated_delta_rule(q, k, inputs["v"], g, inputs["beta"], initial_state=inputs["initial_state"])
    torch.testing.assert_close(truth["y"], o, rtol=1e-5, atol=1e-5)  # 1e-6 is added under the root
    assert_triton_is_right(DELTA, triton_device, inputs, use_qk_l2norm=True)


def on(device, inputs):
    return {name: x.to(device, torch.float32) for name, x in inputs.items()}


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("reset", [-torch.inf, -1e30, -1e5])
def test_in_triton_a_reset_forgets_and_what_follows_it_is_exact(triton_device, reset):
    """Also of two gates that follow each other, at the first token and at the border of two chunks."""
    inputs = DELTA.problem(130)
    inputs["g"][:, [0, 20, 21, 64, 100]] = -200.0
    truth = run(DELTA, inputs, "reference")
    plain = [run(DELTA, inputs, "reference", dtype=torch.float32)]
    inputs["g"][:, [0, 20, 21, 64, 100]] = reset
    assert_within_twice(run(DELTA, inputs, "triton", triton_device, torch.float32), plain, truth, 8)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("gate", [-torch.inf, 0.0, -3.0])
def test_in_triton_a_later_gate_leaves_an_output_bit_for_bit(triton_device, gate):
    inputs = on(triton_device, DELTA.problem(80))
    before, _ = gated_delta_rule(**inputs, backend="triton")
    inputs["g"][:, 41] = gate
    after, _ = gated_delta_rule(**inputs, backend="triton")
    assert torch.equal(before[:, :41], after[:, :41]) and not torch.equal(before[:, 41:], after[:, 41:])


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("which", [0, 1], ids=["outputs", "final state"])
def test_in_triton_gradients_of_outputs_alone_or_of_the_final_state_alone(triton_device, which):
    grads = []
    for backend in ("torch", "triton"):
        leaves = {name: x.requires_grad_() for name, x in on(triton_device, DELTA.problem(70)).items()}
        found = gated_delta_rule(**leaves, output_final_state=True, backend=backend)[which]
        grads.append(torch.autograd.grad(found.square().sum(), leaves.values()))
    for plain, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


class Zeros(TorchDispatchMode):
    """Notes how many zeros are made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        if "zero" in func.__name__:
            self.made.append(found.numel())
        return found


@pytest.mark.thorough
@on_triton
def test_in_triton_no_zeros_stand_for_a_state_or_a_gradient_that_is_not_there(triton_device):
    inputs = {name: x.requires_grad_() for name, x in on(triton_device, DELTA.problem(70)).items()}
    with Zeros() as zeros:
        gated_delta_rule(**inputs | {"initial_state": None}, backend="triton")[0].sum().backward()
    assert not any(zeros.made)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("T", [1, 70])
def test_triton_reads_parts_of_wider_rows_in_place(triton_device, T):
    """As a model hands over the parts of one projection."""
    inputs = on(triton_device, DELTA.problem(T, batch=2))
    wide = torch.cat([inputs[name].flatten(2) for name in ("q", "k", "v")], -1)
    parts = wide.split([inputs[name][0, 0].numel() for name in ("q", "k", "v")], -1)
    views = {n: part.view(inputs[n].shape) for n, part in zip(("q", "k", "v"), parts, strict=True)}
    apart, _ = gated_delta_rule(**inputs, backend="triton")
    in_place, _ = gated_delta_rule(**inputs | views, backend="triton")
    assert not views["q"].is_contiguous() and torch.equal(apart, in_place)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("T", [5, 70])
def test_in_triton_packed_sequences_share_the_fused_gate_and_norm(triton_device, T):
    lengths = [3, T, 0, 65]
    inputs = DELTA.problem(sum(lengths), heads=2) | {
        "initial_state": DELTA.problem(1, batch=4, heads=2)["initial_state"]
    }
    rng = torch.Generator().manual_seed(0)
    inputs |= {name: torch.randn(2, generator=rng, dtype=torch.float64) for name in ("A_log", "dt_bias")}
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    assert_triton_is_right(DELTA, triton_device, inputs, use_qk_l2norm=True, cu_seqlens=cu_seqlens)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("T", [1, 3])
def test_the_fused_gate_and_norm_are_taken_in_decoding_too(triton_device, T):
    inputs = DELTA.problem(T, heads=2) | {"A_log": torch.tensor([0.3, -0.5]), "dt_bias": torch.tensor([-20.0, 1.0])}
    inputs = on(triton_device, inputs)
    options = {"use_qk_l2norm": True, "output_final_state": True}
    got, truth = (gated_delta_rule(**inputs, **options, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(got, truth, rtol=1e-5, atol=1e-6)


@on_triton
@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_without_a_gate_it_is_the_delta_rule(triton_device, backend):
    inputs = {name: x.float().to(triton_device) for name, x in DELTA.problem(10).items()}
    with_zeros, _ = gated_delta_rule(**inputs | {"g": torch.zeros_like(inputs["g"])}, backend=backend)
    without, _ = gated_delta_rule(**inputs | {"g": None}, backend=backend)
    assert torch.equal(with_zeros, without)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"g": torch.zeros(2, 10, 3)}, "g, beta"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, r"initial_state is \(2, 4, 16, 8\), it must be \(2, 4, 8, 16\)"),
        ({"g": None, "A_log": torch.zeros(4)}, "make a gate of g, which is None"),
        ({"A_log": torch.zeros(4)}, r"go together, each \[4\]"),
        (
            {"v": torch.zeros(2, 10, 3, 16), "g": torch.zeros(2, 10, 3), "beta": torch.zeros(2, 10, 3)},
            "3 value heads are not a multiple of 2 key heads",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        gated_delta_rule(**(problem(10) | change))


def test_heads_that_are_too_large_for_triton_are_refused(triton_device):
    q = torch.zeros(1, 10, 1, 300, device=triton_device)
    v, gate = torch.zeros(1, 10, 1, 16, device=triton_device), torch.zeros(1, 10, 1, device=triton_device)
    with pytest.raises(ValueError, match="heads of 300 and 16 dimensions.*up to 256"):
        gated_delta_rule(q, q, v, gate, gate, backend="triton")
