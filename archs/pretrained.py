"""Weights of public implementations, as a LanguageModel: what proves the architectures, and a way to start from them.

A model is read layer by layer: what a layer's tensors are called says which parts it has, and the config says how they
are set. What a family does by a factor (scaled embeddings, norm weights stored less one) is folded into the weights, so
that the LanguageModel needs no option for it.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from archs.channels.mlp import MLP
from archs.channels.moe import MoE
from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from archs.mixers.gated_delta import GatedDelta
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.mamba2 import Mamba2
from archs.positions import Linear, Llama3, Rotary, Yarn

Weights = dict[str, Tensor]
Part = tuple[Callable[[int], nn.Module], Weights]  # what builds a mixer or channel, and its weights

ACTIVATIONS = {"silu": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ACTIVATIONS |= {"relu2": "relu2"}
# Name of (the norms before mixer and channel, the norms after them) in a layer.
PRE = ("input_layernorm", "post_attention_layernorm"), None
NORMS = {
    "bamba": (("input_layernorm", "pre_ff_layernorm"), None),
    "deepseek_v3": PRE,
    "gemma3_text": (
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": (("ln_1", "ln_2"), None),
    "gpt_oss": PRE,
    "llama": PRE,
    "mamba2": (("norm", None), None),
    "olmo3": (None, ("post_attention_layernorm", "post_feedforward_layernorm")),
    "qwen3": PRE,
    "qwen3_moe": PRE,
    "qwen3_next": PRE,
}
SUPPORTED = tuple(NORMS)


def from_pretrained(path: str | Path) -> LanguageModel:
    """The LanguageModel of a checkpoint in a local folder (config.json and safetensors, sharded or not). Reading it
    takes `transformers`, which is not among the project's own requirements.

    Raises:
        FileNotFoundError: there is no config.json in the folder.
        ValueError: for a type of model that is not supported.
    """
    if not (Path(path) / "config.json").exists():
        raise FileNotFoundError(f"{path} holds no config.json: give the folder of a downloaded checkpoint")
    from transformers import AutoConfig, AutoModelForCausalLM

    check_supported(AutoConfig.from_pretrained(path, local_files_only=True))
    return from_transformers(AutoModelForCausalLM.from_pretrained(path, local_files_only=True))


def check_supported(config) -> None:
    if config.model_type not in SUPPORTED:
        raise ValueError(f"model type {config.model_type!r} is not supported; these are: {', '.join(SUPPORTED)}")


@torch.no_grad()
def from_transformers(model: nn.Module) -> LanguageModel:
    """The LanguageModel that computes the same logits as a causal language model of `transformers`, with copies of its
    weights in their dtype.

    Raises:
        ValueError: for a type of model, or a setting in its config, that is not supported.
    """
    config = model.config
    check_supported(config)
    kind, width = config.model_type, config.hidden_size
    shift = 1.0 if kind in ("gemma3_text", "qwen3_next") else 0.0  # norm weights stored less one
    layers, ends = _split(model.state_dict())
    eps = getattr(config, "rms_norm_eps", None) or config.layer_norm_epsilon
    norm = partial(nn.LayerNorm if kind == "gpt2" else nn.RMSNorm, eps=eps)
    before, after = NORMS[kind]

    weights, pattern, mixers, channels = {}, [], {}, {}
    for i, layer in enumerate(layers):
        mixer, channel = _mixer(config, layer, i, shift), _channel(config, layer)
        mixers[f"mixer{i}"], parts = mixer[0], {"mixer": mixer[1]}
        if channel is not None:
            channels[f"channel{i}"], parts["channel"] = channel
        pattern.append(f"mixer{i}+channel{i}" if channel is not None else f"mixer{i}")
        norms = {}
        for names, place in ((before, "norm"), (after, "post_norm")):
            for part, name in zip(parts, names or (), strict=False):
                tensors = _under(layer, f"{name}.")
                norms[f"{part}_{place}"] = {key: x + shift if key == "weight" else x for key, x in tensors.items()}
        weights |= {
            f"blocks.{i}.{part}.{key}": x for part, tensors in (parts | norms).items() for key, x in tensors.items()
        }

    ours = LanguageModel(
        ends["embedding"].shape[0],
        width,
        pattern,
        mixers,
        channels,
        depth=len(layers),
        tied=config.tie_word_embeddings,
        norm=norm,
        norm_at="both" if before and after else "post" if after else "pre",
        max_length=config.n_positions if kind == "gpt2" else None,
    ).to(ends["embedding"].dtype)
    scale = width**0.5 if kind == "gemma3_text" else 1.0
    weights["embedding.weight"] = ends["embedding"] * scale
    # A tied head divides by the width; what the embedding was scaled by is taken back there too.
    unscale = width / scale if ours.tied else 1.0
    weights["norm.weight"] = (ends["norm"] + shift) * unscale
    if kind == "gpt2":
        weights["norm.bias"] = ends["norm_bias"] * unscale
        weights["positions.weight"] = ends["positions"]
    weights["head.weight"] = weights["embedding.weight"] if ours.tied else ends["head"]
    ours.load_state_dict(weights)
    return ours.eval()


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def _split(weights: Weights) -> tuple[list[Weights], Weights]:
    """The tensors of each layer, and those outside the layers under one set of names."""
    weights = {name.partition(".")[2] if not name.startswith("lm_head") else name: x for name, x in weights.items()}
    aliases = {
        "embedding": ("embed_tokens.weight", "embeddings.weight", "wte.weight"),
        "norm": ("norm.weight", "norm_f.weight", "final_layernorm.weight", "ln_f.weight"),
        "norm_bias": ("ln_f.bias",),
        "positions": ("wpe.weight",),
        "head": ("lm_head.weight",),
    }
    ends = {ours: weights[name] for ours, names in aliases.items() for name in names if name in weights}
    stem = "h." if "wpe.weight" in weights else "layers."
    inside = _under(weights, stem)
    count = 1 + max(int(name.partition(".")[0]) for name in inside)
    return [_under(inside, f"{i}.") for i in range(count)], ends


def _mixer(config, layer: Weights, i: int, shift: float) -> Part:
    if attention := _under(layer, "attn."):
        return _gpt2_attention(config, attention)
    if attention := _under(layer, "self_attn."):
        latent = "kv_b_proj.weight" in attention
        return _latent_attention(config, attention) if latent else _attention(config, attention, i, shift)
    if delta := _under(layer, "linear_attn."):
        return _gated_delta(config, delta)
    return _mamba2(config, _under(layer, "mamba.") or _under(layer, "mixer."))


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
        norm_eps=config.rms_norm_eps,
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
        position=_rotary(rope | {"partial_rotary_factor": 1.0}, config, config.rope_interleave),
        kv_rank=config.kv_lora_rank,
        q_rank=config.q_lora_rank,
        nope_dim=config.qk_nope_head_dim,
        rope_dim=config.qk_rope_head_dim,
        scale=scale,
    )
    names = {"kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up", "o_proj": "out_proj"}
    names |= {"q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up", "q_proj": "q_up"}
    return build, {f"{ours}.weight": w[f"{theirs}.weight"] for theirs, ours in names.items() if f"{theirs}.weight" in w}


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
        norm_eps=config.rms_norm_eps,
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
        norm_eps=setting("rms_norm_eps", "layer_norm_epsilon"),
        dt_limit=getattr(config, "time_step_limit", (0.0, float("inf"))),
    )
    ours = {name: w[name] for name in ("A_log", "D", "dt_bias", "in_proj.weight", "out_proj.weight")}
    ours |= {name: w[name] for name in ("in_proj.bias", "out_proj.bias") if biased}
    ours |= {"conv_weight": w["conv1d.weight"][:, 0], "norm_weight": w["norm.weight"]}
    if "conv1d.bias" in w:
        ours["conv_bias"] = w["conv1d.bias"]
    return build, ours


def _activation(config) -> str:
    for setting in ("hidden_act", "hidden_activation", "activation_function"):
        if (name := getattr(config, setting, None)) is not None:
            if name not in ACTIVATIONS:
                raise ValueError(f"activation {name!r} is not supported; these are: {', '.join(ACTIVATIONS)}")
            return ACTIVATIONS[name]
    raise ValueError(f"the config of this {config.model_type} names no activation")


def _channel(config, layer: Weights) -> Part | None:
    w = _under(layer, "mlp.") or _under(layer, "feed_forward.")
    if not w:
        return None
    if "experts.down_proj" in w:
        return {"gpt_oss": _gpt_oss_moe, "deepseek_v3": _deepseek_moe}.get(config.model_type, _moe)(config, w)
    if config.model_type == "gpt2":
        names = {"c_fc": "gate_up", "c_proj": "out_proj"}
        ours = {f"{o}.{kind}": w[f"{t}.{kind}"].t() for t, o in names.items() for kind in ("weight", "bias")}
        hidden = len(ours["gate_up.bias"])
        return partial(MLP, activation=_activation(config), gated=False, hidden=hidden, bias=True), ours
    ours = _gated(w)
    hidden = ours["gate_up.weight"].shape[0] // 2
    bias = "gate_up.bias" in ours
    return partial(MLP, activation=_activation(config), gated=True, hidden=hidden, bias=bias), ours


def _gated(w: Weights) -> Weights:
    kinds = [kind for kind in ("weight", "bias") if f"up_proj.{kind}" in w]
    ours = {f"gate_up.{kind}": torch.cat([w[f"gate_proj.{kind}"], w[f"up_proj.{kind}"]]) for kind in kinds}
    return ours | {f"out_proj.{kind}": w[f"down_proj.{kind}"] for kind in kinds}


def _moe(config, w: Weights) -> Part:
    ours = {
        "router.linear.weight": w["gate.weight"],
        "gate_up.weight": w["experts.gate_up_proj"],
        "out_proj.weight": w["experts.down_proj"],
    }
    shared = _under(w, "shared_expert.")
    if shared:
        ours |= {f"shared.{name}": x for name, x in _gated(shared).items()}
        ours["shared_gate.weight"] = w["shared_expert_gate.weight"]
    build = partial(
        MoE,
        experts=len(w["gate.weight"]),
        top_k=config.num_experts_per_tok,
        activation=_activation(config),
        gated=True,
        hidden=w["experts.down_proj"].shape[-1],
        shared=int(bool(shared)),
        shared_hidden=shared["down_proj.weight"].shape[-1] if shared else None,
        shared_gate=bool(shared),
        gate="softmax",
        normalise=config.norm_topk_prob,
    )
    return build, ours


def _gpt_oss_moe(config, w: Weights) -> Part:
    if getattr(config, "swiglu_limit", 7.0) != 7.0:
        raise ValueError(f"gpt_oss with swiglu_limit={config.swiglu_limit} is not supported; 7 is")
    build = partial(
        MoE,
        experts=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        activation="clamped_silu",
        gated=True,
        hidden=w["experts.down_proj"].shape[1],
        bias=True,
        gate="softmax",
        normalise=True,
    )
    # Theirs are transposed, gate and up in turns; ours has all gates first.
    gate_up = w["experts.gate_up_proj"].mT
    gate_up_bias = w["experts.gate_up_proj_bias"]
    return build, {
        "router.linear.weight": w["router.weight"],
        "router.linear.bias": w["router.bias"],
        "gate_up.weight": torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1),
        "gate_up.bias": torch.cat([gate_up_bias[:, 0::2], gate_up_bias[:, 1::2]], dim=1),
        "out_proj.weight": w["experts.down_proj"].mT,
        "out_proj.bias": w["experts.down_proj_bias"],
    }


def _deepseek_moe(config, w: Weights) -> Part:
    ours = {
        "router.linear.weight": w["gate.weight"],
        "router.choice_bias": w["gate.e_score_correction_bias"],
        "gate_up.weight": w["experts.gate_up_proj"],
        "out_proj.weight": w["experts.down_proj"],
    }
    ours |= {f"shared.{name}": x for name, x in _gated(_under(w, "shared_experts.")).items()}
    build = partial(
        MoE,
        experts=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        activation=_activation(config),
        gated=True,
        hidden=config.moe_intermediate_size,
        shared=config.n_shared_experts,
        gate="sigmoid",
        normalise=config.norm_topk_prob,
        route_scale=config.routed_scaling_factor,
        groups=config.n_group,
        group_limit=config.topk_group,
        bias_update_rate=1e-3,
    )
    return build, ours
