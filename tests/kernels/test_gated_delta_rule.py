"""Every backend of the gated delta rule against the recurrence in float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import gated_delta_rule
from kernels.gated_delta_rule import torch as chunked

LENGTHS = [1, 63, 64, 65, 200]


def inputs(T, *, B=2, H=2, HV=4, K=8, V=16, gate=-0.1, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)  # noqa: E731
    q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
    g = gate * torch.rand(B, T, HV, generator=rng, dtype=torch.float64)
    beta = torch.rand(B, T, HV, generator=rng, dtype=torch.float64)
    tensors = dict(q=q, k=k, v=normal(B, T, HV, V), g=g, beta=beta, initial_state=normal(B, HV, K, V))
    return {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}


def run(tensors, backend):
    """Outputs, final state and every gradient of a random projection of both."""
    o, state = gated_delta_rule(**tensors, output_final_state=True, backend=backend)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x.dtype) for x in (o, state)]
    gradients = torch.autograd.grad([(o * weights[0]).sum() + (state * weights[1]).sum()], tensors.values())
    return {"o": o, "final_state": state, **dict(zip(tensors, gradients))}


@pytest.mark.parametrize("T", [*LENGTHS, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("gate", [0.0, -0.1, -20.0])
def test_chunked_equals_the_recurrence_in_float64(T, gate):
    tensors = inputs(T, gate=gate)
    truth, got = run(tensors, "reference"), run(tensors, "torch")
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("gate", [0.0, -0.1, -20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_errs_at_most_twice_as_much_as_the_recurrence_in_the_same_dtype(T, gate, dtype):
    truth = run(inputs(T, gate=gate, K=32), "reference")
    low = inputs(T, gate=gate, K=32, dtype=dtype)
    plain, got = run(low, "reference"), run(low, "torch")
    for name in truth:
        assert got[name].dtype == plain[name].dtype
        error = (got[name].double() - truth[name]).abs()
        allowed = 2 * (plain[name].double() - truth[name]).abs().max() + 1e-6 * truth[name].abs().max()
        tiles = error.flatten(1).split(64, dim=1)
        assert max(tile.max() for tile in tiles) <= allowed, name


@pytest.mark.parametrize("T", [8, 64, 192])
def test_counted_flops_are_the_products_that_pytorch_counts_but_for_the_triangular_system(T):
    """Which is counted as a substitution takes it, and run as an inverse and a full product."""
    tensors = {name: x.detach().to("meta") for name, x in inputs(T).items()}
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, **options: 2 * a.numel() * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as ran:
        chunked.chunked_forward(*tensors.values(), 0.3)
    C, heads = min(T, 64), 2 * 4 * -(-T // 64)
    with FlopCounterMode(display=False) as inverse:
        chunked.unit_triangular_inverse(torch.empty(heads, C, C, device="meta"))
    product = heads * 2 * C * C * (8 + 16)
    with FlopCounterMode(display=False) as counted:
        gated_delta_rule(**tensors, backend="torch")
    assert counted.get_total_flops() == ran.get_total_flops() - inverse.get_total_flops() - product // 2
    assert counted.get_total_flops() == 2 * chunked.gated_delta_rule_flops(T, 4, 8, 16)


def test_a_step_is_counted_as_pytorch_counts_it():
    with FlopCounterMode(display=False) as counter:
        gated_delta_rule(**{name: x.to("meta") for name, x in inputs(1).items()})
    assert counter.get_total_flops() == 2 * chunked.gated_delta_rule_flops(1, 4, 8, 16)


def test_the_operator_passes_pytorchs_own_checks():
    tensors = inputs(20, dtype=torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(chunked.forward, (*tensors.values(), 0.3), test_utils=checks)


@pytest.mark.slow  # half a minute of compilation
def test_it_compiles_without_a_break():
    tensors = inputs(100, dtype=torch.float32)

    def loss(q, k, v, g, beta, initial_state):
        o, state = gated_delta_rule(q, k, v.exp(), g, beta, initial_state=initial_state, output_final_state=True)
        return o.square().sum() + state.sum()

    results = [torch.autograd.grad(f(**tensors), tensors.values()) for f in (loss, torch.compile(loss, fullgraph=True))]
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_strong_decay_overflows_nowhere():
    got = run(inputs(130, gate=-500.0, dtype=torch.float32), "torch")
    assert all(x.isfinite().all() for x in got.values())


def test_repeated_keys_with_full_writing_strength_stay_stable():
    tensors = {name: x.detach() for name, x in inputs(300, gate=0.0, HV=2, dtype=torch.float32).items()}
    tensors["k"] = tensors["k"][:, :1].expand_as(tensors["k"])
    tensors["beta"] = torch.ones_like(tensors["beta"])
    truth, _ = gated_delta_rule(**{name: x.double() for name, x in tensors.items()}, backend="reference")
    got, _ = gated_delta_rule(**tensors, backend="torch")
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4)


def test_autocast_changes_nothing():
    tensors = inputs(70, dtype=torch.float32)
    truth = run(tensors, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(tensors, "torch")
    for name in truth:
        assert torch.equal(got[name], truth[name]), name


@pytest.mark.parametrize("cut", [1, 63, 64, 100])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_sequence_handed_over_in_two_pieces_equals_one(cut, backend):
    tensors = inputs(150)
    whole, end = gated_delta_rule(**tensors, output_final_state=True, backend=backend)
    state = tensors.pop("initial_state")
    pieces = []
    for part in (slice(0, cut), slice(cut, None)):
        piece = {name: x[:, part] for name, x in tensors.items()}
        o, state = gated_delta_rule(**piece, initial_state=state, output_final_state=True, backend=backend)
        pieces.append(o)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, end)


def test_zero_writing_strength_leaves_an_empty_memory_silent():
    tensors = inputs(70) | {"beta": torch.zeros(2, 70, 4, dtype=torch.float64), "initial_state": None}
    assert gated_delta_rule(**tensors)[0].abs().max() == 0


def test_perfect_recall_of_orthogonal_keys():
    """With beta = 1, no decay and orthonormal keys, reading with a key returns its value (scale 1)."""
    k = torch.eye(8, dtype=torch.float64)[None, :, None]
    v = torch.randn(1, 8, 1, 4, dtype=torch.float64)
    zero, one = torch.zeros(1, 8, 1, dtype=torch.float64), torch.ones(1, 8, 1, dtype=torch.float64)
    _, state = gated_delta_rule(k, k, v, zero, one, scale=1.0, output_final_state=True)
    o, _ = gated_delta_rule(k, k, v, zero, 0 * one, scale=1.0, initial_state=state)
    torch.testing.assert_close(o, v)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda'.*reference"),
        ({"g": torch.zeros(2, 10, 3)}, "g, beta"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, "initial_state"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        gated_delta_rule(**(inputs(10) | change))


def test_value_heads_that_do_not_share_evenly_are_refused():
    with pytest.raises(ValueError, match="3 value heads are not a multiple of 2 key heads"):
        gated_delta_rule(**inputs(10, HV=3))
