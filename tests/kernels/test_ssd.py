"""The state space dual form's own options and extremes, against the recurrence in float64."""

import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import causal_conv1d, ssd, ssd_flops
from kernels.state_space.chunked import CHUNK
from tests.kernels.cases import SSD, assert_equal, assert_triton_is_right, run

slow = pytest.mark.slow
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
LENGTHS = [1, 15, 63, 64, 65, 100, pytest.param(1000, marks=slow)]
DECAYS = [0.0, -1e-6, -0.1, -20.0]
SHARED = dict(batch=2, heads=4, groups=2, head_dim=8)  # two heads read each group


def problem(T, decay=-0.1, **sizes):
    """Inputs with a gate z, C scaled like B, and A from decay * U(0.5, 1), so that dt A reaches from 0 to `decay`."""
    inputs = SSD.problem(T, **SHARED | {"state_size": 16} | sizes)
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(inputs["x"].shape, generator=rng, dtype=torch.float64)
    C = inputs["C"] * inputs["C"].shape[-1] ** -0.5
    return inputs | {"A": decay * (0.5 - 0.5 * inputs["A"]), "C": C, "z": z}


def in_single(inputs):
    return {name: x if x is None else x.float() for name, x in inputs.items()}


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", [*DECAYS, -500.0])
def test_chunked_equals_the_recurrence_in_float64(T, decay):
    inputs = problem(T, decay)
    assert_equal(run(SSD, inputs, "torch"), run(SSD, inputs, "reference"))


