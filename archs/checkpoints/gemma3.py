"""Gemma 3, the text models (Gemma Team, arXiv 2503.19786)."""

from archs.checkpoints.assembly import Blueprint, Ends, Layer, assemble
from archs.checkpoints.parts import FULL, FULL_OR_SLIDING, SLIDING, attention, gated_mlp, heads_of, windows_of
from archs.checkpoints.rope import rope_of_layer_types, rotary
from archs.checkpoints.settings import Settings

SHIFT = 1.0  # the weights of norms are stored less one
NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "channel_norm": "pre_feedforward_layernorm",
    "channel_post_norm": "post_feedforward_layernorm",
}


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, depth = settings.take("hidden_size"), settings.count("num_hidden_layers")
    every = settings.take("sliding_window_pattern", 6)
    kinds = settings.layer_types([SLIDING if (i + 1) % every else FULL for i in range(depth)], FULL_OR_SLIDING)
    windows = windows_of(settings, kinds)
    for name in ("use_bidirectional_attention", "final_logit_softcapping", "attn_logit_softcapping"):
        settings.only(name, None, False)
    settings.ignore("_sliding_window_pattern", "cache_implementation")
    heads, eps = heads_of(settings, width), settings.take("rms_norm_eps", 1e-6)
    bases = {
        FULL: settings.take("rope_theta", 1e6),
        SLIDING: settings.take("rope_local_base_freq", 1e4),
    }
    ropes = rope_of_layer_types(settings, bases)
    bias, scale = settings.take("attention_bias", False), settings.take("query_pre_attn_scalar", 256) ** -0.5
    of_kind = {
        kind: attention(
            heads,
            position=rotary(settings, ropes[kind], heads.head_dim),
            bias=bias,
            window=windows[kind],
            qk_norm="head",
            norm_eps=eps,
            shift=SHIFT,
            scale=scale,
        )
        for kind in set(kinds)
    }
    channel = gated_mlp(
        settings.take("intermediate_size"), settings.activation("hidden_activation", "gelu_pytorch_tanh")
    )
    layers = [Layer(of_kind[kind], channel, NORMS) for kind in kinds]
    ends = Ends(shift=SHIFT, scale=width**0.5)
    return assemble(settings, layers, width, eps=eps, tied=True, ends=ends, norm_at="both")
