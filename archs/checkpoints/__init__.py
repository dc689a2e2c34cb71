"""Checkpoints of public families: read from a folder as a LanguageModel, and written back in the family's own layout.

    model = read("gemma-3-1b")
    ...                                                         # train it
    write(model, "tuned", read_config("gemma-3-1b"))            # transformers loads this folder

A family is one small file: it says what each field of its config.json means, which of our parts its layers are, and how
its tensors become ours. What a family does by a factor (scaled embeddings, norm weights stored less one) is folded into
the weights, so that a model which was read differs in nothing from one that a config built.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from archs.checkpoints import (
    bamba,
    deepseek,
    files,
    gemma3,
    gpt2,
    gpt_oss,
    lfm2,
    llama,
    mamba2,
    olmo3,
    qwen3,
    qwen3_next,
)
from archs.checkpoints.assembly import Blueprint
from archs.checkpoints.likeness import check_likeness
from archs.checkpoints.settings import Settings
from archs.language_model import LanguageModel

# Each makes the Blueprint of a config's settings and the names of the tensors in a file, where there is one.
FAMILIES = {
    "bamba": bamba.blueprint,
    "deepseek_v3": deepseek.v3_blueprint,
    "deepseek_v32": deepseek.v32_blueprint,
    "gemma3_text": gemma3.blueprint,
    "gpt2": gpt2.blueprint,
    "gpt_oss": gpt_oss.blueprint,
    "lfm2": lfm2.blueprint,
    "llama": llama.blueprint,
    "mamba2": mamba2.blueprint,
    "olmo3": olmo3.blueprint,
    "qwen3": qwen3.dense_blueprint,
    "qwen3_moe": qwen3.mixture_blueprint,
    "qwen3_next": qwen3_next.blueprint,
}
SUPPORTED = tuple(FAMILIES)
UNUSED = [r".*rotary_emb\.inv_freq"]  # in files of all families: what follows from the config


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a checkpoint.

    Raises:
        FileNotFoundError: there is none in the folder.
        ValueError: it is no JSON object.
    """
    return files.read_json(Path(folder) / files.CONFIG)


@torch.no_grad()
def read(folder: str | Path, dtype: torch.dtype | None = None) -> LanguageModel:
    """The LanguageModel of a checkpoint in a local folder: config.json and safetensors, sharded or not.

    Nothing in the folder is executed. The weights are on the CPU, the model is in evaluation mode.

    Args:
        folder: of the checkpoint.
        dtype: of the weights; None for that of the file's embedding. Norm weights that a file has less one (Gemma 3,
            Qwen3-Next) lose digits in bfloat16: to train such a model and write it again, read it in float32.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: for a model_type that is not supported, a setting that is not modelled, tensors that are missing,
            unknown or of another shape, or weights that are pickled.
    """
    folder, config = Path(folder), read_config(folder)
    _check_type(config)
    weights = files.Weights(folder)
    blueprint = _blueprint(config, frozenset(weights))
    _check_layout(folder, blueprint, weights)
    model = blueprint.model
    state = blueprint.state_of(weights, weights[blueprint.embedding].dtype if dtype is None else dtype)
    if model.tied:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    if model.tied:
        model.head.weight = model.embedding.weight
    return model.eval()


@torch.no_grad()
def write(
    model: LanguageModel, folder: str | Path, config: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write a model as a checkpoint that `read` and transformers read.

    Args:
        model: one that was read, or any other that is what the config describes.
        folder: made where it is missing; config.json and model.safetensors in it are replaced.
        config: of the family, as `read_config` gives it; its dtype becomes that of the weights.
        dtype: of the weights in the file; None for that of the model's embedding.

    Raises:
        ValueError: for a config that `read` would refuse, or a model that is not what it describes.
    """
    _check_type(config)
    blueprint = _blueprint(config)
    check_likeness(model, blueprint.model, config["model_type"])
    dtype = model.embedding.weight.dtype if dtype is None else dtype
    keys = {"dtype", "torch_dtype"} & config.keys() or {"dtype"}
    config = {**config, **dict.fromkeys(keys, str(dtype).removeprefix("torch."))}
    files.write_folder(Path(folder), config, blueprint.file_of(model.state_dict(), dtype))


def _blueprint(config: Mapping[str, Any], names: frozenset[str] = frozenset()) -> Blueprint:
    """The Blueprint of a config; names: of the tensors in the file, where there is one."""
    settings = Settings(config)
    blueprint = FAMILIES[settings.family](settings, names)
    settings.close()
    return blueprint


def _check_type(config: Mapping[str, Any]) -> None:
    if (kind := config.get("model_type")) not in FAMILIES:
        raise ValueError(f"model type {kind!r} is not supported; these are: {', '.join(SUPPORTED)}")


def _check_layout(folder: Path, blueprint: Blueprint, weights: files.Weights) -> None:
    """
    Raises:
        ValueError: where the tensors of the file are not those that the config asks for.
    """
    shapes = {name: tuple(x.shape) for name, x in blueprint.file_of(blueprint.model.state_dict()).items()}
    unused = re.compile("|".join([*blueprint.unused, *UNUSED]))
    surplus = {name for name in weights.keys() - shapes.keys() if not unused.fullmatch(name)}
    if blueprint.model.tied and "lm_head.weight" in surplus:
        if not torch.equal(weights["lm_head.weight"], weights[blueprint.embedding]):
            raise ValueError(f"{folder}: lm_head.weight is not the embedding, which its config.json says it is")
        surplus.remove("lm_head.weight")
    for problem, names in (("lacks", shapes.keys() - weights.keys()), ("has no place for", surplus)):
        if names:
            listed = ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"{folder}: what config.json describes {problem} {listed}")
    for name, shape in shapes.items():
        if weights.shape(name) != shape:
            raise ValueError(f"{folder}: {name} is {list(weights.shape(name))}, and {list(shape)} by config.json")
