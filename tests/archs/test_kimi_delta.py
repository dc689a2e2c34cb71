"""Kimi delta attention against the equations of its paper and against what transformers runs."""

import pytest
import torch
import torch.nn.functional as F

from archs.mixers.kimi_delta import KimiDelta
from archs.visibility import CAUSAL


def test_it_is_what_the_paper_writes_token_by_token():
    torch.manual_seed(0)
    T, H, K = 20, 2, 8
    mixer = KimiDelta(16, head_dim=K, conv_width=4, norm_eps=1e-6).double()
    with torch.no_grad():
        for p in mixer.parameters():  # so that every term matters
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(1, T, 16, dtype=torch.float64)
    W_qkv, W_decay, W_gate, W_beta = mixer.in_proj.weight.split([3 * H * K, K, K, H])
    z = x[0] @ W_qkv.T
    before = F.pad(z, (0, 0, 3, 0))
    z = F.silu(sum(before[n : n + T] * mixer.conv_weight[:, n] for n in range(4)))
    q, k, v = z.view(T, 3, H, K).unbind(1)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    time_step = F.softplus((x[0] @ W_decay.T @ mixer.decay_up.weight.T).view(T, H, K) + mixer.dt_bias)
    alpha = (-mixer.A_log.exp()[:, None] * time_step).exp()
    beta = (x[0] @ W_beta.T).sigmoid()
    gate = (x[0] @ W_gate.T @ mixer.gate_up.weight.T).sigmoid()
    answers = torch.zeros(T, H, K, dtype=torch.float64)
    for h in range(H):
        S = torch.zeros(K, K, dtype=torch.float64)
        for t in range(T):
            erase = torch.eye(K, dtype=torch.float64) - beta[t, h] * torch.outer(k[t, h], k[t, h])
            S = erase @ torch.diag(alpha[t, h]) @ S + beta[t, h] * torch.outer(k[t, h], v[t, h])
            o = S.T @ q[t, h] * K**-0.5
            answers[t, h] = o / (o.square().mean() + 1e-6).sqrt() * mixer.norm.weight
    expected = (answers.view(T, H * K) * gate) @ mixer.out_proj.weight.T
    torch.testing.assert_close(mixer(x, CAUSAL)[0][0], expected)


def test_it_equals_the_published_mixer_with_the_same_weights():
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    torch.manual_seed(0)
    config = kimi.KimiLinearConfig(hidden_size=32, linear_num_heads=4, linear_head_dim=8, num_hidden_layers=1)
    theirs = kimi.KimiLinearDeltaAttention(config, 0)
    ours = KimiDelta(32, head_dim=8, conv_width=4, norm_eps=config.rms_norm_eps)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    given = theirs.state_dict()
    projections = ("q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "g_a_proj", "b_proj")
    state = {
        "in_proj.weight": torch.cat([given[f"{name}.weight"] for name in projections]),
        "decay_up.weight": given["forget_gate.f_b_proj.weight"],
        "gate_up.weight": given["g_b_proj.weight"],
        "conv_weight": given["conv1d.weight"].squeeze(1),
        "A_log": given["forget_gate.A_log"].flatten(),
        "dt_bias": given["forget_gate.dt_bias"].view(4, 8),
        "norm.weight": given["o_norm.weight"],
        "out_proj.weight": given["o_proj.weight"],
    }
    ours.load_state_dict(state)
    x = torch.randn(2, 50, 32)
    with torch.no_grad():
        truth, got = theirs(x), ours(x, CAUSAL)[0]
    assert (got - truth).abs().max() < 1e-4 * truth.std()
