"""Every backend of the state space dual form against the recurrence in float64."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import causal_conv1d
from kernels.ssd import ssd
from kernels.ssd.torch import CHUNK, ssd_flops

LENGTHS = [1, 15, 63, 64, 65, 100, pytest.param(1000, marks=pytest.mark.slow)]
DECAYS = [0.0, -1e-6, -0.1, -20.0]


def inputs(T, *, batch=2, H=4, G=2, P=8, N=16, decay=-0.1, dtype=torch.float64, seed=0):
    """Steps dt from U(0, 1) and A from decay * U(0.5, 1), so that dt A reaches from 0 to `decay`."""
    rng = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=rng, dtype=torch.float64)
    tensors = {
        "x": normal(batch, T, H, P),
        "dt": torch.rand(batch, T, H, generator=rng, dtype=torch.float64),
        "A": decay * (0.5 + 0.5 * torch.rand(H, generator=rng, dtype=torch.float64)),
        "B": normal(batch, T, G, N) * N**-0.5,
        "C": normal(batch, T, G, N) * N**-0.5,
        "D": normal(H),
        "z": normal(batch, T, H, P),
        "initial_states": normal(batch, H, P, N),
    }
    exact = ("dt", "A", "initial_states") if dtype is torch.bfloat16 else ()  # what a model keeps in float32
    return {k: t.to(torch.float32 if k in exact else dtype).requires_grad_() for k, t in tensors.items()}


def run(tensors, backend, **options):
    """Outputs, final states and every gradient of a random projection of both."""
    y, states = ssd(**tensors, return_final_states=True, backend=backend, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in (y, states)]
    used = {name: t for name, t in tensors.items() if t is not None}
    gradients = torch.autograd.grad([(y * weights[0]).sum() + (states * weights[1]).sum()], used.values())
    return {"y": y, "final_states": states, **dict(zip(used, gradients))}


def assert_equal(got, truth):
    assert got.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", [*DECAYS, -500.0])
def test_chunked_equals_the_recurrence_in_float64(T, decay):
    tensors = inputs(T, decay=decay)
    assert_equal(run(tensors, "torch"), run(tensors, "reference"))


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [1, 16, 50, 128])
def test_any_chunk_size_and_any_groups_give_the_same(G, chunk_size):
    tensors = inputs(70, G=G)
    assert_equal(run(tensors, "torch", chunk_size=chunk_size), run(tensors, "reference"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_whole_formula_written_out(backend):
    """Heads read their group, dt passes bias, softplus and limits, D skips the memory and z gates the output."""
    tensors = {name: t.detach() for name, t in inputs(5).items()}
    bias = torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)
    x, dt, A, B, C, D, z, S = tensors.values()
    got, end = ssd(
        **tensors, dt_bias=bias, dt_softplus=True, dt_limit=(0.1, 1.5), return_final_states=True, backend=backend
    )
    for b in range(2):
        for h in range(4):
            state = S[b, h]
            for t in range(5):
                step = F.softplus(dt[b, t, h] + bias[h]).clamp(0.1, 1.5)
                state = (step * A[h]).exp() * state + step * torch.outer(x[b, t, h], B[b, t, h // 2])
                y = (state @ C[b, t, h // 2] + D[h] * x[b, t, h]) * F.silu(z[b, t, h])
                torch.testing.assert_close(got[b, t, h], y)
            torch.testing.assert_close(end[b, h], state)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_errs_at_most_twice_as_much_as_the_recurrence_in_the_same_dtype(T, decay, dtype):
    truth = run(inputs(T, decay=decay), "reference")
    low = inputs(T, decay=decay, dtype=dtype)
    plain, got = run(low, "reference"), run(low, "torch")
    for name in truth:
        assert got[name].dtype == plain[name].dtype
        error = (got[name].double() - truth[name]).abs()
        allowed = 2 * (plain[name].double() - truth[name]).abs().max() + 1e-6 * truth[name].abs().max()
        tiles = error.reshape(error.shape[0], -1).split(64, dim=1)
        assert max(tile.max() for tile in tiles) <= allowed, name


@pytest.mark.parametrize("decay", [-500.0, -1e5, -1e12])
def test_the_strongest_decay_overflows_nowhere_and_forgets_all(decay):
    tensors = inputs(130, decay=decay, dtype=torch.float32)
    assert all(t.isfinite().all() for t in run(tensors, "torch").values())
    tensors = {name: t.detach() for name, t in tensors.items()} | {"D": None, "z": None}
    tensors["dt"] = tensors["dt"] + 1
    y, _ = ssd(**tensors)
    here = (tensors["B"] * tensors["C"]).sum(-1).repeat_interleave(2, dim=2) * tensors["dt"]
    torch.testing.assert_close(y, here[..., None] * tensors["x"])


def test_decays_keep_their_precision_after_a_chunk_of_strong_ones():
    """Strong decays, then weak ones: the differences between sums of the weak would drown in float32."""
    tensors = {name: t.detach() for name, t in inputs(CHUNK, G=4, dtype=torch.float32).items()}
    tensors |= {"A": torch.full((4,), -1.0), "D": None, "z": None}
    tensors["dt"] = torch.full_like(tensors["dt"], 1e-3)
    tensors["dt"][:, :32] = 50
    truth, _ = ssd(**{k: None if t is None else t.double() for k, t in tensors.items()}, backend="reference")
    error = (ssd(**tensors)[0] - truth)[:, 32:].abs().max() / truth[:, 32:].std()
    assert error < 1e-5


@pytest.mark.parametrize("cuts", [(1, 149), (63, 87), (64, 86), (1, 1, 98, 50)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_sequence_handed_over_in_pieces_equals_one(cuts, backend):
    tensors = inputs(150)
    whole, end = ssd(**tensors, return_final_states=True, backend=backend)
    states, pieces, start = tensors["initial_states"], [], 0
    for length in cuts:
        part = {k: t[:, start : start + length] if t.dim() > 1 else t for k, t in tensors.items()}
        y, states = ssd(**part | {"initial_states": states}, return_final_states=True, backend=backend)
        pieces.append(y)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(states, end)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("T", [1, 65])
def test_without_time_steps_it_is_linear_attention_with_log_decays_a(T, per_token):
    tensors = inputs(T, G=4) | {"dt": None}
    if per_token:
        tensors["A"] = (-torch.rand(2, T, 4, dtype=torch.float64)).requires_grad_()
    got = run(tensors, "torch")
    assert_equal(got, run(tensors, "reference"))
    ones = tensors | {"dt": torch.ones(2, T, 4, dtype=torch.float64, requires_grad=True)}
    torch.testing.assert_close(got["y"], run(ones, "reference")["y"])


def test_without_an_initial_state_it_starts_from_nothing():
    tensors = inputs(70)
    zero = ssd(**tensors | {"initial_states": torch.zeros(2, 4, 8, 16, dtype=torch.float64)})
    none = ssd(**tensors | {"initial_states": None})
    assert none[1] is None and zero[1] is None
    torch.testing.assert_close(none[0], zero[0], rtol=0, atol=0)


@pytest.mark.parametrize("T", [1, 70])
def test_autocast_changes_nothing(T):
    tensors = inputs(T, dtype=torch.float32)
    truth = ssd(**tensors, return_final_states=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = ssd(**tensors, return_final_states=True)
    torch.testing.assert_close(got, truth, rtol=0, atol=0)
    sums = (sum(t.sum() for t in pair) for pair in (got, truth))
    gradients = [torch.autograd.grad(total, tensors.values()) for total in sums]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("T", [1, 17, 64, 100, 192])
@pytest.mark.parametrize(("G", "chunk_size"), [(1, CHUNK), (2, CHUNK), (4, 16)])
def test_counted_flops_are_those_that_pytorch_counts(T, G, chunk_size):
    tensors = {name: t.to("meta") for name, t in inputs(T, batch=1, G=G).items()}
    with FlopCounterMode(display=False) as counter:
        ssd(**tensors, chunk_size=chunk_size)
    assert ssd_flops(T, 4, G, 8, 16, chunk_size) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda'.*reference"),
        ({"A": torch.zeros(3)}, r"A \(3,\)"),
        ({"B": torch.zeros(2, 10, 4, 16)}, r"B \(2, 10, 4, 16\)"),
        ({"B": torch.zeros(2, 10, 3, 16), "C": torch.zeros(2, 10, 3, 16)}, "4 heads are not a multiple of 3 groups"),
        ({"dt": torch.zeros(2, 10, 3)}, r"dt is \(2, 10, 3\), it must be \(2, 10, 4\)"),
        ({"D": torch.zeros(8)}, r"D is \(8,\), it must be \(4,\)"),
        ({"z": torch.zeros(2, 10, 4)}, r"z is \(2, 10, 4\), it must be \(2, 10, 4, 8\)"),
        ({"dt_bias": torch.zeros(1)}, "dt_bias is"),
        ({"initial_states": torch.zeros(2, 4, 16, 8)}, "initial_states"),
        ({"dt": None, "dt_softplus": True}, "give dt"),
        ({"chunk_size": 0}, "chunk_size 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        ssd(**(inputs(10) | change))


def test_mamba_ssm_is_called_as_it_wants_to_be_and_missed_by_name(monkeypatch):
    tensors = {name: t.detach() for name, t in inputs(20).items()}
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(ValueError, match="needs the package mamba-ssm.*or choose from auto, reference, torch"):
        ssd(**tensors, backend="mamba_ssm")

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
        dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    ):  # fmt: skip
        """The signature of the package's function."""
        options = dict(D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, dt_softplus=dt_softplus)
        found = ssd(x, dt, A, B, C, dt_limit=dt_limit, return_final_states=True, backend="reference", **options)
        return found if return_final_states else found[0]

    package = ModuleType("mamba_ssm.ops.triton.ssd_combined")
    package.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    options = {"dt_bias": torch.ones(4), "dt_softplus": True, "dt_limit": (0.1, 1.5)}
    for final in (False, True):
        got, expected = (
            ssd(**tensors, **options, return_final_states=final, backend=backend) for backend in ("mamba_ssm", "torch")
        )
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="takes a dt, A .H. and no cu_seqlens"):
        ssd(**tensors | {"dt": None}, backend="mamba_ssm")


@pytest.mark.slow  # half a minute of compilation
def test_it_and_the_short_convolution_compile_without_a_break():
    shapes = {
        "x": (1, 100, 16),
        "weight": (16, 4),
        "dt": (1, 100, 2),
        "A": (2,),
        "B": (1, 100, 1, 8),
        "C": (1, 100, 1, 8),
    }
    leaves = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}

    def loss(x, weight, dt, A, B, C):
        mixed, state = causal_conv1d(x, weight)
        y, states = ssd(mixed.unflatten(-1, (2, -1)), dt, -A.exp(), B, C, dt_softplus=True, return_final_states=True)
        return y.square().sum() + states.sum() + state.sum()

    results = [torch.autograd.grad(f(**leaves), leaves.values()) for f in (loss, torch.compile(loss, fullgraph=True))]
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