@pytest.mark.parametrize("G", [1, 2, 4])
@pytest.mark.parametrize("chunk_size", [1, 16, 50, 128])
def test_any_chunk_size_and_any_groups_give_the_same(G, chunk_size):
    inputs = problem(70, groups=G)
    assert_equal(run(SSD, inputs, "torch", chunk_size=chunk_size), run(SSD, inputs, "reference"))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_whole_formula_written_out(backend):
    """Heads read their group, dt passes bias, softplus and limits, D skips the memory and z gates the output."""
    inputs = problem(5)
    x, dt, A, B, C, D, S, z = inputs.values()
    bias = torch.tensor([0.5, -3.0, 0.0, 2.0], dtype=torch.float64)
    got, end = ssd(
        **inputs, dt_bias=bias, dt_softplus=True, dt_limit=(0.1, 1.5), return_final_states=True, backend=backend
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


@pytest.mark.thorough
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_errs_at_most_twice_as_much_as_the_recurrence_in_the_same_dtype(T, decay, dtype):
    inputs = problem(T, decay)
    truth = run(SSD, inputs, "reference")
    low = {name: x.to(torch.float32 if name in SSD.operation.kept else dtype) for name, x in inputs.items()}
    plain, got = run(SSD, low, "reference"), run(SSD, low, "torch")
    for name in truth:
        assert got[name].dtype == plain[name].dtype
        error = (got[name].double() - truth[name]).abs()
        allowed = 2 * (plain[name].double() - truth[name]).abs().max() + 1e-6 * truth[name].abs().max()
        assert error.max() <= allowed, name


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("decay", [0.0, -1e-4, -20.0, -500.0])
def test_triton_takes_decays_from_none_to_extreme(triton_device, decay):
    assert_triton_is_right(SSD, triton_device, problem(66, decay, **SSD.sizes | {"heads": 2}, batch=1))


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize(
    ("P", "N"),
    [(16, 16), (48, 80), (80, 20), *(pytest.param(*s, marks=slow) for s in ((64, 128), (256, 64), (64, 256)))],
)
def test_triton_takes_head_and_state_sizes(triton_device, P, N):
    inputs = problem(66, -1.0, batch=1, heads=1, groups=1, head_dim=P, state_size=N)
    assert_triton_is_right(SSD, triton_device, inputs)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize(("S", "T", "H", "G"), [(2, 10, 2, 2), (2, 10, 4, 2), (1, 65, 3, 1)])
def test_in_triton_heads_share_groups_and_batches_are_apart(triton_device, S, T, H, G):
    assert_triton_is_right(SSD, triton_device, problem(T, -1.0, batch=S, heads=H, groups=G, head_dim=16))


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("plain", [False, True])
def test_triton_takes_time_steps_with_bias_softplus_and_limits_and_none_at_all(triton_device, plain):
    inputs = problem(40, -1.0, batch=1, heads=2, groups=1)
    if plain:
        inputs |= {"dt": None, "D": None, "z": None, "A": -torch.rand(1, 40, 2, dtype=torch.float64)}
        options = {}
    else:
        inputs |= {"dt_bias": torch.tensor([0.5, -3.0], dtype=torch.float64)}
        options = {"dt_softplus": True, "dt_limit": (0.1, 1.5)}
    assert_triton_is_right(SSD, triton_device, inputs, **options)


@pytest.mark.parametrize("decay", [-500.0, -1e5, -1e12])
def test_the_strongest_decay_overflows_nowhere_and_forgets_all(decay):
    inputs = problem(130, decay)
    assert all(x.isfinite().all() for x in run(SSD, inputs, "torch", dtype=torch.float32).values())
    inputs = in_single(inputs | {"D": None, "z": None})
    inputs["dt"] = inputs["dt"] + 1
    y, _ = ssd(**inputs)
    here = (inputs["B"] * inputs["C"]).sum(-1).repeat_interleave(2, dim=2) * inputs["dt"]
    torch.testing.assert_close(y, here[..., None] * inputs["x"])


def test_decays_keep_their_precision_after_a_chunk_of_strong_ones():
    """Strong decays, then weak ones: the differences between sums of the weak would drown in float32."""
    inputs = in_single(problem(CHUNK, groups=4) | {"D": None, "z": None})
    inputs |= {"A": torch.full((4,), -1.0), "dt": torch.full_like(inputs["dt"], 1e-3)}
    inputs["dt"][:, :32] = 50
    truth, _ = ssd(**{name: x if x is None else x.double() for name, x in inputs.items()}, backend="reference")
    error = (ssd(**inputs)[0] - truth)[:, 32:].abs().max() / truth[:, 32:].std()
    assert error < 1e-5


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("T", [1, 65])
def test_without_time_steps_it_is_linear_attention_with_log_decays_a(T, per_token):
    inputs = problem(T, groups=4) | {"dt": None}
    if per_token:
        inputs["A"] = -torch.rand(2, T, 4, dtype=torch.float64)
    got = run(SSD, inputs, "torch")
    assert_equal(got, run(SSD, inputs, "reference"))
    ones = inputs | {"dt": torch.ones(2, T, 4, dtype=torch.float64)}
    torch.testing.assert_close(got["y"], run(SSD, ones, "reference")["y"])


@pytest.mark.parametrize("T", [1, 17, 64, 100, 192])
@pytest.mark.parametrize(("G", "chunk_size"), [(1, CHUNK), (2, CHUNK), (4, 16)])
def test_counted_flops_are_those_that_pytorch_counts(T, G, chunk_size):
    inputs = {name: x.to("meta") for name, x in problem(T, batch=1, groups=G).items()}
    with FlopCounterMode(display=False) as counter:
        ssd(**inputs, chunk_size=chunk_size)
    assert ssd_flops(T, 4, G, 8, 16, chunk_size) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"A": torch.zeros(3)}, r"A \(3,\)"),
        ({"B": torch.zeros(2, 10, 4, 16)}, r"B \(2, 10, 4, 16\)"),
        ({"B": torch.zeros(2, 10, 3, 16), "C": torch.zeros(2, 10, 3, 16)}, "4 heads are not a multiple of 3 groups"),
        ({"dt": torch.zeros(2, 10, 3)}, r"dt is \(2, 10, 3\), it must be \(2, 10, 4\)"),
        ({"D": torch.zeros(8)}, r"D is \(8,\), it must be \(4,\)"),
        ({"z": torch.zeros(2, 10, 4, 1)}, r"z is \(2, 10, 4, 1\), it must be \(2, 10, 4, 8\)"),
        ({"dt_bias": torch.zeros(1)}, "dt_bias is"),
        ({"initial_states": torch.zeros(2, 4, 16, 8)}, "initial_states"),
        ({"dt": None, "dt_softplus": True}, "give dt"),
        ({"chunk_size": 0}, "chunk_size 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    inputs = {name: x.float() for name, x in problem(10).items()}
    with pytest.raises(ValueError, match=words):
        ssd(**inputs | change)


def test_mamba_ssm_is_called_as_it_wants_to_be_and_missed_by_name(monkeypatch):
    inputs = problem(20)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(ValueError, match="needs the package mamba-ssm.*or choose from auto, reference, torch"):
        ssd(**inputs, backend="mamba_ssm")

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
    options = {"dt_bias": torch.ones(4, dtype=torch.float64), "dt_softplus": True, "dt_limit": (0.1, 1.5)}
    for final in (False, True):
        got, expected = (
            ssd(**inputs, **options, return_final_states=final, backend=backend) for backend in ("mamba_ssm", "torch")
        )
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="takes a dt, A .H. and no cu_seqlens"):
        ssd(**inputs | {"dt": None}, backend="mamba_ssm")


