"""Attention by every path against its definition: gradients too, odd lengths, and what each path is taken for."""

import logging
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from archs.visibility import BIDIRECTIONAL, CAUSAL, Kind, Visibility, block_causal
from kernels import attention, attention_flops, largest_scores
from kernels.common import dispatch
from kernels.softmax_attention.pairs import Pairs, blocks_of
from kernels.softmax_attention.problems import random_problem
from tests.kernels.cases import assert_equal, assert_within_twice

thorough = pytest.mark.thorough
PATHS = ["rows", "sdpa", "flex"]
EXTENTS = [(True, None), (False, None), (True, 9), (False, 9), (True, 150)]


def problem(T, S=None, *, heads=4, kv_heads=2, dim=8, batch=2, **sizes):
    generator = torch.Generator().manual_seed(0)
    sizes = {"value_dim": 5} | sizes
    return random_problem(
        T, keys=S, batch=batch, heads=heads, kv_heads=kv_heads, head_dim=dim, generator=generator, **sizes
    )


def run(inputs, backend, dtype=torch.float64, **options):
    """Output and gradients of a random projection of it; FlexAttention has none on a CPU."""
    differentiates = backend != "flex"
    leaves = {name: x.to(dtype).requires_grad_(differentiates) for name, x in inputs.items()}
    o = attention(**leaves, **options, backend=backend)
    if not differentiates:
        return {"o": o}
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(o, leaves.values(), weight)
    return {"o": o} | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def assert_is_the_definition(inputs, backend, **options):
    truth = run(inputs, "reference", **options)
    got = run(inputs, backend, **options)
    assert_equal(got, {name: truth[name] for name in got})


def packed(visibility, B, L, seed=0):
    starts = torch.rand(B, L, generator=torch.Generator().manual_seed(seed)) < 4 / L
    return visibility.packed(starts)


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize(
    ("T", "S"), [(1, 1), (1, 60), (7, 7), (70, 70), pytest.param(300, 300, marks=thorough), (130, 200)]
)
@pytest.mark.parametrize(("causal", "window"), EXTENTS)
@pytest.mark.parametrize("options", ["plain", "sinks", "slopes", "both"])
def test_every_path_is_the_softmax_over_the_keys_that_are_seen(backend, T, S, causal, window, options):
    inputs, slopes = problem(T, S), None
    if options in ("sinks", "both"):
        inputs["sinks"] = torch.linspace(-1, 2, 4, dtype=torch.float64)
    if options in ("slopes", "both"):
        slopes = torch.linspace(0.1, 1, 4, dtype=torch.float64)
    assert_is_the_definition(inputs, backend, causal=causal, window=window, slopes=slopes, scale=0.3)


VISIBILITIES = {
    "packed": CAUSAL,
    "packed, window": CAUSAL,
    "packed, both directions": BIDIRECTIONAL,
    "two copies": block_causal(16),
    "two copies, packed": block_causal(7),
}


