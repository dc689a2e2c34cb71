"""What every backbone owes: decode equals prefill, causality, gradients, and an honest count of its cost."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.channels.mlp import MLP
from archs.channels.moe import MoE
from archs.flops import costs
from archs.language_model import LanguageModel, depth_for
from archs.mixers.attention import Attention
from archs.mixers.gated_delta import GatedDelta
from archs.mixers.heads import heads_for
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.linear_attention import LinearAttention
from archs.mixers.mamba2 import Mamba2
from archs.mixers.parallel import Parallel
from archs.mixers.short_conv import ShortConv
from archs.mixers.sparse_attention import SparseAttention
from archs.positions import Alibi, Rotary
from archs.visibility import BIDIRECTIONAL, CAUSAL

V = 31
MLP_ = dict(activation="silu", gated=True, expansion=8 / 3, multiple_of=8)
MOE = dict(experts=4, top_k=2, activation="silu", gated=True, expansion=8 / 3, multiple_of=8, shared=1)
CHANNELS = {
    "mlp": partial(MLP, **MLP_),
    "plain": partial(MLP, activation="relu2", gated=False, expansion=4, bias=True),
    "moe": partial(MoE, **MOE, gate="sigmoid", normalise=True, groups=2, bias_update_rate=1e-3),
}
ATTENTION = dict(head_dim=8, queries_per_kv=1, position=Rotary())
DELTA = dict(head_dim=8, value_heads_per_key_head=1, conv_width=4)
INDEX = dict(index_heads=6, index_dim=8, index_position=Rotary(share=0.5), top_k=24)
MAMBA = dict(head_dim=8, state_size=16, groups=2)
LINEAR = dict(head_dim=8, conv_width=4)
MIXERS = {
    "multi-head": partial(Attention, **ATTENTION, qk_norm="head"),
    "grouped": partial(Attention, **ATTENTION | {"queries_per_kv": 2}),
    "multi-query": partial(Attention, **ATTENTION | {"queries_per_kv": 4}, qk_norm="all"),
    "window": partial(Attention, **ATTENTION, window=9),
    "sinks": partial(Attention, **ATTENTION | {"queries_per_kv": 2}, window=9, sinks=True, bias=True),
    "gate": partial(Attention, **ATTENTION | {"position": Rotary(share=0.5, layout="interleaved")}, gate=True),
    "alibi": partial(Attention, **ATTENTION | {"position": Alibi()}),
    "learned": partial(Attention, **ATTENTION | {"position": None}, bias=True),
    "latent": partial(LatentAttention, head_dim=8, kv_rank=12, position=Rotary(layout="interleaved")),
    "latent queries": partial(LatentAttention, head_dim=8, kv_rank=12, q_rank=20, position=Rotary()),
    "sparse": partial(
        SparseAttention, attention=partial(Attention, **ATTENTION | {"queries_per_kv": 2}, gate=True), **INDEX
    ),
    "sparse latent": partial(
        SparseAttention,
        attention=partial(LatentAttention, head_dim=8, kv_rank=12, q_rank=20, position=Rotary(layout="interleaved")),
        **INDEX,
    ),
    "short conv": partial(ShortConv, conv_width=4),
    "delta": partial(GatedDelta, **DELTA),
    "delta grouped": partial(GatedDelta, **DELTA | {"value_heads_per_key_head": 2}),
    "deltanet": partial(GatedDelta, **DELTA, decay=False),
    "mamba2": partial(Mamba2, **MAMBA),
    "parallel": partial(
        Parallel, mixers=[partial(Attention, **ATTENTION, window=9), partial(Mamba2, **MAMBA, expand=1)]
    ),
    "retnet": partial(LinearAttention, **LINEAR, decay="fixed"),
    "gated linear": partial(LinearAttention, **LINEAR, decay="gated"),
}
BACKBONES = {
    name: dict(pattern=[f"{name}+mlp"]) for name in MIXERS if name not in ("multi-query", "learned", "mamba2")
} | {
    "multi-query tied": dict(pattern=["multi-query+mlp"], tied=True),
    "learned": dict(
        pattern=["learned+plain"], max_length=1000, norm=partial(torch.nn.LayerNorm, eps=1e-5), head_bias=True
    ),
    "mamba2": dict(pattern=["mamba2"]),
    "hybrid": dict(pattern=["delta grouped+mlp"] * 3 + ["multi-head+mlp"]),
    "local and global": dict(pattern=["window+mlp", "multi-head+mlp"], norm_at="both"),
    "norms after": dict(pattern=["multi-head+mlp"], norm_at="post"),
    "experts": dict(pattern=["grouped+moe"], first=["grouped+mlp"]),
    "hybrid of experts": dict(pattern=["mamba2", "mamba2+moe", "delta+moe", "window+moe"]),
}
RECURRENT = {"short conv", "delta", "delta grouped", "deltanet", "retnet", "gated linear", "mamba2"}


def plain(name, **changes):
    """A backbone as it is built, with the parts that its pattern names."""
    return LanguageModel(
        V, changes.pop("width", 32), **dict(mixers=MIXERS, channels=CHANNELS) | BACKBONES[name] | changes
    )


def build(name, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = plain(name, **changes).to(dtype)
    with torch.no_grad():  # every term must matter, the norms and the head too
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.head.weight.normal_()
    return model


def tokens(B, T):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


every = pytest.mark.parametrize("name", BACKBONES)


@every
def test_prefill_then_decode_equals_one_full_pass(name):
    model, x = build(name), tokens(3, 75)
    full = model(x)
    logits, states = model.prefill(x[:, :67])
    got = [logits]
    for t in range(67, 75):
        logits, states = model.step(x[:, t], states)
        got.append(logits[:, None])
    torch.testing.assert_close(torch.cat(got, 1), full, rtol=1e-8, atol=1e-8)


@every
def test_a_prompt_handed_over_in_pieces_equals_one(name):
    model, x = build(name), tokens(2, 70)
    states, got = None, []
    for piece in x.split([1, 5, 64], dim=1):
        logits, states = model.prefill(piece, states)
        got.append(logits)
    torch.testing.assert_close(torch.cat(got, 1), model(x), rtol=1e-8, atol=1e-8)


@every
@pytest.mark.parametrize("t", [0, 1, 40, 69])
def test_a_changed_token_changes_no_earlier_logit_when_causal_and_does_when_bidirectional(name, t):
    model, x = build(name), tokens(1, 70)
    y = x.clone()
    y[0, t] = (y[0, t] + 1) % V
    causal = (model(x, CAUSAL) - model(y, CAUSAL)).abs().amax(-1)[0]
    # An expert's tokens are multiplied together, so another grouping may round differently.
    assert (causal[:t] < (1e-9 if "experts" in name else 1e-300)).all() and causal[t] > 0
    both = (model(x, BIDIRECTIONAL) - model(y, BIDIRECTIONAL)).abs().amax(-1)[0]
    assert (both[max(0, t - 8) : t + 9] > 0).all()  # what a window of nine reaches in one block


@every
@pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL])
def test_gradients_reach_every_parameter(name, visibility):
    model = build(name)
    loss = model(tokens(2, 40), visibility).logsumexp(-1).sum()
    (loss + sum(model.auxiliary_losses().values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def unseen_flops(mixer, T: int, visibility) -> int:
    """FLOPs of the pairs that run and are not seen: all others of a mask, the rest of the blocks of a causal window."""
    if isinstance(mixer, Parallel):
        return sum(unseen_flops(part, T, visibility) for part in mixer.mixers)
    if isinstance(mixer, SparseAttention):
        index = 2 * mixer.indexer.heads * mixer.indexer.dim * (T * T - visibility.pairs(T))
        return mixer.attention.pair_flops * (T * T - mixer.pairs(T, visibility)) + index
    if not isinstance(mixer, Attention | LatentAttention):
        return 0
    w = getattr(mixer, "window", None)
    banded = visibility is CAUSAL and w is not None and w < T and mixer.sinks is None
    run = -(-T // w) * w * 2 * w if banded else T * T
    return mixer.pair_flops * (run - visibility.pairs(T, w))


@every
@pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL])
@pytest.mark.parametrize("T", [5, 64, 192])
def test_counted_flops_are_those_that_pytorch_counts(name, visibility, T):
    """PyTorch counts causal attention in full; ours counts the pairs that are seen. All else must agree exactly."""
    with torch.device("meta"):
        model = plain(name)
        x = torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, visibility)
    unseen = sum(unseen_flops(block.mixer, T, visibility) for block in model.blocks)
    assert model.flops(T, visibility) == counter.get_total_flops() - unseen


COUNTED = {
    "mm",
    "bmm",
    "addmm",
    "convolution",
    "gated_delta_rule_chunked",
    "_scaled_dot_product_fused_attention_overrideable",
}
FREE = {  # data movement, and elementwise or reducing work of order one FLOP an element
    "_embedding_bag", "_fused_rms_norm", "_log_softmax", "_safe_softmax", "_softmax", "_to_copy", "_unsafe_view", "abs",
    "add", "add_", "addcmul", "arange", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "clamp", "clamp_", "clone",
    "constant_pad_nd", "cos", "cumsum", "detach", "div", "embedding", "empty_like", "eq", "exp", "exp_", "expand",
    "flip", "floor_divide", "gather", "ge", "gt", "index_put_", "index_select", "isneginf", "le", "log1p", "lt",
    "masked_fill", "mean", "mul", "native_layer_norm", "neg", "new_zeros", "ones", "ones_like", "permute", "pow",
    "promote_types", "relu", "remainder", "repeat", "rsqrt", "rsub", "scalar_tensor", "scatter_", "scatter_add_", "select",
    "sigmoid", "silu", "sin", "slice", "softplus", "sort", "split", "split_with_sizes", "stack", "sub", "sum", "t",
    "topk", "transpose", "tril", "unbind", "unfold", "unsqueeze", "view", "where", "xlogy", "zeros_like",
}  # fmt: skip


@every
@pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL])
def test_no_operation_escapes_the_count(name, visibility):
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model = plain(name)
        x = torch.zeros(1, 70, dtype=torch.long)
    with Watch():
        model(x, visibility)
    assert seen - COUNTED - FREE == set()


@every
def test_state_bytes_and_parameters_are_those_of_the_real_tensors(name):
    real, x = build(name, dtype=torch.float32), tokens(1, 50)
    with torch.device("meta"):
        meta = plain(name)
    counted = costs(meta, 50, meta.flops(50, CAUSAL))
    _, states = real.prefill(x)
    held = 0
    for state in (part for state in states for part in getattr(state, "states", [state])):
        if hasattr(state, "conv"):
            held += 4 * (state.conv.numel() + (0 if state.memory is None else state.memory.numel()))
        else:  # the next token sees itself and window - 1 others
            kept = 50 if state.window is None else state.window - 1
            held += 4 * kept * (state.k[0, 0].numel() + state.v[0, 0].numel())
    assert counted.state_bytes == held
    assert counted.params_total == len(torch.nn.utils.parameters_to_vector(real.parameters()))
    ends = V * 32 * (1 if real.tied else 2)
    if real.max_length is not None:
        ends += V + 32 * real.max_length  # the head's bias and the learned positions
    assert counted.params_non_embedding == counted.params_total - ends


def test_a_recurrent_state_does_not_grow_and_a_cache_does():
    for name, grows in [
        (name, name not in RECURRENT | {"window", "sinks", "parallel"}) for name in BACKBONES if "hybrid" not in name
    ]:
        model = build(name)
        sizes = [sum(s.nbytes for s in model.prefill(tokens(1, T))[1]) for T in (10, 100)]
        assert (sizes[1] > sizes[0]) == grows


def test_the_first_loss_of_an_untied_model_is_log_vocabulary_size():
    model = plain("hybrid")
    assert model(tokens(2, 9)).abs().max() == 0


def test_the_head_on_half_the_positions_costs_half():
    model = build("multi-head")
    head = model.flops(64, CAUSAL) - model.flops(64, CAUSAL, 0.0)
    assert head == 2 * 64 * 32 * V
    assert model.flops(64, CAUSAL, 0.5) == model.flops(64, CAUSAL, 0.0) + head / 2


@pytest.mark.parametrize(("width", "depth"), [(8, 4), (256, 4), (383, 4), (512, 8), (768, 12), (1024, 16), (2048, 32)])
def test_depth_follows_width(width, depth):
    assert depth_for(width) == depth


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("hybrid", {"depth": 6}, "depth 6 is not 0 first blocks and a multiple of the 4 blocks"),
        ("experts", {"depth": 1}, "depth 1 is not 1 first blocks"),
        (
            "hybrid",
            {"pattern": ["x"]},
            r"pattern \['x'\] must have .* mixer of \['alibi', .* channel of \['mlp', 'moe'",
        ),
        ("hybrid", {"pattern": ["delta+x"]}, r"pattern \['delta\+x'\] must have"),
        ("hybrid", {"norm_at": "middle"}, "norm_at='middle' must be one of pre, post, both"),
        ("parallel", {"mixers": {"parallel": partial(Parallel, mixers=[])}}, "0 mixers do not stand side by side"),
        ("learned", {"mixers": {"learned": partial(Attention, **ATTENTION, window=0)}}, "window=0 must be at least 1"),
        ("hybrid", {"pattern": []}, "at least one"),
        ("multi-query tied", {"width": 28}, "width 28 cannot be cut .* multiple of 8"),
        ("multi-head", {"width": 31}, "width 31 cannot be cut .* multiple of 2"),
    ],
)
def test_models_that_cannot_be_built_say_why(name, changes, words):
    with pytest.raises(ValueError, match=words):
        build(name, **changes)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 128).map(lambda n: 4 * n), head_dim=st.sampled_from([16, 32, 64, 128]))
def test_heads_are_even_fill_the_width_and_are_as_near_as_they_can_be(width, head_dim):
    heads = heads_for(width, head_dim)
    assert width % (2 * heads) == 0
    distance = abs(math.log(width / heads / head_dim))
    assert all(distance <= abs(math.log(width / h / head_dim)) + 1e-12 for h in range(1, width) if width % (2 * h) == 0)
    if width % head_dim == 0:
        assert heads == width // head_dim
