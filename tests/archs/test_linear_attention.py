"""Linear attention and the delta rule: mixers that differ in what one token does to the memory, and in nothing else."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from archs.mixers.gated_delta import GatedDelta
from archs.mixers.linear_attention import LinearAttention
from archs.visibility import BIDIRECTIONAL, CAUSAL

LINEAR = partial(LinearAttention, head_dim=8, conv_width=4)
DELTA = partial(GatedDelta, head_dim=8, conv_width=4, value_heads_per_key_head=1)
MIXERS = {
    "linear": partial(LINEAR, decay="none"),
    "retention": partial(LINEAR, decay="fixed"),
    "gated linear": partial(LINEAR, decay="gated"),
    "gated linear, exact heads": partial(LINEAR, decay="gated", heads=3),
    "delta": partial(DELTA, decay=False),
    "gated delta": DELTA,
    "gated delta, exact heads": partial(DELTA, heads=6, value_heads_per_key_head=2, key_dim=12),
}
every = pytest.mark.parametrize("name", MIXERS)


def build(name, width=32, dtype=torch.float64):
    """A mixer in which every term matters."""
    torch.manual_seed(0)
    mixer = MIXERS[name](width).to(dtype)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return mixer


def tokens(B, T, dtype=torch.float64):
    return torch.randn(B, T, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


def written_out(mixer, x_TD):
    """One sequence, one head, one token at a time, from the mixer's weights alone."""
    T = len(x_TD)
    delta = isinstance(mixer, GatedDelta)
    heads = mixer.value_heads if delta else mixer.heads
    K, V = (mixer.key_dim, mixer.value_dim) if delta else (mixer.head_dim, mixer.head_dim)
    channels, taps = mixer.conv_weight.shape
    projected = x_TD @ mixer.in_proj.weight.T
    qkv, rest = projected[:, :channels], projected[:, channels:]
    qkv = F.silu(sum(F.pad(qkv, (0, 0, taps - 1, 0))[w : w + T] * mixer.conv_weight[:, w] for w in range(taps)))
    key_heads = (channels - heads * V) // (2 * K)
    q, k, v = qkv.split([key_heads * K, key_heads * K, heads * V], dim=1)
    z, rest = rest[:, : heads * V].view(T, heads, V), rest[:, heads * V :]
    outputs = torch.zeros(T, heads, V, dtype=x_TD.dtype)
    for h in range(heads):
        shared = h // (heads // key_heads)
        S = torch.zeros(K, V, dtype=x_TD.dtype)
        for t in range(T):
            q_t, k_t = (y[t].view(key_heads, K)[shared] for y in (q, k))
            q_t, k_t = (y / (y @ y + 1e-6).sqrt() for y in (q_t, k_t))
            v_t = v[t].view(heads, V)[h]
            if mixer.A_log is not None:
                S = S * (-mixer.A_log[h].exp() * F.softplus(rest[t, h] + mixer.dt_bias[h])).exp()
            elif not delta and mixer.decay == "fixed":
                S = S * (1 - 2.0 ** (-5 - h))
            beta = rest[t, -heads + h].sigmoid() if delta else 1.0
            S = S + torch.outer(k_t, beta * (v_t - S.T @ k_t) if delta else v_t)
            outputs[t, h] = S.T @ q_t * K**-0.5
    eps = mixer.norm.eps or torch.finfo(x_TD.dtype).eps
    normed = outputs * (outputs.square().mean(-1, keepdim=True) + eps).rsqrt() * mixer.norm.weight
    return (normed * F.silu(z)).flatten(1) @ mixer.out_proj.weight.T


@every
def test_equals_the_recurrence_written_out(name):
    mixer, x = build(name), tokens(2, 70)
    with torch.no_grad():
        got, _ = mixer(x, CAUSAL)
        for b in range(2):
            torch.testing.assert_close(got[b], written_out(mixer, x[b]))


@every
def test_bidirectional_reads_a_reversed_sequence_as_the_sequence_reversed(name):
    mixer, x = build(name), tokens(2, 70)
    torch.testing.assert_close(mixer(x.flip(1), BIDIRECTIONAL)[0], mixer(x, BIDIRECTIONAL)[0].flip(1))


def test_what_a_decay_costs_in_parameters_is_one_gate_per_head():
    count = {name: sum(p.numel() for p in build(name).parameters()) for name in MIXERS}
    gate = 4 * (32 + 2)
    assert count["linear"] == count["retention"] == count["gated linear"] - gate
    assert count["delta"] == count["gated delta"] - gate


def test_the_width_decides_the_heads_unless_they_are_given():
    assert (build("gated linear").heads, build("gated linear, exact heads").heads) == (4, 3)
    exact = build("gated delta, exact heads")
    assert (exact.value_heads, exact.value_dim, exact.key_dim) == (6, 8, 12)
    assert exact.empty_state(1).memory.shape == (1, 6, 12, 8)


def test_gated_delta_equals_the_mixer_of_qwen3_next_with_the_same_weights():
    """Theirs lays q, k, v and z, and b and a, out by key head."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet

    heads, key_heads, V, K = 4, 2, 12, 8
    config = Qwen3NextConfig(
        hidden_size=32, linear_num_value_heads=heads, linear_num_key_heads=key_heads, linear_key_head_dim=K,
        linear_value_head_dim=V, num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=1e-5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Qwen3NextGatedDeltaNet(config, 0)
    ours = GatedDelta(32, head_dim=V, heads=heads, key_dim=K, value_heads_per_key_head=2, conv_width=4, norm_eps=1e-5)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3 if p.dim() > 1 else 1.0)
        by_head = theirs.in_proj_qkvz.weight.view(key_heads, -1, 32).split([K, K, 2 * V, 2 * V], dim=1)
        b, a = theirs.in_proj_ba.weight.view(key_heads, -1, 32).split([2, 2], dim=1)
        ours.in_proj.weight.copy_(torch.cat([part.flatten(0, 1) for part in (*by_head, a, b)]))
        ours.conv_weight.copy_(theirs.conv1d.weight[:, 0])
        for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight"):
            ours.get_parameter(name).copy_(theirs.get_parameter(name))
        x = tokens(2, 70, dtype=torch.float32)
        truth, got = theirs(x), ours(x, CAUSAL)[0]
    assert (got - truth).abs().max() < 1e-4 * truth.std()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(LINEAR, decay="learned"), "unknown decay 'learned'.*none, fixed, gated"),
        (partial(DELTA, heads=3, value_heads_per_key_head=2), "3 value heads cannot share key heads in groups of 2"),
    ],
)
def test_mixers_that_cannot_be_built_say_why(make, words):
    with pytest.raises(ValueError, match=words):
        make(32)
