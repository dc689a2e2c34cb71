"""Mixers of public models: what builds ours, and their weights under our names."""

import math
from collections.abc import Callable
from functools import partial

import torch

from archs.mixers.attention import Attention
from archs.mixers.gated_delta import GatedDelta
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.mamba2 import Mamba2
from archs.mixers.short_conv import ShortConv
from archs.mixers.sparse_attention import SparseAttention
from archs.positions import Linear, Llama3, Rotary, Yarn
from archs.pretrained.layer import Part, Weights, norm_eps, under


def mixer_of(config, layer: Weights, i: int, shift: float) -> Part:
    if attention := under(layer, "attn."):
        return _gpt2_attention(config, attention)
    if attention := under(layer, "self_attn."):
        latent = "kv_b_proj.weight" in attention
        return _latent_attention(config, attention) if latent else _attention(config, attention, i, shift)
    if delta := under(layer, "linear_attn."):
        return _gated_delta(config, delta)
    if conv := under(layer, "conv."):
        return _short_conv(config, conv)
    return _mamba2(config, under(layer, "mamba.") or under(layer, "mixer."))


def _gpt2_attention(config, w: Weights) -> Part:
    if config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights:
        raise ValueError("GPT-2 with scores scaled by the layer, or not at all, is not supported")
    build = partial(
        Attention,
        head_dim=config.n_embd // config.n_head,
        heads=config.n_head,
        queries_per_kv=1,
        position=None,
        bias=True,
    )
    # GPT-2 stores its matrices transposed.
    names = {"c_attn": "qkv", "c_proj": "out_proj"}
    return build, {
        f"{ours}.{kind}": w[f"{theirs}.{kind}"].t() for theirs, ours in names.items() for kind in ("weight", "bias")
    }


def _attention(config, w: Weights, i: int, shift: float) -> Part:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[i] if kinds else "full_attention"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError("attention with capped scores is not supported")
    theirs = {
        kind: [w[f"{name}_proj.{kind}"] for name in "qkv"] for kind in ("weight", "bias") if f"q_proj.{kind}" in w
    }
    ours = {f"out_proj.{kind}": w[f"o_proj.{kind}"] for kind in theirs}
    gate = theirs["weight"][0].shape[0] == 2 * heads * head_dim
    for name, (q, k, v) in theirs.items():
        if gate:  # of each head, first the query and then its gate
            q, gates = (x.flatten(0, 1) for x in q.unflatten(0, (heads, 2, head_dim)).unbind(1))
            ours[f"gate.{name}"] = gates
        ours[f"qkv.{name}"] = torch.cat([q, k, v])
    normed = "q_norm.weight" in w
    if normed:
        ours |= {name: w[f"{name}.weight"] + shift for name in ("q_norm", "k_norm")}
    if "sinks" in w:
        ours["sinks"] = w["sinks"]
    per_layer = config.rope_parameters.get(kind, config.rope_parameters)
    scale = getattr(config, "query_pre_attn_scalar", None)
    build = partial(
        Attention,
        head_dim=head_dim,
        heads=heads,
        queries_per_kv=heads // kv_heads,
        position=_rotary(per_layer, config),
        qk_norm=None if not normed else "head" if w["q_norm.weight"].numel() == head_dim else "all",
        bias="bias" in theirs,
        window=config.sliding_window if kind == "sliding_attention" else None,
        sinks="sinks" in w,
        gate=gate,
        scale=None if scale is None else scale**-0.5,
        norm_eps=norm_eps(config),
    )
    return build, ours


def _latent_attention(config, w: Weights) -> Part:
    if config.attention_bias:
        raise ValueError("latent attention with biases is not supported")
    rope = dict(config.rope_parameters)
    # DeepSeek's YaRN leaves queries and keys as long as they are and scales the scores instead, by this twice.
    all_dim, factor = rope.pop("mscale_all_dim", None), rope.get("factor")
    mscale = rope.pop("mscale", None)
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if rope["rope_type"] == "yarn" and all_dim:
        scale *= _mscale(factor, all_dim) ** 2
        if mscale:
            rope["attention_factor"] = _mscale(factor, mscale) / _mscale(factor, all_dim)
    build = partial(
        LatentAttention,
        head_dim=config.v_head_dim,
        heads=config.num_attention_heads,
        position=_rotary(rope | {"partial_rotary_factor": 1.0}, config, getattr(config, "rope_interleave", True)),
        kv_rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        scale=scale,
    )
    names = {"kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up", "o_proj": "out_proj"}
    names |= {"q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up", "q_proj": "q_up"}
    ours = {f"{ours}.weight": w[f"{theirs}.weight"] for theirs, ours in names.items() if f"{theirs}.weight" in w}
    indexer = under(w, "indexer.")
    return _sparse_attention(config, rope, build, ours, indexer) if indexer else (build, ours)


