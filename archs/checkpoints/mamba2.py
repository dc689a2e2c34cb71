"""Mamba-2 as published for transformers, such as Mamba-Codestral (Dao and Gu, arXiv 2405.21060)."""

from functools import partial

from archs.checkpoints.assembly import Blueprint, Ends, Layer, Part, assemble
from archs.checkpoints.rules import same, taps
from archs.checkpoints.settings import Settings
from archs.mixers.mamba2 import Mamba2


def blueprint(settings: Settings, names: frozenset[str]) -> Blueprint:
    width, eps = settings.take("hidden_size"), settings.take("layer_norm_epsilon", 1e-5)
    mixer = mamba2_mixer(
        settings,
        width,
        eps,
        name="mixer",
        heads=settings.take("num_heads"),
        head_dim=settings.take("head_dim"),
        expand="expand",
        state_size=settings.take("state_size"),
        groups=settings.take("n_groups"),
        conv_width=settings.take("conv_kernel", 4),
        conv_bias=settings.take("use_conv_bias", True),
        bias=settings.take("use_bias", False),
    )
    # Chunks and the precision of the residual stream are matters of rounding, the others of training; the norm comes
    # after the gate in the public implementation, whatever norm_before_gate says.
    settings.ignore("chunk_size", "residual_in_fp32", "norm_before_gate")
    settings.ignore("rescale_prenorm_residual", "intermediate_size")
    settings.ignore(*(f"time_step_{x}" for x in ("floor", "init_scheme", "max", "min", "rank", "scale")))
    settings.only("rms_norm", True)
    layers = [Layer(mixer, None, {"mixer_norm": "norm"})] * settings.count("num_hidden_layers")
    ends = Ends("backbone.", embedding="embeddings", norm="norm_f")
    return assemble(settings, layers, width, eps=eps, tied=False, ends=ends)


def mamba2_mixer(settings: Settings, width: int, eps: float, *, name: str, expand: str, **options) -> Part:
    """The mixer `name` of Mamba-2 and of the hybrids with it. expand: the field of the factor that the heads fill;
    options: further ones of `Mamba2`."""
    inner = options["heads"] * options["head_dim"]
    if settings.take(expand, 2) * width != inner:
        settings.refuse(expand, f"the {inner} channels of all heads over hidden_size={width} is")
    settings.only("hidden_act", "silu", "swish")
    limit = [float(x["__float__"] if isinstance(x, dict) else x) for x in settings.take("time_step_limit", [0, "inf"])]
    build = partial(Mamba2, norm_eps=eps, dt_limit=tuple(limit), **options)
    rules = [same(x, x) for x in ("A_log", "D", "dt_bias", "in_proj.weight", "out_proj.weight")]
    rules += [same(x, x) for x in ("in_proj.bias", "out_proj.bias") if options["bias"]]
    rules += [taps("conv_weight", "conv1d.weight"), same("norm_weight", "norm.weight")]
    rules += [same("conv_bias", "conv1d.bias")] if options["conv_bias"] else []
    return Part(name, build, rules)
