"""Softmax attention against its formula, pair by pair, with every option alone and together; and its count of FLOPs."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.mixers.attention import Attention
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.softmax import attend
from archs.positions import Alibi, Rotary
from archs.visibility import BIDIRECTIONAL, CAUSAL, Kind, Visibility


def written_out(q, k, v, seen, scale, alibi, sinks):
    """Attention of one sequence, one query of one head at a time."""
    T, H, _ = q.shape
    S, G = k.shape[:2]
    out = torch.zeros(T, H, v.shape[-1], dtype=q.dtype)
    for h in range(H):
        for t in range(T):
            keys = seen[t].nonzero()[:, 0]
            scores = scale * k[keys, h // (H // G)] @ q[t, h]
            if alibi is not None:
                scores = scores - 2.0 ** (-8 * (h + 1) / H) * (S - T + t - keys).abs()
            if sinks is not None:
                scores = torch.cat([scores, sinks[h : h + 1]])
            weights = scores.softmax(0)[: len(keys)]
            out[t, h] = weights @ v[keys, h // (H // G)]
    return out


@pytest.mark.thorough
@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from([Kind.CAUSAL, Kind.BIDIRECTIONAL]),
    S=st.integers(1, 23),
    T=st.integers(1, 23),
    window=st.integers(1, 30),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    options=st.sampled_from(["plain", "alibi", "sinks", "both"]),
    marks=st.none() | st.lists(st.booleans(), min_size=46, max_size=46),
)
def test_it_is_the_softmax_over_the_tokens_that_are_seen(kind, S, T, window, heads, options, marks):
    T = S if marks is not None or T > 15 else min(T, S)  # packed documents continue nothing
    window = None if window > 22 else window
    (H, G), E, B = heads, 5, 2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, length, n, E, generator=generator, dtype=torch.float64) for length, n in ((T, H), (S, G), (S, G))
    )
    alibi = Alibi() if options in ("alibi", "both") else None
    sinks = torch.linspace(-1, 1, H, dtype=torch.float64) if options in ("sinks", "both") else None
    visibility = Visibility(kind)
    if marks is not None:
        visibility = visibility.packed(torch.tensor(marks[: B * T]).view(B, T))
    got = attend(q, k, v, visibility, scale=0.4, window=window, alibi=alibi, sinks_H=sinks)
    seen = visibility.visible(T, S, window)
    for b in range(B):
        mine = torch.ones(T, S, dtype=torch.bool) if seen is None else seen if seen.dim() == 2 else seen[b, 0]
        torch.testing.assert_close(got[b], written_out(q[b], k[b], v[b], mine, 0.4, alibi, sinks))


MIXERS = {
    "grouped": partial(Attention, head_dim=8, queries_per_kv=2, position=Rotary()),
    "window": partial(Attention, head_dim=8, queries_per_kv=1, position=Rotary(), window=9),
    "window with sinks": partial(Attention, head_dim=8, queries_per_kv=1, position=None, window=9, sinks=True),
    "latent": partial(LatentAttention, head_dim=8, kv_rank=12, position=Rotary()),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("T", [5, 64, 192])
def test_counted_flops_are_those_that_pytorch_counts_but_for_pairs_that_are_not_seen(name, visibility, T):
    """All pairs are counted of what runs, and on the meta device they run."""
    with torch.device("meta"):
        mixer, x = MIXERS[name](32), torch.zeros(1, T, 32)
    with FlopCounterMode(display=False) as counter:
        mixer(x, visibility)
    window = None if name in ("grouped", "latent") else 9
    unseen = mixer.pair_flops * (T * T - visibility.pairs(T, window))
    assert mixer.flops(T, visibility) == counter.get_total_flops() - unseen


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window=0 must be at least 1 token, or null"),
        ({"qk_norm": "both"}, "qk_norm='both' must be 'head', 'all' or null"),
        ({"heads": 3, "queries_per_kv": 2}, "3 heads are not a multiple of queries_per_kv=2"),
    ],
)
def test_attention_that_cannot_be_built_says_why(options, words):
    with pytest.raises(ValueError, match=words):
        Attention(32, **{"head_dim": 8, "queries_per_kv": 1, "position": None} | options)


def test_a_rotation_depends_on_the_distance_alone_and_leaves_the_rest_of_a_head():
    rotary = Rotary(fraction=0.5, layout="interleaved")
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 9, 1, 8)
    rotated = rotary(x, torch.arange(9))
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    scores = (rotated[0, :, 0] @ rotated[0, :, 0].T)[:, :, None]
    for distance in range(9):
        diagonal = scores[..., 0].diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand(9 - distance), rtol=1e-6, atol=1e-6)


CACHED = {
    "grouped": partial(Attention, 32, head_dim=8, queries_per_kv=2, position=Rotary()),
    "windowed": partial(Attention, 32, head_dim=8, queries_per_kv=2, position=Rotary(), window=4),
    "latent": partial(LatentAttention, 32, head_dim=8, position=Rotary()),
}

TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2**-6, "atol": 2**-6}}


@torch.no_grad()
@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_keeps_what_attention_computes_with(name, precision):
    """In its dtype, and where all is kept with the tokens of a head in one piece; and it decodes what is read at
    once."""
    mixer, x_BTD = CACHED[name](), torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        whole, _ = mixer(x_BTD, CAUSAL)
        state, found = mixer.empty_state(2), []
        for part_BTD in x_BTD.split([5, 1, 1, 3, 1], dim=1):
            y_BTD, state = mixer(part_BTD, CAUSAL, state)
            found.append(y_BTD)
    torch.testing.assert_close(torch.cat(found, 1).float(), whole.float(), **TOLERANCES[precision])
    assert state.k.dtype == state.v.dtype == precision
    assert name == "windowed" or state.k.transpose(1, 2).is_contiguous()
