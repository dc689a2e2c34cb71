"""Qwen3-Next: gated delta-rule layers, attention layers among them, and a mixture of experts (Qwen Team, 2025)."""

from functools import partial

import torch

from archs.checkpoints.assembly import Blueprint, Ends, Layer, Part, assemble
from archs.checkpoints.parts import PRE_NORMS, attention, heads_of
from archs.checkpoints.qwen3 import sparse_or_dense
from archs.checkpoints.rope import rope_parameters, rotary
from archs.checkpoints.rules import Rule, same, taps
from archs.checkpoints.settings import Settings
from archs.mixers.gated_delta import GatedDelta

KINDS = {"full_attention": "full", "attention": "full", "linear_attention": "linear"}
SHIFT = 1.0  # the weights of norms are stored less one


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, depth = settings.take("hidden_size"), settings.count("num_hidden_layers")
    every, eps = settings.take("full_attention_interval", 4), settings.take("rms_norm_eps", 1e-6)
    kinds = settings.layer_types(
        ["linear_attention" if (i + 1) % every else "full_attention" for i in range(depth)], KINDS
    )
    heads = heads_of(settings, width)
    full = attention(
        heads,
        position=rotary(settings, rope_parameters(settings, fraction=0.25), heads.head_dim, partial=True),
        bias=settings.take("attention_bias", False),
        qk_norm="head",
        norm_eps=eps,
        shift=SHIFT,
        gate=True,
    )
    settings.only("hidden_act", "silu", "swish")  # the short convolutions know no other
    settings.only("use_sliding_window", False)
    settings.ignore("output_router_logits", "router_aux_loss_coef")
    of_kind = {"full": full, "linear": _gated_delta(settings, eps)}
    channels = sparse_or_dense(
        settings,
        names,
        settings.take("num_experts"),
        normalise=True,
        shared=1,
        shared_hidden=settings.take("shared_expert_intermediate_size"),
        shared_name="shared_expert",
        shared_gate=True,
    )
    layers = [Layer(of_kind[kind], channel, PRE_NORMS) for kind, channel in zip(kinds, channels, strict=True)]
    return assemble(settings, layers, width, eps=eps, tied=False, ends=Ends(shift=SHIFT), unused=[r"mtp\..*"])


def _gated_delta(settings: Settings, eps: float) -> Part:
    key_heads, heads = settings.take("linear_num_key_heads"), settings.take("linear_num_value_heads")
    K, V = settings.take("linear_key_head_dim"), settings.take("linear_value_head_dim")
    if heads % key_heads:
        settings.refuse("linear_num_value_heads", f"a multiple of linear_num_key_heads={key_heads} is")
    shared = heads // key_heads
    build = partial(
        GatedDelta,
        head_dim=V,
        heads=heads,
        key_dim=K,
        value_heads_per_key_head=shared,
        conv_width=settings.take("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )

    # Their rows go by key head, ours by what they project to: q, k, v, z, a, b.
    def fold(x):
        q, k, v, z, b, a = (
            rows.flatten(0, 1)
            for y, sizes in zip(x, ([K, K, shared * V, shared * V], [shared, shared]), strict=True)
            for rows in y.unflatten(0, (key_heads, -1)).split(sizes, dim=1)
        )
        return [torch.cat([q, k, v, z, a, b])]

    def unfold(x):
        sizes = [key_heads * n for n in (K, K, shared * V, shared * V, shared, shared)]
        q, k, v, z, a, b = (y.unflatten(0, (key_heads, -1)) for y in x[0].split(sizes))
        return [torch.cat(y, dim=1).flatten(0, 1) for y in ([q, k, v, z], [b, a])]

    projections = Rule(("in_proj.weight",), ("in_proj_qkvz.weight", "in_proj_ba.weight"), fold, unfold)
    rest = [same(name, name) for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight")]
    return Part("linear_attn", build, [projections, taps("conv_weight", "conv1d.weight"), *rest])
