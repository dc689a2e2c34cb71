"""Sparse attention: the indexer scores and picks as defined, its loss is the KL divergence, and trains it alone."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from archs.mixers.attention import Attention
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.sparse_attention import Indexer, SparseAttention
from archs.positions import Alibi, Rotary
from archs.visibility import BIDIRECTIONAL, CAUSAL
from kernels.indexer.fp8 import rounded

WIDTH, T, TOP_K = 32, 50, 7
PLACES = torch.arange(T)
BASES = {
    "grouped": partial(Attention, head_dim=8, queries_per_kv=2, position=Rotary(), qk_norm="head"),
    "latent": partial(LatentAttention, head_dim=8, kv_rank=12, q_rank=20, position=Rotary(layout="interleaved")),
}
INDEX = dict(index_heads=3, index_dim=8, index_position=Rotary(fraction=0.5), top_k=TOP_K)
bases = pytest.mark.parametrize("base", BASES)
visibilities = pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL])


def build(base, **changes):
    torch.manual_seed(0)
    mixer = SparseAttention(WIDTH, attention=BASES[base], **INDEX | changes).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return mixer


def is_latent(mixer):
    return isinstance(mixer.attention, LatentAttention)


def inputs(B=2):
    return torch.randn(B, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def visible(t, visibility):
    return range(t + 1) if visibility is CAUSAL else range(T)


def attention_weights(mixer, x_TD, queries, keys):
    """Softmax weights of every head [heads, len(keys)] of each query t over the tokens keys[t], by definition."""
    base, x_BTD = mixer.attention, x_TD[None]
    if is_latent(mixer):
        q, latent = base.project(x_BTD, base.query_input(x_BTD), PLACES)
        q, k, _ = base.heads_of(q, latent, absorbed=False)
    else:
        q, k, _ = base.project(x_BTD, PLACES)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return [
        torch.einsum("hd,shd->hs", q[0, t], k[0, keys[t]]).mul(base.scale).softmax(-1) if len(keys[t]) else None
        for t in queries
    ]


def index_scores(mixer, x_TD, visibility):
    """Scores of each query over all that it sees, pair by pair: lists of floats."""
    indexer, x_BTD = mixer.indexer, x_TD[None]
    source = mixer.attention.query_input(x_BTD) if is_latent(mixer) else x_BTD
    q = indexer.position(indexer.query(source).view(1, T, indexer.heads, indexer.dim), PLACES)[0]
    k = indexer.position(indexer.key_norm(indexer.key(x_BTD))[:, :, None], PLACES)[0, :, 0]
    if mixer.index_precision == "fp8":
        q, k = rounded(q), rounded(k)
    w = indexer.weights(x_BTD)[0] / math.sqrt(indexer.heads * indexer.dim)
    return [
        torch.stack(
            [sum(w[t, j] * (q[t, j] @ k[s]).relu() for j in range(indexer.heads)) for s in visible(t, visibility)]
        )
        for t in range(T)
    ]


def chosen(scores, top_k):
    """The top_k highest, of equal ones the latest, in order of place."""
    order = sorted(range(len(scores)), key=lambda s: (scores[s].item(), s), reverse=True)
    return sorted(order[:top_k])


@pytest.mark.thorough
@bases
@visibilities
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_output_is_attention_over_the_tokens_of_highest_score(base, visibility, precision):
    mixer, x = build(base, index_precision=precision), inputs(1)
    scores = index_scores(mixer, x[0], visibility)
    keys = [chosen(s, TOP_K) for s in scores]
    assert any(s.max() > 0 for s in scores) and any(s.min() < 0 for s in scores)  # signed weights
    masked = x.new_full((1, T, T), -torch.inf)
    for t in range(T):
        masked[0, t, keys[t]] = 0.0
    full = build(base, top_k=T)
    weights = attention_weights(full, x[0], range(T), keys)
    v = _values(full, x)
    heads = torch.stack(
        [
            torch.einsum("hs,shd->hd", w, v[keys[t]].repeat_interleave(w.shape[0] // v.shape[1], dim=1))
            for t, w in enumerate(weights)
        ]
    )
    expected = full.attention.output(heads[None], *([False] if is_latent(mixer) else [x]))
    torch.testing.assert_close(mixer(x, visibility)[0], expected, rtol=1e-9, atol=1e-9)


def _values(mixer, x_BTD):
    base = mixer.attention
    if is_latent(mixer):
        return base.heads_of(*base.project(x_BTD, base.query_input(x_BTD), PLACES), absorbed=False)[2][0]
    return base.project(x_BTD, PLACES)[2][0]


@bases
@visibilities
def test_with_room_for_all_it_is_the_attention_that_it_is_built_on(base, visibility):
    mixer, x = build(base, top_k=T), inputs()
    torch.testing.assert_close(mixer(x, visibility)[0], mixer.attention(x, visibility)[0], rtol=1e-9, atol=1e-9)
    assert (build(base)(x, visibility)[0] - mixer(x, visibility)[0]).abs().max() > 1e-2


@pytest.mark.thorough
@bases
@visibilities
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_indexers_loss_is_the_divergence_from_the_mean_of_the_heads(base, visibility, stage):
    mixer, x = build(base, stage=stage, loss_weight=0.5), inputs(1)
    mixer(x, visibility)
    got = mixer.auxiliary_losses()["indexer_kl"]
    parameters = list(mixer.indexer.parameters())
    gradients = torch.autograd.grad(got, parameters)

    scores = index_scores(mixer, x[0], visibility)
    keys = [chosen(s, TOP_K) if stage == "sparse" else list(range(len(s))) for s in scores]
    weights = attention_weights(mixer, x[0], range(T), keys)
    divergence = 0.0
    for t in range(T):
        p, log_q = weights[t].mean(0).detach(), scores[t][keys[t]].log_softmax(-1)
        divergence = divergence + (p * (p.log() - log_q)).sum()
    expected = 0.5 * divergence / T
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, parameters), rtol=1e-8, atol=1e-10)


@bases
@visibilities
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_in_packed_documents_output_and_loss_are_those_of_each_alone(base, visibility, stage):
    mixer, x, bounds = build(base, stage=stage), inputs(), [[0, 3, 20, T], [0, 31, T]]
    starts = torch.zeros(2, T, dtype=torch.bool)
    for row, begins in enumerate(bounds):
        starts[row, begins[:-1]] = True
    packed, _ = mixer(x, visibility.packed(starts))
    got, total = mixer.auxiliary_losses()["indexer_kl"], 0.0
    for row, begins in enumerate(bounds):
        for begin, end in pairwise(begins):
            alone, _ = mixer(x[row : row + 1, begin:end], visibility)
            torch.testing.assert_close(packed[row : row + 1, begin:end], alone, rtol=1e-9, atol=1e-9)
            total = total + mixer.auxiliary_losses()["indexer_kl"] * (end - begin)
    torch.testing.assert_close(got, total / (2 * T), rtol=1e-9, atol=1e-12)


@bases
@pytest.mark.parametrize("stage", ["dense", "sparse"])
def test_the_objective_never_reaches_the_indexer_and_its_loss_nothing_else(base, stage):
    mixer, x = build(base, stage=stage), inputs().requires_grad_()
    y, _ = mixer(x, CAUSAL)
    y.square().sum().backward(retain_graph=True)
    assert all(p.grad is None for p in mixer.indexer.parameters())
    assert all(p.grad.abs().sum() > 0 for p in mixer.attention.parameters())
    mixer.zero_grad()
    x.grad = None
    mixer.auxiliary_losses()["indexer_kl"].backward()
    assert all(p.grad.abs().sum() > 0 for p in mixer.indexer.parameters())
    assert all(p.grad is None for p in mixer.attention.parameters()) and x.grad is None


def test_outside_training_there_is_no_loss():
    mixer = build("grouped")
    mixer(inputs(), CAUSAL)
    assert mixer.auxiliary_losses()["indexer_kl"] > 0
    mixer.eval()(inputs(), CAUSAL)
    assert mixer.auxiliary_losses() == {}


def test_the_sign_of_a_heads_weight_counts():
    """A softmax over the heads' weights, or their absolute values, would rank another way."""
    torch.manual_seed(0)
    indexer = Indexer(4, 4, heads=2, dim=2, position=Rotary(fraction=1.0))
    x = torch.randn(1, 6, 4)
    place = torch.arange(6)
    q, weights = indexer.queries(x, x, place)
    with torch.no_grad():
        indexer.weights.weight.neg_()
    torch.testing.assert_close(indexer.queries(x, x, place), (q, -weights))
    assert weights.min() < 0 < weights.max()


