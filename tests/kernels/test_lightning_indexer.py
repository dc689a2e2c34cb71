"""The lightning indexer picks the visible keys of highest score, of equal ones the latest, on every backend."""

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import lightning_indexer, lightning_indexer_flops
from kernels.common.trial import TOLERANCE, error_against_reference
from kernels.indexer import OPERATION, blocks
from kernels.indexer.reference import index_scores

slow_in_the_interpreter = pytest.mark.thorough
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
SHAPES = [(1, 1, True), (5, 5, True), (37, 60, True), (37, 60, False), (1, 90, True), (60, 37, False)]
shapes = pytest.mark.parametrize(("T", "S", "causal"), SHAPES)
backends = pytest.mark.parametrize("backend", ["reference", "torch"])


def problem(T, *, batch=2, heads=3, head_dim=8, keys=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return OPERATION.random_problem(T, batch=batch, heads=heads, head_dim=head_dim, keys=keys, generator=generator)


def with_ties(T, **sizes):
    """Small whole numbers: scores without rounding, and many that are equal."""
    return {name: (3 * x).round().clamp(-2, 2) for name, x in problem(T, **sizes).items()} | {
        "weights": problem(T, **sizes)["weights"].sign()
    }


def on(device, inputs, dtype=torch.float32):
    return {name: x.to(device, dtype) for name, x in inputs.items()}


def by_hand(inputs, topk, causal):
    """The picks, query by query from a sorted list."""
    scores = index_scores(**inputs)
    B, T, S = scores.shape
    picks = torch.full((B, T, topk), -1, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            seen = range(S - T + t + 1 if causal else S)
            best = sorted(seen, key=lambda s, b=b, t=t: (scores[b, t, s].item(), s), reverse=True)[:topk]
            picks[b, t, : len(best)] = torch.tensor(sorted(best), dtype=torch.int32)
    return picks


def assert_as_good(got, inputs, topk, **options):
    """Picks in the right form, the same as those of the reference in float64 but for keys whose scores differ by no
    more than rounding."""
    exact = {name: x.double().cpu() for name, x in inputs.items()}
    truth = lightning_indexer(**exact, topk=topk, **options, backend="reference")
    got = got.cpu()
    assert got.dtype == torch.int32 and got.shape == truth.shape
    assert torch.equal(got < 0, truth < 0)
    rising = torch.where(got < 0, torch.iinfo(torch.int32).max, got)
    assert ((rising.diff(dim=-1) > 0) | (got[..., 1:] < 0)).all()
    scores = index_scores(**exact)
    of = [scores.gather(2, x.long().clamp(min=0)).masked_fill(x < 0, 0.0).sort(-1).values for x in (got, truth)]
    torch.testing.assert_close(*of, rtol=0, atol=2e-6)


@shapes
@backends
@pytest.mark.parametrize("topk", [1, 7, 100])
@pytest.mark.parametrize("make", [problem, with_ties])
def test_the_visible_keys_of_highest_score_are_picked_and_of_equal_ones_the_latest(T, S, causal, backend, topk, make):
    inputs = make(T, keys=S)
    got = lightning_indexer(**inputs, topk=topk, causal=causal, backend=backend)
    assert got.dtype == torch.int32 and torch.equal(got, by_hand(inputs, topk, causal))


@slow_in_the_interpreter
@on_triton
@pytest.mark.parametrize(
    ("batch", "T", "S", "causal"), [(2, 1, 1, True), (1, 19, 33, True), (1, 9, 20, False), (2, 1, 90, True)]
)
@pytest.mark.parametrize("topk", [7, 100])
def test_triton_picks_the_same(batch, T, S, causal, topk, triton_device):
    for make in (problem, with_ties):
        inputs = on(triton_device, make(T, batch=batch, keys=S))
        got = lightning_indexer(**inputs, topk=topk, causal=causal, backend="triton")
        assert_as_good(got, inputs, topk, causal=causal)
    assert torch.equal(got.cpu(), by_hand({name: x.cpu() for name, x in inputs.items()}, topk, causal))


@on_triton
def test_triton_picks_the_same_of_a_few(triton_device):
    inputs = on(triton_device, with_ties(3, keys=9, batch=1))
    got = lightning_indexer(**inputs, topk=4, backend="triton")
    assert torch.equal(got.cpu(), lightning_indexer(**with_ties(3, keys=9, batch=1), topk=4, backend="reference"))


@slow_in_the_interpreter
@on_triton
@pytest.mark.parametrize(
    ("T", "keys", "sizes"),
    [
        (9, 2100, {"batch": 1}),  # more keys than are selected from at a time
        (3, 300, {"heads": 64, "head_dim": 128, "batch": 1}),
        (3, 140, {"heads": 17, "head_dim": 72, "batch": 1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_takes_long_rows_many_heads_and_half_precision(T, keys, sizes, dtype, triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    inputs = on(triton_device, problem(T, keys=keys, **sizes), dtype)
    assert_as_good(lightning_indexer(**inputs, topk=130, backend="triton"), inputs, 130)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_keys_of_a_cache_are_read_where_they_lie(backend, triton_device, poisoned):
    """Behind those of a sequence there is room for more, in which nothing stands."""
    inputs = on(triton_device if backend == "triton" else "cpu", with_ties(3, keys=40))
    k = inputs["k"]
    room = torch.full((len(k), 64, k.shape[2]), torch.nan, device=k.device)
    room[:, :40] = k
    found = lightning_indexer(**inputs | {"k": room[:, :40]}, topk=5, backend=backend)
    assert torch.equal(found, lightning_indexer(**inputs, topk=5, backend=backend))


@slow_in_the_interpreter
@on_triton
def test_triton_goes_through_several_blocks_of_queries(triton_device, monkeypatch):
    monkeypatch.setattr(blocks, "SCORES", 1)  # one tile of queries at a time, the last of them not whole
    inputs = on(triton_device, with_ties(35, batch=1))
    got = lightning_indexer(**inputs, topk=5, backend="triton")
    assert torch.equal(got.cpu(), lightning_indexer(**with_ties(35, batch=1), topk=5, backend="reference"))


@pytest.mark.parametrize("products", [1, 1000])
def test_the_size_of_a_block_changes_nothing(products, monkeypatch):
    inputs = with_ties(37, keys=60)
    whole = lightning_indexer(**inputs, topk=7)
    monkeypatch.setattr(blocks, "PRODUCTS", products)
    assert torch.equal(lightning_indexer(**inputs, topk=7), whole)


@backends
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_each_as_if_alone(backend, causal):
    assert_packed_is_alone(backend, causal, "cpu", torch.float64)


@slow_in_the_interpreter
@on_triton
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_each_as_if_alone_in_triton(causal, triton_device):
    assert_packed_is_alone("triton", causal, triton_device, torch.float32)


def assert_packed_is_alone(backend, causal, device, dtype):
    inputs, bounds = on(device, with_ties(41, batch=1), dtype), [0, 13, 14, 14, 30, 41]
    cu_seqlens = torch.tensor(bounds, device=device)
    packed = lightning_indexer(**inputs, topk=6, causal=causal, cu_seqlens=cu_seqlens, backend=backend)
    for begin, end in pairwise(bounds):
        part = {name: x[:, begin:end] for name, x in inputs.items()}
        alone = lightning_indexer(**part, topk=6, causal=causal, backend="reference")
        assert torch.equal(packed[:, begin:end], torch.where(alone < 0, -1, alone + begin))


@on_triton
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_zeros_of_either_sign_are_equal_and_nan_is_worth_least(backend, triton_device):
    """One head and one dimension: the scores are the weight times the keys."""
    device = triton_device if backend == "triton" else "cpu"
    keys = torch.tensor([3.0, -1.0, torch.nan, 2.0, torch.inf, -0.0, 1.0], device=device)
    for weight, topk, expected in ((1.0, 5, [0, 3, 4, 5, 6]), (-1.0, 3, [1, 5, 6]), (0.5, 7, list(range(7)))):
        inputs = {"q": torch.ones(1, 1, 1, 1), "k": keys[None, :, None], "weights": torch.full((1, 1, 1), weight)}
        got = lightning_indexer(**on(device, inputs), topk=topk, backend=backend)
        assert got[0, 0].tolist() == expected
    zeros = on(device, {"q": torch.ones(1, 4, 2, 3), "k": torch.ones(1, 9, 3), "weights": torch.zeros(1, 4, 2)})
    assert lightning_indexer(**zeros, topk=2, backend=backend)[0].tolist() == [[4, 5], [5, 6], [6, 7], [7, 8]]


@backends
def test_queries_at_the_end_pick_what_they_pick_in_the_whole(backend):
    inputs = with_ties(50)
    whole = lightning_indexer(**inputs, topk=7, backend=backend)
    for last in (1, 3, 20):
        part = {name: x if name == "k" else x[:, -last:] for name, x in inputs.items()}
        assert torch.equal(lightning_indexer(**part, topk=7, backend=backend), whole[:, -last:])


@backends
def test_what_comes_later_changes_no_pick(backend):
    inputs = problem(50)
    whole = lightning_indexer(**inputs, topk=7, backend=backend)
    later = {name: x.clone() for name, x in inputs.items()}
    for x in later.values():
        x[:, 30:] = torch.nan
    assert torch.equal(lightning_indexer(**later, topk=7, backend=backend)[:, :30], whole[:, :30])


class Largest(TorchDispatchMode):
    """Sees the most numbers that a tensor has."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return out


def test_no_more_of_the_scores_is_in_memory_than_a_block(monkeypatch):
    monkeypatch.setattr(blocks, "PRODUCTS", 1 << 14)
    T = 1000
    inputs = problem(T, batch=1, heads=2, head_dim=4)
    with Largest() as seen:
        blocks.lightning_indexer_blocks._init_fn(*inputs.values(), None, 5, True)
    assert T * 5 < seen.most <= T * 20 < T * T


@pytest.mark.parametrize(("B", "T", "S"), [(2, 0, 0), (2, 0, 5), (0, 3, 3), (1, 3, 0)])
def test_where_there_is_nothing_nothing_is_picked(B, T, S):
    q, k, weights = torch.zeros(B, T, 2, 4), torch.zeros(B, S, 4), torch.zeros(B, T, 2)
    got = lightning_indexer(q, k, weights, 3, causal=False)
    assert got.shape == (B, T, 3) and (got == -1).all()


def test_autocast_changes_nothing():
    inputs = on("cpu", problem(50))
    plain = lightning_indexer(**inputs, topk=7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lightning_indexer(**inputs, topk=7), plain)
        assert torch.equal(lightning_indexer(**inputs, topk=7, backend="reference"), plain)


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_the_visible_pairs(causal):
    inputs = problem(37, keys=60)
    with FlopCounterMode(display=False) as counter:
        lightning_indexer(**inputs, topk=7, causal=causal)
    with FlopCounterMode(display=False) as every_pair:
        lightning_indexer(**inputs, topk=7, causal=causal, backend="reference")
    assert counter.get_total_flops() == 2 * lightning_indexer_flops(37, 60, 3, 8, causal)
    unseen = 2 * 2 * 3 * 8 * (37 * 36 // 2) if causal else 0
    assert every_pair.get_total_flops() - unseen == counter.get_total_flops()


@on_triton
def test_flops_of_the_triton_operator_are_counted(triton_device):
    inputs = on(triton_device, problem(2, keys=9, batch=1))
    lightning_indexer(**inputs, topk=4, backend="triton")  # a counter knows the operators that were there before it
    with FlopCounterMode(display=False) as counter:
        lightning_indexer(**inputs, topk=4, backend="triton")
    assert counter.get_total_flops() == lightning_indexer_flops(2, 9, 3, 8)


@slow_in_the_interpreter
@on_triton
def test_a_trial_finds_triton_right_and_would_find_a_wrong_pick(triton_device, monkeypatch):
    inputs = problem(52, batch=1, heads=2, head_dim=4)

    def error():
        side = OPERATION.on_backend("triton")
        return error_against_reference(side, OPERATION, inputs, triton_device, torch.float32, gradients=True)

    assert error() < TOLERANCE[torch.float32]
    from kernels.indexer import triton_operators

    right = triton_operators.lightning_indexer
    monkeypatch.setattr(triton_operators, "lightning_indexer", lambda *args: right(*args) // 2)
    assert error() > TOLERANCE[torch.float32]


@slow_in_the_interpreter
def test_the_operators_pass_pytorchs_own_checks(triton_device):
    from kernels.indexer.triton_operators import lightning_indexer as in_triton
    from kernels.indexer.triton_operators import lightning_indexer_keys as keys_in_triton

    inputs, options = on(triton_device, problem(5)), {"test_utils": ("test_schema", "test_faketensor")}
    for operator in (in_triton, blocks.lightning_indexer_blocks):
        torch.library.opcheck(operator, (*inputs.values(), None, 3, True), **options)
    torch.library.opcheck(keys_in_triton, (inputs["k"],), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk": 0}, "topk=0 must be at least 1 key"),
        ({"k": torch.zeros(2, 5, 1, 8)}, r"k \[B, S, D\], one key per token for all heads; got"),
        ({"k": torch.zeros(2, 5, 7)}, r"k is \(2, 5, 7\), it must be \(2, 5, 8\)"),
        ({"weights": torch.zeros(2, 5, 2)}, r"weights is \(2, 5, 2\), it must be \(2, 5, 3\)"),
        ({"k": torch.zeros(2, 5, 8, dtype=torch.float64)}, "of one dtype"),
        ({"weights": torch.zeros(2, 5, 3, dtype=torch.int32)}, "all floating point"),
        ({"k": torch.zeros(2, 4, 8)}, "5 causal queries are the last of the keys, of which there are only 4"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "packed in a batch of 1, not of 2"),
        ({"cu_seqlens": torch.tensor([0, 5]), "k": torch.zeros(2, 6, 8)}, "as many keys as queries, not 6 and 5"),
        (
            {"backend": "fast"},
            "unknown backend 'fast' for lightning_indexer: choose from auto, reference, torch",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        lightning_indexer(**{"topk": 3} | on("cpu", problem(5)) | change)


@on_triton
@pytest.mark.parametrize(
    ("sizes", "dtype", "words"),
    [
        ({}, torch.float64, "take float32, bfloat16 and float16, not torch.float64"),
        ({"heads": 129}, torch.float32, "129 index heads of 8 dimensions: .* up to 128 heads of up to 256"),
        ({"head_dim": 257}, torch.float32, "3 index heads of 257 dimensions"),
    ],
)
def test_triton_refuses_what_it_cannot_take(sizes, dtype, words, triton_device):
    with pytest.raises(ValueError, match=words):
        lightning_indexer(**on(triton_device, problem(2, **sizes), dtype), topk=3, backend="triton")