@pytest.mark.parametrize("backend", PATHS)
@pytest.mark.parametrize("name", VISIBILITIES)
@pytest.mark.parametrize("L", [20, 100, pytest.param(333, marks=thorough)])
@pytest.mark.parametrize("sinks", [False, True])
def test_runs_say_documents_windows_and_the_two_copies_of_block_diffusion(backend, name, L, sinks):
    visibility = VISIBILITIES[name]
    visibility = packed(visibility, 2, L) if "packed" in name else visibility
    T, window = L * visibility.copies, 11 if "window" in name else None
    runs = visibility.runs(T, window)
    seen = visibility.visible(T, T, window)
    dense = Pairs(T, T, False, None, *runs).dense(torch.device("cpu"))
    assert torch.equal(dense, (seen[:, 0] if seen.dim() == 4 else seen[None]))
    inputs = problem(T) | ({"sinks": torch.linspace(-1, 2, 4, dtype=torch.float64)} if sinks else {})
    assert_is_the_definition(inputs, backend, runs=runs)


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("window", [None, 5])
def test_blocks_read_what_one_of_their_queries_sees_and_hide_what_another_does_not(kind, window):
    visibility = packed(Visibility(kind, 6 if kind is Kind.BLOCK_CAUSAL else 0), 2, 90)
    window, T = None if kind is Kind.BLOCK_CAUSAL else window, 90 * visibility.copies
    pairs = Pairs(T, T, False, None, *visibility.runs(T, window))
    seen = pairs.dense(torch.device("cpu"))
    for b, plan in enumerate(blocks_of(pairs, 32)):
        assert [(block.begin, block.end) for block in plan] == [(t, min(t + 32, T)) for t in range(0, T, 32)]
        for block in plan:
            rows, read = seen[b, block.begin : block.end], torch.zeros(T, dtype=torch.bool)
            for _, stretch in block.stretches:
                read[stretch.begin : stretch.end] = True
                assert rows[:, stretch.full : stretch.ragged].all()
            assert torch.equal(rows.any(0) & ~read, torch.zeros(T, dtype=torch.bool))


def rounded(inputs, dtype):
    return {name: x.to(dtype).double() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [65, pytest.param(500, marks=thorough)])
@pytest.mark.parametrize("name", ["causal", "window", "sinks", "two copies", "large scores"])
def test_rows_err_no_more_than_twice_as_much_as_the_definition_and_pytorchs_attention(dtype, T, name):
    T += T % 2
    inputs = problem(T, dim=32, value_dim=32)
    options = {"causal": True}
    if name == "window":
        options["window"] = 40
    if name == "sinks":
        inputs["sinks"] = torch.linspace(-1, 2, 4, dtype=torch.float64)
    if name == "two copies":
        options = {"runs": block_causal(8).runs(T)}
    if name == "large scores":
        inputs["q"] = inputs["q"] * 20
    inputs = rounded(inputs, dtype)
    truth = run(inputs, "reference", **options)
    plain = [run(inputs, backend, dtype, **options) for backend in ("reference", "sdpa")]
    assert_within_twice(run(inputs, "rows", dtype, **options), plain, truth)


def test_probabilities_that_are_kept_or_computed_again_give_the_same_gradients(monkeypatch):
    inputs = problem(140)
    kept = run(inputs, "rows", causal=True)
    monkeypatch.setattr("kernels.softmax_attention.KEPT_BYTES", 0)
    assert_equal(run(inputs, "rows", causal=True), kept)


def test_a_later_key_changes_nothing_bit_for_bit():
    inputs = {name: x.bfloat16() for name, x in problem(200).items()}
    later = {name: x.clone() for name, x in inputs.items()}
    later["k"][:, 150:] *= 100
    later["v"][:, 150:] *= 100
    one, two = (attention(**x, causal=True, backend="rows") for x in (inputs, later))
    assert torch.equal(one[:, :150], two[:, :150])


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation gives."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.most = max([self.most, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
        return out


@pytest.mark.parametrize("name", ["window", "sinks", "two copies", "packed"])
def test_no_table_of_pairs_is_made(name):
    T = 2048
    inputs = {name: x.float().requires_grad_() for name, x in problem(T, batch=1, heads=1, kv_heads=1).items()}
    options = {
        "window": {"causal": True, "window": 64},
        "sinks": {"causal": True, "sinks": torch.zeros(1)},
        "two copies": {"runs": block_causal(8).runs(T)},
        "packed": {"runs": packed(CAUSAL, 1, T).runs(T)},
    }[name]
    with Largest() as watch:
        attention(**inputs, **options).sum().backward()
    assert watch.most <= T * T // 8


