"""gpt-oss, with experts in plain numbers and not in MXFP4 (OpenAI, arXiv 2508.10925)."""

from functools import partial

from torch import Tensor

from archs.channels.moe import MoE
from archs.checkpoints.assembly import Blueprint, Layer, Part, assemble
from archs.checkpoints.parts import FULL, FULL_OR_SLIDING, PRE_NORMS, SLIDING, attention, heads_of, windows_of
from archs.checkpoints.rope import rope_parameters, rotary
from archs.checkpoints.rules import one, same
from archs.checkpoints.settings import Settings

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, depth = settings.take("hidden_size"), settings.count("num_hidden_layers")
    kinds = settings.layer_types([FULL if i % 2 else SLIDING for i in range(depth)], FULL_OR_SLIDING)
    windows = windows_of(settings, kinds)
    rope = rope_parameters(settings, base=150000.0, default=YARN)
    heads, bias = heads_of(settings, width), settings.take("attention_bias", True)
    position = rotary(settings, rope, heads.head_dim)
    of_kind = {
        kind: attention(heads, position=position, bias=bias, window=windows[kind], sinks=True) for kind in set(kinds)
    }
    settings.only("hidden_act", "silu")
    settings.only("swiglu_alpha", 1.702)
    settings.only("swiglu_limit", 7.0)
    settings.ignore("output_router_logits", "router_aux_loss_coef", "initial_context_length")
    count = settings.count("num_local_experts")
    top_k = settings.count("num_experts_per_tok", most=count)
    settings.same("experts_per_token", top_k, "num_experts_per_tok")
    channel = _experts(count, top_k, settings.take("intermediate_size"))
    layers = [Layer(of_kind[kind], channel, PRE_NORMS) for kind in kinds]
    return assemble(settings, layers, width, eps=settings.take("rms_norm_eps", 1e-5), tied=False)


def _experts(experts: int, top_k: int, hidden: int) -> Part:
    build = partial(
        MoE,
        experts=experts,
        top_k=top_k,
        activation="clamped_silu",
        gated=True,
        hidden=hidden,
        bias=True,
        gate="softmax",
        normalise=True,
    )
    rules = [same(f"router.linear.{kind}", f"router.{kind}") for kind in ("weight", "bias")]
    rules += [
        one("gate_up.weight", "experts.gate_up_proj", lambda x: _apart(x.mT), lambda x: _in_turns(x).mT),
        one("gate_up.bias", "experts.gate_up_proj_bias", _apart, _in_turns),
        one("out_proj.weight", "experts.down_proj", lambda x: x.mT, lambda x: x.mT),
        same("out_proj.bias", "experts.down_proj_bias"),
    ]
    return Part("mlp", build, rules)


def _apart(x: Tensor) -> Tensor:
    """[E, 2 H, ...] with gate and up in turns -> all gates, then all ups."""
    return x.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


def _in_turns(x: Tensor) -> Tensor:
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
