"""OLMo 3 (OLMo Team, arXiv 2512.13961)."""

from archs.checkpoints.assembly import Blueprint, Layer, assemble
from archs.checkpoints.parts import FULL, FULL_OR_SLIDING, SLIDING, attention, gated_mlp, heads_of, windows_of
from archs.checkpoints.rope import rope_of_layer_types, rotary
from archs.checkpoints.settings import Settings

NORMS = {"mixer_post_norm": "post_attention_layernorm", "channel_post_norm": "post_feedforward_layernorm"}
THETA = 500000.0


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, depth = settings.take("hidden_size"), settings.count("num_hidden_layers")
    kinds = settings.layer_types([SLIDING if (i + 1) % 4 else FULL for i in range(depth)], FULL_OR_SLIDING)
    windows = windows_of(settings, kinds)
    heads, eps = heads_of(settings, width, ("num_key_value_heads", "head_dim")), settings.take("rms_norm_eps", 1e-5)
    # The public implementation gives another theta to layers of full attention alone.
    settings.only("rope_theta", THETA)
    ropes = rope_of_layer_types(settings, {FULL: THETA, SLIDING: THETA})
    bias = settings.take("attention_bias", False)
    of_kind = {
        kind: attention(
            heads,
            position=rotary(settings, ropes[kind], heads.head_dim),
            bias=bias,
            window=windows[kind],
            qk_norm="all",
            norm_eps=eps,
        )
        for kind in set(kinds)
    }
    channel = gated_mlp(settings.take("intermediate_size"), settings.activation("hidden_act", "silu"))
    layers = [Layer(of_kind[kind], channel, NORMS) for kind in kinds]
    return assemble(settings, layers, width, eps=eps, tied=False, norm_at="post")