def test_decoding_equals_prefill_under_autocast():
    inputs = {name: x.float() for name, x in problem(40, dim=16).items()}
    with torch.autocast("cpu", torch.bfloat16):
        whole = attention(**inputs, causal=True)
        last = [
            attention(inputs["q"][:, t : t + 1], *(inputs[n][:, : t + 1] for n in "kv"), causal=True) for t in range(40)
        ]
    assert whole.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(last, 1), whole, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("T", "dtype", "options", "gradients", "taken"),
    [
        (64, torch.float32, {"causal": True}, True, "sdpa"),
        (64, torch.float32, {}, True, "sdpa"),
        (64, torch.bfloat16, {"causal": True}, True, "rows"),
        (64, torch.bfloat16, {"causal": True}, False, "sdpa"),
        (1024, torch.bfloat16, {"causal": True}, True, "sdpa"),
        (64, torch.float32, {"causal": True, "window": 8}, True, "sdpa"),
        (1024, torch.float32, {"causal": True, "window": 8}, True, "rows"),
        (1024, torch.float32, {"causal": True, "sinks": torch.zeros(2)}, False, "rows"),
        (1024, torch.float32, {"runs": block_causal(8).runs(1024)}, True, "rows"),
        (1, torch.float32, {"causal": True, "sinks": torch.zeros(2)}, False, "sdpa"),
    ],
)
def test_it_says_which_path_it_took(caplog, monkeypatch, T, dtype, options, gradients, taken):
    monkeypatch.setattr(dispatch, "said", set())
    q, k, v = (torch.zeros(1, T, 2, 4, dtype=dtype, requires_grad=gradients) for _ in range(3))
    with caplog.at_level(logging.INFO, "kernels"):
        attention(q, k, v, **options)
    assert f"attention runs on backend '{taken}'" in caplog.text


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_transforms_of_torch_func_are_right(backend):
    inputs = problem(20)
    plain = partial(attention, k=inputs["k"], v=inputs["v"], causal=True, window=7, backend="reference")
    mixed = partial(attention, k=inputs["k"], v=inputs["v"], causal=True, window=7, backend=backend)
    q, tangent = inputs["q"], torch.cos(inputs["q"])
    _, got = torch.func.jvp(mixed, (q,), (tangent,))
    torch.testing.assert_close(got, torch.autograd.functional.jvp(plain, q, tangent)[1])
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(
        torch.func.grad(lambda x: mixed(x).sum())(q), torch.autograd.grad(plain(leaf).sum(), leaf)[0]
    )
    torch.testing.assert_close(torch.func.vmap(mixed)(q[None])[0], plain(q))


@pytest.mark.parametrize("backend", PATHS)
def test_paths_refuse_what_they_cannot_see_through(backend):
    inputs = problem(20)
    with (
        pytest.raises(ValueError, match=f"backend '{backend}' of attention has no torch.func"),
        forward_ad.dual_level(),
    ):
        attention(forward_ad.make_dual(inputs["q"], inputs["q"]), inputs["k"], inputs["v"], backend=backend)


