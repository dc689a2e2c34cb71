"""Adapters in the files of peft, adapter_config.json and adapter_model.safetensors, whose modules have our names.

    save(model, "tuned")
    peft.PeftModel.from_pretrained(base, "tuned")   # base: the model before it was adapted

A stack of experts is one of peft's `target_parameters`: the A of all experts one under the other, [experts * rank, in],
and B [out, rank * experts], in which the columns of one expert stand `experts` apart (peft 0.19.1 and newer).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from archs.adapters import LAYERS, LoRA, adapted_layers
from archs.channels.experts import ExpertLinear
from archs.checkpoints import files
from archs.language_model import LanguageModel

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What peft can do besides, and `LoRA` does not.
PLAIN = {"peft_type": "LORA", "bias": "none", "use_dora": False, "fan_in_fan_out": False, "modules_to_save": None}
PLAIN |= {"rank_pattern": {}, "alpha_pattern": {}, "layers_to_transform": None}


def save(model: LanguageModel, folder: str | Path) -> None:
    """Write the adapters of a model; those in the folder are replaced.

    Raises:
        ValueError: for a model without adapters.
    """
    layers = adapted_layers(model)
    first = next(iter(layers.values()))
    rank = first.lora_A.out_features
    # As alpha / rank, whichever of the two scales it was.
    config = PLAIN | _targets(layers) | {"r": rank, "lora_alpha": first.scale * rank, "use_rslora": False}
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.lora_A.weight, layer.lora_B.weight
        if isinstance(layer, ExpertLinear):
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
        a_name, b_name = _names(name)
        tensors |= {a_name: A.detach(), b_name: B.detach()}
    files.write_folder(Path(folder), config, tensors, CONFIG, WEIGHTS)


@torch.no_grad()
def load(model: LanguageModel, folder: str | Path) -> None:
    """Give a model without adapters those of a folder, in place.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: for adapters of a kind, of layers or of sizes that `LoRA` does not give to this model, or a model
            that has adapters.
    """
    path = Path(folder) / CONFIG
    config = files.read_json(path)
    for name, wanted in PLAIN.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{path}: {name} is {config[name]!r}, and {wanted!r} alone is supported")
    scale = "rank_stabilised" if config.get("use_rslora") else "standard"
    adapters = [LoRA(config.get("r", 0), config.get("lora_alpha", 0), scale, layers) for layers in LAYERS]
    named = {kind: set(config.get(kind) or ()) for kind in ("target_modules", "target_parameters")}
    fitting = [x for x in adapters if {kind: set(t) for kind, t in _targets(x.chosen(model)).items()} == named]
    if not fitting:
        raise ValueError(f"{path} names other layers of this model than all, its mixers' or its channels'")
    tensors = load_file(path.with_name(WEIGHTS))
    fitting[0].adapt(model)
    for name, layer in adapted_layers(model).items():
        A, B = layer.lora_A.weight, layer.lora_B.weight
        down, up = (tensors.get(key) for key in _names(name))
        expected = (A.numel() // A.shape[-1], A.shape[-1]), (B.shape[-2], B.numel() // B.shape[-2])
        if down is None or up is None or (tuple(down.shape), tuple(up.shape)) != expected:
            raise ValueError(f"{path.with_name(WEIGHTS)} has no matrices {expected[0]} and {expected[1]} of {name}")
        if isinstance(layer, ExpertLinear):
            up = up.unflatten(1, (-1, len(B))).permute(2, 0, 1)
        A.copy_(down.view_as(A))
        B.copy_(up)


def _names(layer: str) -> tuple[str, str]:
    """Of A and of B in the file."""
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def _targets(layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The names by which peft finds these layers."""
    experts = [name for name, layer in layers.items() if isinstance(layer, ExpertLinear)]
    return {
        "target_modules": [name for name in layers if name not in experts],
        "target_parameters": [f"{name}.weight" for name in experts],
    }
