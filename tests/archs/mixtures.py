"""Mixtures of experts in which every term matters, and what they are by definition."""

import torch

from archs.channels.mlp import activate
from archs.channels.moe import MoE

SIZES = {"experts": 8, "top_k": 3, "hidden": 10, "activation": "silu", "gated": True}
SOFTMAX = {"gate": "softmax", "normalise": True}
DEEPSEEK = {
    "gate": "sigmoid",
    "normalise": True,
    "groups": 4,
    "group_limit": 2,
    "bias_update_rate": 0.1,
    "route_scale": 2.5,
}


def build(width=12, dtype=torch.float64, std=1.0, **options):
    """A mixture in which every term matters."""
    torch.manual_seed(0)
    moe = MoE(width, **SIZES | SOFTMAX | options).to(dtype)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(std * torch.randn_like(p))
        if moe.router.choice_bias is not None:
            moe.router.choice_bias.copy_(torch.randn(moe.router.experts))
    return moe


def tokens(B=2, T=9, width=12, dtype=torch.float64, seed=1):
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(moe, x_BTD):
    """The definition, one token and one expert at a time; also the chosen experts of each token."""
    router = moe.router
    size = router.experts // router.groups
    ys, choices = [], []
    for x in x_BTD.flatten(0, 1):
        logits = router.linear.weight @ x + (0 if router.linear.bias is None else router.linear.bias)
        scores = logits.softmax(0) if router.gate == "softmax" else 1 / (1 + (-logits).exp())
        rank = (scores if router.choice_bias is None else scores + router.choice_bias).tolist()
        best = [sum(sorted(rank[g * size : (g + 1) * size])[-2:]) for g in range(router.groups)]
        open_groups = sorted(range(router.groups), key=lambda g: -best[g])[: router.group_limit]
        allowed = [e for e in range(router.experts) if e // size in open_groups]
        chosen = sorted(allowed, key=lambda e: -rank[e])[: router.top_k]
        total = sum(scores[e] for e in chosen) if router.normalise else 1
        y = 0
        for e in chosen:
            hidden = moe.gate_up.weight[e] @ x
            if moe.gate_up.bias is not None:
                hidden = hidden + moe.gate_up.bias[e]
            out = moe.out_proj.weight[e] @ activate(hidden, moe.activation, moe.gated)
            if moe.out_proj.bias is not None:
                out = out + moe.out_proj.bias[e]
            y = y + router.route_scale * scores[e] / total * out
        if moe.shared is not None:
            y = y + moe.shared(x) * (1 if moe.shared_gate is None else moe.shared_gate(x).sigmoid())
        ys.append(y)
        choices.append(set(chosen))
    return torch.stack(ys).view_as(x_BTD), choices
