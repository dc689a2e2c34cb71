"""What every backbone owes: decode equals prefill, causality, gradients, and an honest count of its cost."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from archs.channels.mlp import SwiGLU
from archs.flops import costs
from archs.language_model import LanguageModel, depth_for
from archs.mixers.attention import Attention
from archs.mixers.gated_delta import GatedDelta
from archs.mixers.heads import heads_for
from archs.visibility import BIDIRECTIONAL, CAUSAL

V = 31
ATTENTION = dict(head_dim=8, queries_per_kv=1, qk_norm=True, rope_base=10000.0)
DELTA = dict(head_dim=8, value_heads_per_key_head=1, conv_width=4)
BACKBONES = {
    "multi-head": dict(pattern=["a"], mixers={"a": partial(Attention, **ATTENTION)}),
    "grouped-query": dict(
        pattern=["a"], mixers={"a": partial(Attention, **ATTENTION | {"queries_per_kv": 2, "qk_norm": False})}
    ),
    "multi-query tied": dict(
        pattern=["a"], mixers={"a": partial(Attention, **ATTENTION | {"queries_per_kv": 4})}, tied=True
    ),
    "gated delta": dict(pattern=["d"], mixers={"d": partial(GatedDelta, **DELTA)}),
    "hybrid": dict(
        pattern=["d", "d", "d", "a"],
        mixers={
            "a": partial(Attention, **ATTENTION),
            "d": partial(GatedDelta, **DELTA | {"value_heads_per_key_head": 2}),
        },
    ),
}


def build(name, width=32, dtype=torch.float64, **changes):
    torch.manual_seed(0)
    model = LanguageModel(
        V, width, channel=partial(SwiGLU, expansion=8 / 3, multiple_of=8), **BACKBONES[name] | changes
    )
    model = model.to(dtype)
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
    assert causal[:t].sum() == 0 and causal[t] > 0
    both = (model(x, BIDIRECTIONAL) - model(y, BIDIRECTIONAL)).abs().amax(-1)[0]
    assert (both > 0).all()


@every
@pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL])
def test_gradients_reach_every_parameter(name, visibility):
    model = build(name)
    model(tokens(2, 20), visibility).logsumexp(-1).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def solve_triangular_flops(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    *batch, n, _ = a_shape
    return torch.Size(batch).numel() * n * n * b_shape[-1]


@every
@pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL])
@pytest.mark.parametrize("T", [17, 64, 192])
def test_counted_flops_are_those_that_pytorch_counts(name, visibility, T):
    """PyTorch counts causal attention in full; ours counts the pairs that are seen. All else must agree exactly."""
    with torch.device("meta"):
        model = LanguageModel(V, 32, channel=partial(SwiGLU, expansion=8 / 3, multiple_of=8), **BACKBONES[name])
        x = torch.zeros(1, T, dtype=torch.long)
    solve = {torch.ops.aten.linalg_solve_triangular: solve_triangular_flops}
    with FlopCounterMode(display=False, custom_mapping=solve) as counter:
        model(x, visibility)
    attention = [block.mixer for block in model.blocks if isinstance(block.mixer, Attention)]
    unseen = sum(4 * m.heads * m.head_dim * (T * T - visibility.pairs(T)) for m in attention)
    assert model.flops(T, visibility) == counter.get_total_flops() - unseen


COUNTED = {
    "mm",
    "bmm",
    "addmm",
    "convolution",
    "linalg_solve_triangular",
    "_scaled_dot_product_fused_attention_overrideable",
}
FREE = {  # data movement, and elementwise or reducing work of order one FLOP an element
    "_fused_rms_norm", "_safe_softmax", "_softmax", "_to_copy", "_unsafe_view", "add", "add_", "arange",
    "bitwise_not", "cat", "clone", "constant_pad_nd", "cos", "cumsum", "detach", "div", "embedding", "exp",
    "expand", "flip", "masked_fill", "mean", "mul", "neg", "new_zeros", "ones", "permute", "pow",
    "promote_types", "rsqrt", "scalar_tensor", "select", "sigmoid", "silu", "sin", "slice", "softplus", "split",
    "split_with_sizes", "stack", "sub", "sum", "t", "transpose", "tril", "unsqueeze", "view", "where",
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
        model = LanguageModel(V, 32, channel=partial(SwiGLU, expansion=8 / 3, multiple_of=8), **BACKBONES[name])
        x = torch.zeros(1, 70, dtype=torch.long)
    with Watch():
        model(x, visibility)
    assert seen - COUNTED - FREE == set()


@every
def test_state_bytes_and_parameters_are_those_of_the_real_tensors(name):
    real, x = build(name, dtype=torch.float32), tokens(1, 50)
    with torch.device("meta"):
        meta = LanguageModel(V, 32, channel=partial(SwiGLU, expansion=8 / 3, multiple_of=8), **BACKBONES[name])
    counted = costs(meta, 50, CAUSAL)
    _, states = real.prefill(x)
    held = 0
    for state in states:
        if hasattr(state, "memory"):
            held += 4 * (state.memory.numel() + state.conv.numel())
        else:
            held += 4 * 50 * (state.k[0, 0].numel() + state.v[0, 0].numel())
    assert counted.state_bytes == held
    assert counted.params_total == len(torch.nn.utils.parameters_to_vector(real.parameters()))
    ends = V * 32 * (1 if real.tied else 2)
    assert counted.params_non_embedding == counted.params_total - ends


def test_a_recurrent_state_does_not_grow_and_a_cache_does():
    for name, grows in (("gated delta", False), ("multi-head", True)):
        model = build(name)
        sizes = [sum(s.nbytes for s in model.prefill(tokens(1, T))[1]) for T in (10, 100)]
        assert (sizes[1] > sizes[0]) == grows


def test_the_first_loss_of_an_untied_model_is_log_vocabulary_size():
    model = LanguageModel(V, 32, channel=partial(SwiGLU, expansion=2, multiple_of=8), **BACKBONES["hybrid"])
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
        ("hybrid", {"depth": 6}, "depth 6 is not a multiple of the 4 blocks"),
        ("hybrid", {"pattern": ["x"]}, r"pattern \['x'\] may name only the mixers \['a', 'd'\]"),
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