def _sparse_attention(config, rope: dict, attention: Callable, ours: Weights, w: Weights) -> Part:
    share = config.qk_rope_head_dim / config.index_head_dim
    build = partial(
        SparseAttention,
        attention=attention,
        index_heads=config.index_n_heads,
        index_dim=config.index_head_dim,
        # Its pairs of dimensions are halves, whatever those of the attention are.
        index_position=_rotary(rope | {"partial_rotary_factor": share}, config),
        top_k=config.index_topk,
    )
    names = {"wq_b.weight": "query.weight", "wk.weight": "key.weight", "weights_proj.weight": "weights.weight"}
    names |= {f"k_norm.{kind}": f"key_norm.{kind}" for kind in ("weight", "bias")}
    return build, {f"attention.{name}": x for name, x in ours.items()} | {
        f"indexer.{name}": w[theirs] for theirs, name in names.items()
    }


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _rotary(rope: dict, config, interleaved: bool = False) -> Rotary:
    kind, factor = rope["rope_type"], rope.get("factor")
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    if kind == "default":
        scaling = None
    elif kind == "linear":
        scaling = Linear(factor)
    elif kind == "llama3":
        scaling = Llama3(factor, original, rope["low_freq_factor"], rope["high_freq_factor"])
    elif kind == "yarn":
        if rope.get("mscale") or rope.get("mscale_all_dim"):
            raise ValueError("YaRN with mscale is not supported")
        beta_fast, beta_slow = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
        magnitude, truncate = rope.get("attention_factor"), rope.get("truncate", True)
        scaling = Yarn(factor, original, beta_fast, beta_slow, magnitude, truncate)
    else:
        raise ValueError(f"rope_type {kind!r} is not supported; these are: default, linear, llama3, yarn")
    layout = "interleaved" if interleaved else "halves"
    return Rotary(rope["rope_theta"], rope.get("partial_rotary_factor", 1.0), layout, scaling)


def _gated_delta(config, w: Weights) -> Part:
    key_heads, heads = config.linear_num_key_heads, config.linear_num_value_heads
    K, V, shared = config.linear_key_head_dim, config.linear_value_head_dim, heads // key_heads
    build = partial(
        GatedDelta,
        head_dim=V,
        heads=heads,
        key_dim=K,
        value_heads_per_key_head=shared,
        conv_width=config.linear_conv_kernel_dim,
        norm_eps=norm_eps(config),
    )
    # Their rows go by key head, ours by what they project to.
    qkvz = w["in_proj_qkvz.weight"].unflatten(0, (key_heads, -1)).split([K, K, shared * V, shared * V], dim=1)
    b, a = w["in_proj_ba.weight"].unflatten(0, (key_heads, -1)).split(shared, dim=1)
    return build, {
        "in_proj.weight": torch.cat([rows.flatten(0, 1) for rows in (*qkvz, a, b)]),
        "conv_weight": w["conv1d.weight"][:, 0],
        "A_log": w["A_log"],
        "dt_bias": w["dt_bias"],
        "norm.weight": w["norm.weight"],
        "out_proj.weight": w["out_proj.weight"],
    }


def _short_conv(config, w: Weights) -> Part:
    if config.conv_bias:
        raise ValueError("a gated short convolution with biases is not supported")
    names = {"in_proj.weight": w["in_proj.weight"], "out_proj.weight": w["out_proj.weight"]}
    return partial(ShortConv, conv_width=config.conv_L_cache), names | {"conv_weight": w["conv.weight"][:, 0]}


def _mamba2(config, w: Weights) -> Part:
    def setting(*names):
        return next(getattr(config, name) for name in names if hasattr(config, name))

    biased = "in_proj.bias" in w
    build = partial(
        Mamba2,
        head_dim=setting("mamba_d_head", "head_dim"),
        heads=setting("mamba_n_heads", "num_heads"),
        state_size=setting("mamba_d_state", "state_size"),
        groups=setting("mamba_n_groups", "n_groups"),
        conv_width=w["conv1d.weight"].shape[-1],
        conv_bias="conv1d.bias" in w,
        bias=biased,
        norm_eps=norm_eps(config),
        dt_limit=getattr(config, "time_step_limit", (0.0, float("inf"))),
    )
    ours = {name: w[name] for name in ("A_log", "D", "dt_bias", "in_proj.weight", "out_proj.weight")}
    ours |= {name: w[name] for name in ("in_proj.bias", "out_proj.bias") if biased}
    ours |= {"conv_weight": w["conv1d.weight"][:, 0], "norm_weight": w["norm.weight"]}
    if "conv1d.bias" in w:
        ours["conv_bias"] = w["conv1d.bias"]
    return build, ours