@pytest.mark.parametrize(("T", "batch"), [(0, 2), (3, 0)])
def test_no_tokens_give_no_output_and_gradients_of_zero(T, batch):
    inputs = {name: x.requires_grad_() for name, x in problem(T, max(T, 2), batch=batch).items()}
    o = attention(**inputs, causal=True)
    assert o.shape == (batch, T, 4, 5)
    o.sum().backward()
    assert all(not x.grad.any() for x in inputs.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 5, 8)}, "q of attention must be .B, T, H, D.; it has 3 dimensions"),
        ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.int64)}, "q of attention is torch.int64, it must be float32"),
        ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.bfloat16)}, "are torch.bfloat16, torch.float32 and torch.float32"),
        ({"q": torch.zeros(2, 5, 3, 8)}, "H a multiple of G"),
        ({"q": torch.zeros(2, 6, 4, 8)}, "T at most S"),
        ({"window": 0}, "window=0 of attention must be at least 1 token, or None"),
        ({"scale": 0.0}, "scale=0.0 of attention must be above 0, or None"),
        ({"sinks": torch.zeros(2)}, r"sinks is \(2,\), it must be \(4,\)"),
        ({"causal": True, "runs": (torch.zeros(1, 1, 5), torch.ones(1, 1, 5))}, "leave out causal and window"),
        ({"runs": (torch.zeros(1, 3, 5), torch.ones(1, 3, 5))}, r"begins and ends \[R, 2 or 1, 5\]; got \[1, 3, 5\]"),
        ({"backend": "cuda"}, "unknown backend 'cuda' for attention: choose from auto, reference, sdpa, flex, rows"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    inputs = {name: x.float() for name, x in problem(5).items()}
    with pytest.raises(ValueError, match=words):
        attention(**inputs | change)


def test_flops_are_those_that_pytorch_counts_of_its_own_attention():
    inputs = {name: x.requires_grad_() for name, x in problem(40).items()}
    with FlopCounterMode(display=False) as counter:
        o = attention(**inputs, causal=True, backend="rows")
    assert counter.get_total_flops() == 2 * attention_flops(40 * 40, 4, 8, 5)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == 4 * attention_flops(40 * 40, 4, 8, 5)


@thorough
@pytest.mark.parametrize("name", ["causal", "sinks", "packed"])
def test_the_operator_passes_pytorchs_own_checks_and_is_compiled_without_a_break(name):
    q, k, v = (torch.randn(2, 70, 2, 8, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(2, requires_grad=True) if name == "sinks" else None
    runs = packed(CAUSAL, 2, 70).runs(70) if name == "packed" else (None, None)
    from kernels.softmax_attention.block_rows import forward

    arguments = (q, k, v, *runs, sinks, None, None, 0.3, name != "packed", 0, name == "causal")
    torch.library.opcheck(forward, arguments)
    options = {"runs": runs} if name == "packed" else {"causal": True, "sinks": sinks}
    compiled = torch.compile(partial(attention, **options, backend="rows"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, **options, backend="rows"))


@pytest.mark.parametrize(("T", "S"), [(1, 1), (70, 70), (300, 300), (130, 200)])
@pytest.mark.parametrize(("causal", "window"), EXTENTS)
def test_the_largest_scores_are_those_of_the_pairs_that_are_seen(T, S, causal, window):
    inputs = problem(T, S)
    q, k = inputs["q"], inputs["k"].repeat_interleave(2, dim=2)
    seen_TS = Pairs(T, S, causal, window).dense(torch.device("cpu"))[0]
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q, k) * 0.3
    got = largest_scores(inputs["q"], inputs["k"], causal=causal, window=window, scale=0.3)
    torch.testing.assert_close(got, scores_BHTS.masked_fill(~seen_TS, -torch.inf).amax((0, 2, 3)).float())


@pytest.mark.parametrize("kind", [Kind.CAUSAL, Kind.BIDIRECTIONAL, Kind.BLOCK_CAUSAL])
def test_the_largest_scores_of_packed_documents_are_within_them(kind):
    L = 150
    inputs, visibility = problem(2 * L if kind is Kind.BLOCK_CAUSAL else L), packed(Visibility(kind, 4), 2, L)
    q, k = inputs["q"], inputs["k"].repeat_interleave(2, dim=2)
    runs = visibility.runs(q.shape[1])
    seen = visibility.visible(q.shape[1], q.shape[1])
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q, k)
    got = largest_scores(inputs["q"], inputs["k"], runs=runs, scale=1.0)
    torch.testing.assert_close(got, scores_BHTS.masked_fill(~seen, -torch.inf).amax((0, 2, 3)).float())


def test_the_largest_scores_hold_no_table_of_pairs():
    inputs, sizes = problem(1000), []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    with Note():
        largest_scores(inputs["q"], inputs["k"], causal=True, scale=1.0)
    assert max(sizes) <= 2 * 4 * 128 * 1000  # of the scores of a block of queries, in all heads
