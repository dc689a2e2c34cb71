"""What is the model's own: depth, heads, the head's cost, learned positions, tied heads, and what cannot be built."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.channels.mlp import MLP
from archs.language_model import LanguageModel, depth_for
from archs.mixers.attention import Attention
from archs.mixers.gated_delta import GatedDelta
from archs.mixers.heads import cut_heads, heads_for
from archs.mixers.parallel import Parallel
from archs.parameters import Role
from archs.positions import Rotary
from archs.visibility import CAUSAL

V = 31
ATTENTION = dict(head_dim=8, queries_per_kv=1, position=Rotary())
MIXERS = {
    "attention": partial(Attention, **ATTENTION),
    "multi-query": partial(Attention, **ATTENTION | {"queries_per_kv": 4}),
    "delta": partial(GatedDelta, head_dim=8, value_heads_per_key_head=1, conv_width=4),
}
CHANNELS = {"mlp": partial(MLP, activation="silu", gated=True, expansion=8 / 3, multiple_of=8)}
HYBRID = ["delta+mlp"] * 3 + ["attention+mlp"]


def build(pattern=HYBRID, width=32, **options):
    torch.manual_seed(0)
    return LanguageModel(V, width, **dict(pattern=pattern, mixers=MIXERS, channels=CHANNELS) | options)


def tokens(B, T):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def test_the_first_loss_of_an_untied_model_is_log_vocabulary_size():
    assert build()(tokens(2, 9)).abs().max() == 0


def test_the_head_on_half_the_positions_costs_half():
    model = build()
    head = model.flops(64, CAUSAL) - model.flops(64, CAUSAL, 0.0)
    assert head == 2 * 64 * 32 * V
    assert model.flops(64, CAUSAL, 0.5) == model.flops(64, CAUSAL, 0.0) + head / 2


def test_learned_positions_end_where_they_were_learned():
    model = build(max_length=20)
    assert model(tokens(2, 20)).shape == (2, 20, V)
    with pytest.raises(ValueError, match="21 tokens are beyond the 20 positions learned: raise max_length"):
        model(tokens(2, 21))
    _, states = model.extend(tokens(2, 20), model.empty_states(2))
    with pytest.raises(ValueError, match="21 tokens are beyond"):
        model.extend(tokens(2, 1), states)


def test_a_model_with_a_bias_in_its_head_and_learned_positions_counts_them_outside_its_blocks():
    from archs.costs import costs

    plain, more = build(), build(max_length=20, head_bias=True)
    before, after = (costs(m, 16, 3 * m.flops(16, CAUSAL)) for m in (plain, more))
    assert after.params_total - before.params_total == 20 * 32 + V
    assert after.params_non_embedding == before.params_non_embedding


def test_what_is_written_to_the_residual_stream_starts_smaller_with_depth():
    for depth in (4, 16):
        model = build(depth=depth)
        for role in model.roles():
            if role.role is Role.MATRIX:
                spread = role.parameter.std().item() * role.fan_in**0.5
                expected = (2 * depth) ** -0.5 if role.name.endswith("out_proj.weight") else 1.0
                assert spread == pytest.approx(expected, rel=0.15), role.name


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_an_embedding_and_no_parameter_of_its_own(tied):
    model = build(tied=tied)
    roles = {r.name: r.role for r in model.roles()}
    assert roles["embedding.weight"] is Role.EMBEDDING
    assert roles.get("head.weight") is (None if tied else Role.HEAD)
    assert (model.head.weight is model.embedding.weight) == tied


@pytest.mark.parametrize(("width", "depth"), [(8, 4), (256, 4), (383, 4), (512, 8), (768, 12), (1024, 16), (2048, 32)])
def test_depth_follows_width(width, depth):
    assert depth_for(width) == depth


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 6}, "depth 6 is not 0 first blocks and a multiple of the 4 blocks"),
        ({"width": 10_000_000}, "width 10000000 and depth 156248: a model has 4096 blocks at most"),
        ({"first": ["attention+mlp"], "depth": 1}, "depth 1 is not 1 first blocks"),
        ({"pattern": ["x"]}, r"pattern \['x'\] must have .* mixer of \['attention', .* channel of \['mlp'\]"),
        ({"pattern": ["delta+x"]}, r"pattern \['delta\+x'\] must have"),
        ({"pattern": []}, "at least one"),
        ({"norm_at": "middle"}, "norm_at='middle' must be one of pre, post, both"),
        ({"pattern": ["none"], "mixers": {"none": partial(Parallel, mixers=[])}}, "0 mixers do not stand side by side"),
        ({"pattern": ["multi-query"], "width": 28}, "width 28 cannot be cut .* multiple of 8"),
        ({"pattern": ["attention"], "width": 31}, "width 31 cannot be cut .* multiple of 2"),
    ],
)
def test_models_that_cannot_be_built_say_why(changes, words):
    with pytest.raises(ValueError, match=words):
        build(**changes)


@given(n=st.integers(1, 64), heads=st.integers(1, 8))
def test_a_number_of_heads_alone_cuts_every_width_evenly(n, heads):
    assert cut_heads(2 * heads * n, heads, None) == (heads, 2 * n)


@pytest.mark.parametrize(
    ("width", "heads", "words"),
    [(30, 4, "width 30 cannot be cut into 4 even heads: choose .* multiple of 8"), (32, None, "give at least one")],
)
def test_heads_that_do_not_fit_are_refused_in_a_sentence(width, heads, words):
    with pytest.raises(ValueError, match=words):
        cut_heads(width, heads, None)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 128).map(lambda n: 4 * n), head_dim=st.sampled_from([16, 32, 64, 128]))
def test_heads_are_even_fill_the_width_and_are_as_near_as_they_can_be(width, head_dim):
    heads = heads_for(width, head_dim)
    assert width % (2 * heads) == 0
    distance = abs(math.log(width / heads / head_dim))
    assert all(distance <= abs(math.log(width / h / head_dim)) + 1e-12 for h in range(1, width) if width % (2 * h) == 0)
    if width % head_dim == 0:
        assert heads == width // head_dim
