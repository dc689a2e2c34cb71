"""Bamba: Mamba-2 with attention layers among it (IBM, 2024)."""

from archs.checkpoints.assembly import Blueprint, Ends, Layer, assemble
from archs.checkpoints.mamba2 import mamba2_mixer
from archs.checkpoints.parts import attention, gated_mlp, heads_of
from archs.checkpoints.rope import rope_parameters, rotary
from archs.checkpoints.settings import Settings


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, eps = settings.take("hidden_size"), settings.take("rms_norm_eps", 1e-5)
    heads = heads_of(settings, width, optional=("head_dim",))
    settings.only("partial_rotary_factor", 0.5)  # outside of rope_parameters the public implementation knows no other
    position = rotary(settings, rope_parameters(settings, fraction=0.5), heads.head_dim, partial=True)
    settings.same("attn_rotary_emb", round(position.fraction * heads.head_dim), "partial_rotary_factor")
    full = attention(heads, position=position, bias=settings.take("attention_bias", False))
    count, head_dim = settings.take("mamba_n_heads"), settings.take("mamba_d_head", "auto")
    mamba = mamba2_mixer(
        settings,
        width,
        eps,
        name="mamba",
        heads=count,
        head_dim=settings.take("mamba_expand", 2) * width // count if head_dim == "auto" else head_dim,
        expand="mamba_expand",
        state_size=settings.take("mamba_d_state"),
        groups=settings.take("mamba_n_groups", 1),
        conv_width=settings.take("mamba_d_conv", 4),
        conv_bias=settings.take("mamba_conv_bias", True),
        bias=settings.take("mamba_proj_bias", False),
    )
    bias = settings.take("mlp_bias", False)
    mlp = gated_mlp(settings.take("intermediate_size"), "silu", bias=bias, name="feed_forward")
    settings.ignore("mamba_chunk_size", "num_logits_to_keep", "z_loss_coefficient")
    with_attention = settings.take("attn_layer_indices", None) or []
    norms = {"mixer_norm": "input_layernorm", "channel_norm": "pre_ff_layernorm"}
    depth = settings.count("num_hidden_layers")
    layers = [Layer(full if i in with_attention else mamba, mlp, norms) for i in range(depth)]
    return assemble(settings, layers, width, eps=eps, tied=False, ends=Ends(norm="final_layernorm"))
