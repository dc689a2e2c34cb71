"""The delta rule against the recurrences that have been published, and its gates at their extremes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import delta_rule, delta_rule_flops, gated_delta_rule, ssd
from kernels.fast_weights import chunked
from kernels.fast_weights.triangular import unit_triangular_inverse
from tests.kernels.cases import FAST_WEIGHTS, assert_equal, run

SHARED = dict(batch=2, heads=4, key_heads=2, head_dim=8, value_dim=16)  # two value heads read each key head
B, H, K, V = 2, 3, 8, 16  # sequences, heads, dimensions of keys and values of the published recurrences
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])
GATES = {
    "none": lambda g: None,
    "per head": lambda g: g.mean(-1),
    "per channel": lambda g: g,
    "strong": lambda g: 20 * g,
    "resets per head": lambda g: torch.where(g[..., 0] < -0.9, -torch.inf, 20 * g[..., 1]),
    "resets per channel": lambda g: torch.where(g < -0.9, -torch.inf, g),
    "resets by the least number": lambda g: torch.where(g < -0.9, -1e30, g),
    "positive": lambda g: -0.1 * g,
    "of both signs": lambda g: 2 * g + 0.5,
}
gates = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


def problem(T, gate=GATES["per channel"], erases=True, **sizes):
    inputs = FAST_WEIGHTS.problem(T, **SHARED | sizes)
    return inputs | {"g": gate(inputs["g"])} | ({} if erases else {"a": None})


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(T, *more):
    """Random queries, keys of norm one, and values [B, T, H, .], a writing strength and a gate [B, T, H] of each."""
    q, k, v = (normal(B, T, H, size, seed=n) for n, size in enumerate((K, K, V)))
    beta, g = normal(B, T, H, seed=3).sigmoid(), -normal(B, T, H, seed=4).abs()
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, g


def outer(x, y):
    return x[..., :, None] * y[..., None, :]


# T, whether there is erasing, and writes of a token
FORMS = [(65, True, None), (20, False, 2)]
MORE = [(1, True, None), (2, True, None), (63, True, None), (130, False, None), (65, True, 1), (33, True, 2)]
MORE += [(40, True, 3), (1, True, 3), (9, True, 70)]
FORMS += [pytest.param(*form, marks=pytest.mark.thorough) for form in MORE]


@gates
@pytest.mark.parametrize(("T", "erases", "writes"), FORMS)
def test_chunked_equals_the_recurrence_in_float64_with_gates_of_any_strength(gate, T, erases, writes):
    inputs = problem(T, gate, erases, writes=writes)
    assert_equal(run(FAST_WEIGHTS, inputs, "torch"), run(FAST_WEIGHTS, inputs, "reference"))


@gates
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(("T", "writes"), [(130, None), (50, 2)])
def test_chunked_errs_at_most_twice_as_much_as_the_recurrence_in_the_same_dtype(gate, dtype, T, writes):
    inputs = problem(T, gate, writes=writes, head_dim=32)
    low = {name: x if x is None else x.to(torch.float32 if name == "g" else dtype) for name, x in inputs.items()}
    exact = {name: x if x is None else x.double() for name, x in low.items()}
    truth, plain, got = (
        run(FAST_WEIGHTS, x, backend) for x, backend in ((exact, "reference"), (low, "reference"), (low, "torch"))
    )
    for name in truth:
        assert got[name].dtype == plain[name].dtype
        assert got[name].isfinite().all()
        error = (got[name].double() - truth[name]).abs()
        allowed = 2 * (plain[name].double() - truth[name]).abs().max() + 1e-6 * truth[name].abs().max()
        assert error.max() <= allowed, name


@BACKENDS
def test_it_has_deltanet_and_the_gated_delta_rule_as_cases(backend):
    q, k, v, beta, g = tokens(70)
    for gate in (None, g):
        state, found = torch.zeros(B, H, K, V, dtype=torch.float64), []
        for t in range(70):  # S_t = e^g S (I - beta k k^T) + beta v k^T, as the paper has it with S [V, K]
            decay = 1 if gate is None else gate[:, t, :, None, None].exp()
            erase = torch.eye(K, dtype=torch.float64) - beta[:, t, :, None, None] * outer(k[:, t], k[:, t])
            state = decay * erase @ state + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])
            found.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
        truth = torch.stack(found, 1)
        strength = beta[..., None]
        for k_write, a, u in ((k, strength * k, strength * v), (strength * k, k, v)):
            o, end = delta_rule(q, k_write, a, u, gate, scale=1.0, output_final_state=True, backend=backend)
            torch.testing.assert_close(o, truth)
            torch.testing.assert_close(end, state)
        torch.testing.assert_close(gated_delta_rule(q, k, v, gate, beta, scale=1.0, backend=backend)[0], truth)


@BACKENDS
def test_it_has_kimi_delta_attention_as_a_case(backend):
    """S_t = (I - beta k k^T) diag(alpha) S + beta k v^T (arXiv 2510.26692, equation 1)."""
    q, k, v, beta, _ = tokens(70)
    g = -normal(B, 70, H, K, seed=5).abs()
    state, found = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(70):
        decayed = g[:, t].exp()[..., None] * state
        erase = torch.eye(K, dtype=torch.float64) - beta[:, t, :, None, None] * outer(k[:, t], k[:, t])
        state = erase @ decayed + beta[:, t, :, None, None] * outer(k[:, t], v[:, t])
        found.append((state.mT @ q[:, t, ..., None])[..., 0])
    strength = beta[..., None]
    o, _ = delta_rule(q, k, strength * k, strength * v, g, scale=1.0, backend=backend)
    torch.testing.assert_close(o, torch.stack(found, 1))


@BACKENDS
def test_it_has_gated_linear_attention_as_a_case(backend):
    """S_t = (alpha 1^T) * S + k v^T (arXiv 2312.06635, equation 3)."""
    q, k, v, _, _ = tokens(70)
    g = -normal(B, 70, H, K, seed=5).abs()
    state, found = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(70):
        state = outer(g[:, t].exp(), torch.ones(V, dtype=torch.float64)) * state + outer(k[:, t], v[:, t])
        found.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    torch.testing.assert_close(delta_rule(q, k, None, v, g, scale=1.0, backend=backend)[0], torch.stack(found, 1))


@BACKENDS
def test_it_has_rwkv_7_as_a_case_of_two_writes(backend):
    """S_t = S (diag(w) - kappa^T (eta * kappa)) + v^T k with S [V, K] (arXiv 2503.14456, equation 17): the first write
    takes what the memory held under kappa before it decayed, so it reads with kappa / w; the second writes v."""
    r, kappa, v, _, _ = tokens(40)
    k, eta = normal(B, 40, H, K, seed=5), normal(B, 40, H, K, seed=6).sigmoid()
    g = -0.6065 * normal(B, 40, H, K, seed=7).sigmoid()
    state, found = torch.zeros(B, H, V, K, dtype=torch.float64), []
    for t in range(40):
        transition = torch.diag_embed(g[:, t].exp()) - outer(kappa[:, t], (eta * kappa)[:, t])
        state = state @ transition + outer(v[:, t], k[:, t])
        found.append((state @ r[:, t, ..., None])[..., 0])
    keys = torch.stack([eta * kappa, k], 2)
    reads = torch.stack([kappa * (-g).exp(), torch.zeros_like(k)], 2)
    values = torch.stack([torch.zeros_like(v), v], 2)
    o, end = delta_rule(r, keys, reads, values, g, scale=1.0, output_final_state=True, backend=backend)
    torch.testing.assert_close(o, torch.stack(found, 1))
    torch.testing.assert_close(end, state.mT)


@BACKENDS
@pytest.mark.parametrize("writes", [2, 3])
def test_it_has_deltaproduct_as_a_case_of_several_writes(backend, writes):
    """A product of generalised Householder matrices per token, gated once (arXiv 2502.10297, section 4)."""
    q, _, _, _, g = tokens(40)
    k = F.normalize(normal(B, 40, writes, H, K, seed=5), dim=-1)
    v, beta = normal(B, 40, writes, H, V, seed=6), 2 * normal(B, 40, writes, H, seed=7).sigmoid()
    state, found = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(40):
        transition = g[:, t, :, None, None].exp() * torch.eye(K, dtype=torch.float64)
        written = torch.zeros_like(state)
        for j in range(writes):
            strength, key = beta[:, t, j, :, None, None], k[:, t, j]
            householder = torch.eye(K, dtype=torch.float64) - strength * outer(key, key)
            transition, written = householder @ transition, householder @ written + strength * outer(key, v[:, t, j])
        state = transition @ state + written
        found.append((state.mT @ q[:, t, ..., None])[..., 0])
    strength = beta[..., None]
    o, _ = delta_rule(q, k, strength * k, strength * v, g, scale=1.0, backend=backend)
    torch.testing.assert_close(o, torch.stack(found, 1))


@BACKENDS
def test_it_has_the_state_space_dual_form_as_a_case(backend):
    """Keys are B, queries C, values dt x; groups of heads share keys and queries."""
    C, Bs = normal(B, 70, 1, K, seed=1), normal(B, 70, 1, K, seed=2)
    x, dt = normal(B, 70, H, V, seed=3), normal(B, 70, H, seed=4).sigmoid()
    A = -normal(H, seed=5).abs()
    y, states = ssd(x, dt, A, Bs, C, return_final_states=True, backend="reference")
    o, end = delta_rule(C, Bs, None, dt[..., None] * x, dt * A, scale=1.0, output_final_state=True, backend=backend)
    torch.testing.assert_close(o, y)
    torch.testing.assert_close(end, states.mT)


@gates
@pytest.mark.parametrize("writes", [None, 2])
def test_no_later_gate_or_token_reaches_an_output_by_a_single_bit(gate, writes):
    before = {name: x if x is None else x.float() for name, x in problem(100, gate, writes=writes).items()}
    o, _ = delta_rule(**before, backend="torch")
    for s in (0, 14, 15, 16, 40, 63, 64):
        later = {name: x if x is None else x.clone() for name, x in before.items()}
        for name in ("q", "k", "a", "u", "g"):
            if later[name] is not None:
                later[name][:, s + 1 :] *= 0.3
        if later["g"] is not None:
            later["g"][:, s + 2] = -torch.inf
        assert torch.equal(delta_rule(**later, backend="torch")[0][:, : s + 1], o[:, : s + 1])


@BACKENDS
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_reset_begins_a_new_sequence(backend, per_channel):
    inputs = problem(90, GATES["per channel" if per_channel else "per head"])
    inputs["initial_state"] = 1e30 * inputs["initial_state"]
    inputs["g"][:, 40] = -torch.inf
    single = {name: x.float() for name, x in inputs.items()}
    o, end = delta_rule(**single, output_final_state=True, backend=backend)
    alone = FAST_WEIGHTS.part(single, slice(40, None), torch.zeros_like(single["initial_state"]))
    o_alone, end_alone = delta_rule(**alone, output_final_state=True, backend=backend)
    torch.testing.assert_close(o[:, 40:], o_alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, end_alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reset", [-torch.inf, -1e30, torch.finfo(torch.float32).min])
@BACKENDS
def test_the_gated_delta_rule_forgets_at_a_reset_and_its_gradients_are_numbers(backend, reset):
    q, k, v, beta, g = (x.float() for x in tokens(90))
    g[:, 40], g[:, 41:50], g[:, 70:75] = reset, -1000, reset
    leaves = [x.requires_grad_() for x in (q, k, v, g, beta)]
    o, _ = gated_delta_rule(*leaves, backend=backend)
    alone, _ = gated_delta_rule(*(x[:, 40:70] for x in leaves), backend="reference")
    torch.testing.assert_close(o[:, 40:70], alone, rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), leaves))


def test_positive_gates_are_right_in_every_backend():
    q, k, v, beta, g = tokens(90)
    found = [gated_delta_rule(q, k, v, -0.05 * g, beta, backend=backend)[0] for backend in ("reference", "torch")]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rule", ["delta_rule", "gated_delta_rule"])
@pytest.mark.parametrize("T", [1, 5])
def test_autocast_changes_no_decoded_token(rule, T):
    q, k, v, beta, g = (x.float() for x in tokens(T))
    call = {
        "delta_rule": lambda: delta_rule(q, k, k, v, g, backend="reference"),
        "gated_delta_rule": lambda: gated_delta_rule(q, k, v, g, beta, use_qk_l2norm=True, backend="reference"),
    }[rule]
    plain, _ = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call()[0], plain)


@pytest.mark.parametrize("rule", ["delta_rule", "gated_delta_rule"])
@pytest.mark.parametrize("form", ["eager", pytest.param("compiled", marks=pytest.mark.thorough)])
def test_transforms_are_right_or_refused_by_name(rule, form):
    q, k, v, beta, g = tokens(5)

    def loss(k, backend="auto"):
        if rule == "delta_rule":
            return delta_rule(q, k, beta[..., None] * k, v, g, backend=backend)[0].square().sum()
        return gated_delta_rule(q, k, v, g, beta, backend=backend)[0].square().sum()

    def tangent(k, **options):
        return torch.func.jvp(lambda k: loss(k, **options), (k,), (torch.ones_like(k),))[1]

    done = (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")) if form == "compiled" else (lambda f: f)
    (gradient,) = torch.autograd.grad(loss(leaf := k.clone().requires_grad_()), leaf)
    torch.testing.assert_close(done(lambda k: torch.func.grad(loss)(k))(k), gradient)
    torch.testing.assert_close(done(tangent)(k), gradient.sum())
    both = torch.stack([k, -k])
    torch.testing.assert_close(torch.vmap(loss)(both), torch.stack([loss(x) for x in both]))
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(k, torch.ones_like(k)))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, gradient.sum())
    words = f"backend 'torch' of {rule} knows no transforms.*choose auto or reference"
    for transform, x in ((tangent, k), (torch.func.grad(loss), k), (torch.vmap(loss), both)):
        with pytest.raises(ValueError, match=words):
            transform(x, backend="torch")
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        first.sum().backward()


@BACKENDS
@pytest.mark.parametrize(("batch", "T"), [(2, 0), (0, 5), (0, 0)])
def test_no_tokens_and_no_sequences_leave_the_state(backend, batch, T):
    q, u, g = torch.zeros(batch, T, 2, 8), torch.zeros(batch, T, 4, 16), torch.zeros(batch, T, 4)
    state = torch.ones(batch, 4, 8, 16)
    options = dict(initial_state=state, output_final_state=True, backend=backend)
    results = [delta_rule(q, q, q, u, g, **options), gated_delta_rule(q, q, u, g, g, **options)]
    results.append(delta_rule(q, q[:, :, None], None, u[:, :, None], None, **options))
    for o, end in results:
        assert o.shape == u.shape
        assert torch.equal(end, state)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(10, 2, 8)}, r"delta_rule takes q \[B, T, H, K\], not q \(10, 2, 8\)"),
        ({"u": torch.zeros(10, 4, 16)}, r"takes u \[B, T, HV, V\]"),
        ({"u": torch.zeros(2, 11, 4, 16)}, r"u is \(2, 11, 4, 16\), it must be \(2, 10, 4, 16\)"),
        ({"k": torch.zeros(2, 10, 1, 2, 8)}, r"k is \(2, 10, 1, 2, 8\), it must be \(2, 10\) with heads of 8"),
        ({"k": torch.zeros(2, 10, 2, 9)}, r"k is \(2, 10, 2, 9\)"),
        ({"a": torch.zeros(2, 10, 3, 8)}, "4 value heads are not a multiple of 3 heads of a"),
        ({"q": torch.zeros(2, 10, 0, 8)}, "4 value heads are not a multiple of 0 heads of q"),
        ({"g": torch.zeros(2, 10, 4, 16)}, r"g is .*, it must be \(2, 10, 4\) or, per key channel, \(2, 10, 4, 8\)"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, "initial_state is"),
        ({"g": torch.zeros(2, 10, 4, dtype=torch.long)}, "g is torch.int64: delta_rule takes floating-point tensors"),
        ({"g": torch.zeros(2, 10, 4)}, r"float64 for all tensors or for none, convert them; got .*g torch\.float32"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        delta_rule(**(problem(10) | change))


@pytest.mark.parametrize("T", [2, 8, 64, 192])
@pytest.mark.parametrize("gate", ["per head", "per channel"])
@pytest.mark.parametrize(("erases", "writes"), [(True, 1), (True, 2), (False, 1), (False, 3)])
def test_counted_flops_are_the_products_that_pytorch_counts_but_for_the_triangular_system(T, gate, erases, writes):
    """The system is counted as a substitution takes it, and run as an inverse and a full product."""
    inputs = problem(T, GATES[gate], erases, writes=writes)
    inputs = {name: x if x is None else x.to("meta") for name, x in inputs.items()}
    with FlopCounterMode(display=False) as counted:
        delta_rule(**inputs, backend="torch")
    q, k, a, u, g, state = inputs.values()
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, **options: 2 * a.numel() * b[-1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as ran:
        chunked.chunked_forward(q, k, a, u, g if g.dim() == 4 else g[..., None], state, 0.3)
    C = chunked.chunk_for(T, writes)
    heads = 2 * 4 * -(-T // C)
    expected = ran.get_total_flops()
    if erases:
        with FlopCounterMode(display=False) as inverse:
            unit_triangular_inverse(torch.empty(heads, C * writes, C * writes, device="meta"))
        expected -= inverse.get_total_flops() + heads * (C * writes) ** 2 * 16
    assert counted.get_total_flops() == expected
    sizes = dict(writes=writes, erases=erases, per_channel=gate == "per channel")
    assert counted.get_total_flops() == 2 * delta_rule_flops(T, 4, 8, 16, **sizes)


@pytest.mark.parametrize(("erases", "writes"), [(True, 1), (True, 2), (False, 1)])
def test_a_step_is_counted_as_pytorch_counts_it(erases, writes):
    inputs = problem(1, erases=erases, writes=writes)
    with FlopCounterMode(display=False) as counter:
        delta_rule(**{name: x if x is None else x.to("meta") for name, x in inputs.items()})
    assert counter.get_total_flops() == 2 * delta_rule_flops(1, 4, 8, 16, writes=writes, erases=erases)


def test_memory_grows_with_the_tokens_and_not_with_their_square():
    kept = []
    for T in (512, 1024):
        inputs = {name: x.float().requires_grad_() for name, x in problem(T, batch=1).items()}
        kept.append(0)

        def count(x):
            kept[-1] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            delta_rule(**inputs)
    assert kept[1] < 2.01 * kept[0]


@pytest.mark.thorough
@pytest.mark.parametrize(("gate", "erases", "writes"), [("per head", True, 1), ("per channel", False, 2)])
def test_the_operator_passes_pytorchs_own_checks(gate, erases, writes):
    inputs = problem(9, GATES[gate], erases, batch=1, writes=writes)
    q, k, a, u, g, state = (x if x is None else x.float().requires_grad_() for x in inputs.values())
    g = g.detach().view(1, 9, 4, -1).requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(chunked.forward, (q, k, a, u, g, state, 0.3), test_utils=checks)