@bases
def test_a_decode_step_reads_no_more_than_it_picked(base):
    mixer, x = build(base).eval(), inputs(1)
    _, state = mixer(x[:, :-1], CAUSAL, mixer.empty_state(1))
    scores = index_scores(mixer, x[0], CAUSAL)[-1]
    unpicked = [s for s in range(T - 1) if s not in chosen(scores, TOP_K)]
    cache = state.attention
    cache.k[:, unpicked], cache.v[:, unpicked] = torch.nan, torch.nan
    assert not mixer(x[:, -1:], CAUSAL, state)[0].isnan().any()


@bases
def test_a_cache_keeps_the_indexers_keys_in_fp8_and_decoding_picks_by_them_as_reading_at_once(base):
    mixer, x = build(base, index_precision="fp8").eval(), inputs()
    expected, state = mixer(x, CAUSAL)[0], mixer.empty_state(2)
    found = []
    for part in (x[:, :20], *x[:, 20:].split(1, dim=1)):
        y, state = mixer(part, CAUSAL, state)
        found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)
    assert state.index.k.dtype == torch.float8_e4m3fn and state.index.v.dtype == torch.float32
    assert state.index.nbytes == 2 * T * (INDEX["index_dim"] + 4)
    again = mixer(x[:, :1].repeat_interleave(3, dim=0), CAUSAL, state.repeat(3))[0]
    torch.testing.assert_close(again[::3], mixer(x[:, :1], CAUSAL, state)[0])


def test_from_a_cache_there_is_no_loss_of_the_indexer():
    mixer, x = build("grouped", index_precision="fp8"), inputs()
    _, state = mixer(x[:, :-1], CAUSAL, mixer.empty_state(2))
    mixer(x[:, -1:], CAUSAL, state)
    assert mixer.auxiliary_losses() == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"stage": "warm"}, "stage='warm' must be 'dense' or 'sparse'"),
        ({"index_precision": "fp16"}, "index_precision='fp16' must be 'fp8', or null"),
        ({"attention": partial(BASES["grouped"], window=5)}, "leave out window, sinks and Alibi"),
        ({"attention": partial(BASES["grouped"], position=Alibi())}, "leave out window, sinks and Alibi"),
    ],
)
def test_what_cannot_be_indexed_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        SparseAttention(WIDTH, **dict(attention=BASES["grouped"]) | INDEX | changes)
