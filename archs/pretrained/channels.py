"""Channels of public models: what builds ours, and their weights under our names."""

from functools import partial

import torch

from archs.channels.mlp import MLP
from archs.channels.moe import MoE
from archs.pretrained.layer import Part, Weights, under

ACTIVATIONS = {"silu": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ACTIVATIONS |= {"relu2": "relu2"}


def _activation(config) -> str:
    if config.model_type == "lfm2":
        return "silu"
    for setting in ("hidden_act", "hidden_activation", "activation_function"):
        if (name := getattr(config, setting, None)) is not None:
            if name not in ACTIVATIONS:
                raise ValueError(f"activation {name!r} is not supported; these are: {', '.join(ACTIVATIONS)}")
            return ACTIVATIONS[name]
    raise ValueError(f"the config of this {config.model_type} names no activation")


def channel_of(config, layer: Weights) -> Part | None:
    w = under(layer, "mlp.") or under(layer, "feed_forward.")
    if not w:
        return None
    if "experts.down_proj" in w:
        deepseek, gpt_oss = "gate.e_score_correction_bias" in w, "router.bias" in w
        return (_deepseek_moe if deepseek else _gpt_oss_moe if gpt_oss else _moe)(config, w)
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
    shared = under(w, "shared_expert.")
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
    ours |= {f"shared.{name}": x for name, x in _gated(under(w, "shared_experts.")).items()}
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
