"""Qwen3, dense and as a mixture of experts (Qwen Team, arXiv 2505.09388)."""

from collections.abc import Sequence

from archs.checkpoints.assembly import Blueprint, Layer, Part, assemble
from archs.checkpoints.parts import FULL, FULL_OR_SLIDING, PRE_NORMS, SLIDING, attention, experts, gated_mlp, heads_of
from archs.checkpoints.rope import rope_parameters, rotary
from archs.checkpoints.settings import Settings


def dense_blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, depth = settings.take("hidden_size"), settings.count("num_hidden_layers")
    window, first = _window(settings), settings.take("max_window_layers", 28)
    kinds = settings.layer_types(
        [FULL if window is None or i < first else SLIDING for i in range(depth)], FULL_OR_SLIDING
    )
    if SLIDING in kinds and window is None:
        settings.refuse("layer_types", f"{SLIDING} is with use_sliding_window=True alone")
    of_kind = dict(zip((FULL, SLIDING), _attentions(settings, width, (None, window)), strict=True))
    channel = gated_mlp(settings.take("intermediate_size"), settings.activation("hidden_act", "silu"))
    layers = [Layer(of_kind[kind], channel, PRE_NORMS) for kind in kinds]
    return assemble(settings, layers, width, eps=settings.take("rms_norm_eps", 1e-6), tied=False)


def mixture_blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width = settings.take("hidden_size")
    [mixer] = _attentions(settings, width, [_window(settings)], optional=("head_dim",))
    count = settings.take("num_experts" if "num_experts" in settings.fields else "num_local_experts")
    settings.same("num_local_experts", count, "num_experts")
    channels = sparse_or_dense(settings, names, count, normalise=False)
    settings.only("qkv_bias", False)
    settings.only("use_qk_norm", True)
    settings.only("shared_expert_intermediate_size", 0)
    settings.ignore("max_window_layers", "output_router_logits", "router_aux_loss_coef")
    layers = [Layer(mixer, channel, PRE_NORMS) for channel in channels]
    return assemble(settings, layers, width, eps=settings.take("rms_norm_eps", 1e-6), tied=False)


def _window(settings: Settings) -> int | None:
    """The window of the layers that have one."""
    window = settings.take("sliding_window", None)
    if not settings.take("use_sliding_window", False):
        return None
    if window is None:
        settings.refuse("sliding_window", "a number of tokens is, with use_sliding_window=True")
    return window


def _attentions(
    settings: Settings, width: int, windows: Sequence[int | None], optional: Sequence[str] = ()
) -> list[Part]:
    """The attention of each window."""
    heads = heads_of(settings, width, optional)
    position = rotary(settings, rope_parameters(settings), heads.head_dim)
    bias, eps = settings.take("attention_bias", False), settings.take("rms_norm_eps", 1e-6)
    return [
        attention(heads, position=position, bias=bias, qk_norm="head", norm_eps=eps, window=window)
        for window in windows
    ]


def sparse_or_dense(settings: Settings, names: frozenset[str], count: int, normalise: bool, **shared) -> list[Part]:
    """The channel of each layer: so many experts every so many layers, and dense where they are not. normalise: what it
    means that norm_topk_prob is absent. shared: options of shared experts."""
    activation, step = settings.activation("hidden_act", "silu"), settings.take("decoder_sparse_step", 1)
    only_dense = settings.take("mlp_only_layers", None) or []
    options = {
        "experts": count,
        "hidden": settings.take("moe_intermediate_size"),
        "top_k": settings.count("num_experts_per_tok", most=count or None),
        "normalise": settings.take("norm_topk_prob", normalise),
        "activation": activation,
        "gate": "softmax",
    }
    dense = gated_mlp(settings.take("intermediate_size"), activation)

    def channel(i: int) -> Part:
        if i in only_dense or not count or (i + 1) % step:
            return dense
        return experts(fused=f"model.layers.{i}.mlp.experts.gate_up_proj" in names, **options, **shared)

    return [channel(i) for i in range(settings.count("num_hidden_layers"))]
