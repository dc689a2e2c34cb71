"""Llama 1 to 3.3 and the many models of its layout (Llama Team, arXiv 2407.21783)."""

from archs.checkpoints.assembly import Blueprint, Layer, assemble
from archs.checkpoints.parts import PRE_NORMS, attention, gated_mlp, heads_of
from archs.checkpoints.rope import rope_parameters, rotary
from archs.checkpoints.settings import Settings


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width = settings.take("hidden_size")
    heads = heads_of(settings, width, optional=("num_key_value_heads", "head_dim"))
    position = rotary(settings, rope_parameters(settings), heads.head_dim)
    mixer = attention(heads, position=position, bias=settings.take("attention_bias", False))
    channel = gated_mlp(
        settings.take("intermediate_size"),
        settings.activation("hidden_act", "silu"),
        bias=settings.take("mlp_bias", False),
    )
    settings.ignore("pretraining_tp", "is_llama_config")
    settings.only("rope_interleaved", False)
    layers = [Layer(mixer, channel, PRE_NORMS)] * settings.count("num_hidden_layers")
    return assemble(settings, layers, width, eps=settings.take("rms_norm_eps", 1e-6), tied=False)
