"""Weights of public implementations, as a LanguageModel: what proves the architectures, and a way to start from them.

A model is read layer by layer: what a layer's tensors are called says which parts it has, and the config says how they
are set. What a family does by a factor (scaled embeddings, norm weights stored less one) is folded into the weights, so
that the LanguageModel needs no option for it.
"""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from archs.language_model import LanguageModel
from archs.pretrained.channels import channel_of
from archs.pretrained.layer import Weights, norm_eps, under
from archs.pretrained.mixers import mixer_of

# Name of (the norms before mixer and channel, the norms after them) in a layer.
PRE = ("input_layernorm", "post_attention_layernorm"), None
NORMS = {
    "bamba": (("input_layernorm", "pre_ff_layernorm"), None),
    "deepseek_v3": PRE,
    "deepseek_v32": PRE,
    "gemma3_text": (
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": (("ln_1", "ln_2"), None),
    "gpt_oss": PRE,
    "lfm2": (("operator_norm", "ffn_norm"), None),
    "llama": PRE,
    "mamba2": (("norm", None), None),
    "olmo3": (None, ("post_attention_layernorm", "post_feedforward_layernorm")),
    "qwen3": PRE,
    "qwen3_moe": PRE,
    "qwen3_next": PRE,
}
SUPPORTED = tuple(NORMS)
# LFM2's names for what the others call otherwise.
SAME = {"self_attn.out_proj": "self_attn.o_proj", "_layernorm.": "_norm.", "embedding_norm": "norm"}
SAME |= {"feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}


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
    weights = model.state_dict()
    if kind == "lfm2":
        for theirs, others in SAME.items():
            weights = {name.replace(theirs, others): x for name, x in weights.items()}
    layers, ends = _split(weights)
    norm = partial(nn.LayerNorm if kind == "gpt2" else nn.RMSNorm, eps=norm_eps(config))
    before, after = NORMS[kind]

    weights, pattern, mixers, channels = {}, [], {}, {}
    for i, layer in enumerate(layers):
        mixer, channel = mixer_of(config, layer, i, shift), channel_of(config, layer)
        mixers[f"mixer{i}"], parts = mixer[0], {"mixer": mixer[1]}
        if channel is not None:
            channels[f"channel{i}"], parts["channel"] = channel
        pattern.append(f"mixer{i}+channel{i}" if channel is not None else f"mixer{i}")
        norms = {}
        for names, place in ((before, "norm"), (after, "post_norm")):
            for part, name in zip(parts, names or (), strict=False):
                tensors = under(layer, f"{name}.")
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
    inside = under(weights, stem)
    count = 1 + max(int(name.partition(".")[0]) for name in inside)
    return [under(inside, f"{i}.") for i in range(count)], ends
