"""LFM2: gated short convolutions with attention layers among them (Liquid AI, arXiv 2511.23404)."""

from functools import partial

from archs.checkpoints.assembly import Blueprint, Ends, Layer, Part, assemble
from archs.checkpoints.parts import attention, gated_mlp, heads_of
from archs.checkpoints.rope import rope_parameters, rotary
from archs.checkpoints.rules import same, taps
from archs.checkpoints.settings import Settings
from archs.mixers.short_convolution import ShortConvolution

KINDS = {"full_attention": "full", "attention": "full", "conv": "conv"}


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, depth = settings.take("hidden_size"), settings.count("num_hidden_layers")
    full = settings.take("full_attn_idxs", None)
    kinds = settings.layer_types(
        ["full_attention" if full is None or i in full else "conv" for i in range(depth)], KINDS
    )
    heads, eps = heads_of(settings, width, optional=("head_dim",)), settings.take("norm_eps", 1e-5)
    position = rotary(settings, rope_parameters(settings, base=1e6), heads.head_dim)
    norms = "q_layernorm", "k_layernorm"
    settings.only("conv_bias", False)
    convolution = Part(
        "conv",
        partial(ShortConvolution, conv_width=settings.take("conv_L_cache", 3)),
        [same("in_proj.weight", "in_proj.weight"), same("out_proj.weight", "out_proj.weight")]
        + [taps("conv_weight", "conv.weight")],
    )
    of_kind = {
        "full": attention(heads, position=position, qk_norm="head", norm_eps=eps, out="out_proj", norms=norms),
        "conv": convolution,
    }
    _older_names(settings, width, heads.count, eps)
    mlp = gated_mlp(_hidden(settings), "silu", name="feed_forward", names=("w1", "w3", "w2"))
    layers = [Layer(of_kind[kind], mlp, {"mixer_norm": "operator_norm", "channel_norm": "ffn_norm"}) for kind in kinds]
    tied = settings.take("tie_embedding", True)
    if settings.take("tie_word_embeddings", tied) != tied and "tie_embedding" in settings.fields:
        settings.refuse("tie_word_embeddings", f"the same as tie_embedding={tied} is")
    return assemble(settings, layers, width, eps=eps, tied=tied, ends=Ends(norm="embedding_norm"))


def _hidden(settings: Settings) -> int:
    """The hidden width of the channels."""
    hidden = settings.take("block_ff_dim" if "block_ff_dim" in settings.fields else "intermediate_size")
    settings.ignore("intermediate_size")
    multiple, factor = settings.take("block_multiple_of", 256), settings.take("block_ffn_dim_multiplier", 1.0)
    if not settings.take("block_auto_adjust_ff_dim", True):
        return hidden
    return -(-int(factor * int(2 * hidden / 3)) // multiple) * multiple


def _older_names(settings: Settings, width: int, heads: int, eps: float) -> None:
    """Fields of the first releases that say again what others do, or how training began."""
    for name in ("block_dim", "conv_dim", "conv_dim_out"):
        settings.same(name, width, "hidden_size")
    settings.same("num_heads", heads, "num_attention_heads")
    settings.same("block_norm_eps", eps, "norm_eps")
    for name in ("block_use_swiglu", "use_pos_enc"):
        settings.only(name, True)
    settings.ignore("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init")