@pytest.mark.thorough
def test_the_triton_operator_passes_pytorchs_own_checks(triton_device):
    from kernels.state_space.triton_operators import forward

    t = {name: x.to(triton_device).requires_grad_() for name, x in in_single(problem(20)).items()}
    bias = torch.zeros(4, device=triton_device, requires_grad=True)
    arguments = (t[name] for name in ("x", "dt", "A", "B", "C", "D", "z"))
    arguments = (*arguments, bias, t["initial_states"], None, True, 0.0, 2.0)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, arguments, test_utils=checks)


@slow  # half a minute of compilation
def test_it_and_the_short_convolution_compile_without_a_break():
    shapes = {
        "x": (1, 100, 16), "weight": (16, 4), "dt": (1, 100, 2), "A": (2,), "B": (1, 100, 1, 8), "C": (1, 100, 1, 8),
    }  # fmt: skip
    leaves = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}

    def loss(x, weight, dt, A, B, C):
        mixed, state = causal_conv1d(x, weight)
        y, states = ssd(mixed.unflatten(-1, (2, -1)), dt, -A.exp(), B, C, dt_softplus=True, return_final_states=True)
        return y.square().sum() + states.sum() + state.sum()

    results = [torch.autograd.grad(f(**leaves), leaves.values()) for f in (loss, torch.compile(loss, fullgraph=True))]
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("gate", [-math.inf, -1e30, -300.0])
def test_a_gate_that_resets_leaves_what_follows_it_right_and_no_nan(triton_device, backend, gate):
    """The sums of what follows would drown beside the gate's own."""
    inputs = in_single(problem(70, batch=1) | {"dt": None, "A": -torch.rand(1, 70, 4) / 8})
    inputs["A"][:, 40] = gate
    inputs = {name: x if x is None else x.to(triton_device) for name, x in inputs.items()}
    given = {name: x for name, x in inputs.items() if x is not None}
    after = SSD.part(given, slice(40, 70), torch.zeros_like(inputs["initial_states"])) | {"dt": None}
    (y, state), (rest, end) = (ssd(**part, return_final_states=True, backend=backend) for part in (inputs, after))
    torch.testing.assert_close(y[:, 40:], rest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)
    assert all(x.isfinite().all() for x in run(SSD, inputs, backend, triton_device).values())


@pytest.mark.thorough
@on_triton
def test_in_triton_a_later_decay_changes_no_earlier_output_by_a_bit(triton_device):
    inputs = in_single(problem(140, batch=1, groups=1) | {"dt": None, "A": -torch.rand(1, 140, 4)})
    inputs = {name: x if x is None else x.to(triton_device) for name, x in inputs.items()}
    plain, _ = ssd(**inputs, backend="triton")
    inputs["A"] = inputs["A"].clone()
    inputs["A"][:, 100] = -50.0
    changed, _ = ssd(**inputs, backend="triton")
    assert torch.equal(plain[:, :100], changed[:, :100]) and not torch.equal(plain[:, 100], changed[:, 100])


@pytest.mark.thorough
@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_takes_more_heads_than_a_program_and_streams_cut_out_of_a_wider_one(triton_device, dtype):
    """Twenty heads of a group are two parts forward and backward; x, B and C lie side by side, as the convolution
    leaves them."""
    inputs = problem(10, batch=1, heads=20, groups=1, head_dim=16)
    assert_triton_is_right(SSD, triton_device, inputs, dtype)
    single = {name: x.to(triton_device) for name, x in in_single(inputs).items()}
    names = ("x", "B", "C")
    wide = torch.cat([single[name].flatten(2) for name in names], -1).split([320, 16, 16], -1)
    cut = {name: t.unflatten(-1, single[name].shape[2:]) for name, t in zip(names, wide, strict=True)}
    got, expected = (ssd(**single | change, backend="triton")[0] for change in (cut, {}))
    assert torch.equal(got, expected)


@pytest.mark.thorough
@on_triton
def test_without_a_state_or_its_gradient_triton_makes_none(triton_device):
    """And where only the final state is differentiated, the outputs count for nothing."""
    inputs = {name: x.to(triton_device) for name, x in in_single(problem(20, batch=1)).items() if name != "z"}
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "initial_states"}
    for pick in (0, 1):
        results = []
        for backend in ("torch", "triton"):
            found = ssd(**leaves, return_final_states=True, backend=backend)[pick]
            results.append(torch.autograd.grad(found.square().sum(), leaves.values(), allow_unused=pick == 1))
        for expected, got in zip(*results, strict=True):
            wanted = torch.zeros_like(got) if expected is None else expected
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
@on_triton
def test_states_too_wide_for_triton_are_refused(triton_device):
    inputs = {name: x.to(triton_device) for name, x in in_single(problem(20, batch=1, state_size=257)).items()}
    with pytest.raises(ValueError, match="257 numbers per channel: the Triton kernels take up to 256"):
        ssd(**inputs, backend="triton")
