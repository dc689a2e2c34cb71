"""Weights on disk: those of a finished run, and those that a run begins with."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from archs.checkpoints import read, read_config
from archs.checkpoints.likeness import check_settings
from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.harness.files import replacing
from experiments.harness.identity import load_config, plain
from experiments.harness.parts import build_base, build_model, open_data
from experiments.harness.settings import check_stranger
from objectives.contracts import Objective
from objectives.post_training.tuning import Trained

# What an objective adds to a model: absent on one side, it is left out or begins anew.
OF_OBJECTIVES = "time.", "ahead.", "score."
# What has one row per token id, of which objectives add some behind those of the data.
BY_TOKEN = "embedding.weight", "head.weight", "head.bias"


@dataclass(frozen=True)
class FinishedRun:
    """A trained model with what it was trained on. objective: how it reads and writes; of a tuned one that of its
    base."""

    config: DictConfig
    model: LanguageModel
    objective: Objective
    data: TokenData


def load_run(folder: Path, data: TokenData | None = None, trusted: Collection[str] = ()) -> FinishedRun:
    """A finished run from its folder, which may be somebody else's; the data is opened where it is not given. trusted:
    packages beside this project's of which its config may build things.

    Raises:
        ValueError: when the folder holds no finished run, or its config builds what is not trusted.
    """
    if not (folder / "model.safetensors").exists() or not (folder / "config.yaml").exists():
        raise ValueError(f"run={folder} holds no finished run: give the folder of one, such as runs/cells/<id>")
    config = load_config(folder / "config.yaml")
    check_stranger(plain(config), trusted)
    data = open_data(config) if data is None else data
    objective = build_base(config.objective, data)
    model = build_model(config, objective)
    # A tied head is stored once, as the embedding.
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=not model.tied)
    return FinishedRun(config, model.eval(), objective, data)


def load_trained(folders: Mapping[str, Path]) -> dict[str, Trained]:
    """Return the models of finished runs, by name, for another run's objective."""
    runs = {name: load_run(folder) for name, folder in folders.items()}
    return {name: Trained(run.model, run.objective) for name, run in runs.items()}


def save_weights(model: LanguageModel, path: Path) -> None:
    """Write weights and buffers as safetensors, replaced atomically; a tied head is stored once."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in _tensors(model).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary)


@torch.no_grad()
def begin_from(model: LanguageModel, folder: Path) -> None:
    """Give a model the weights of a folder: those of a run, or a public checkpoint with its config.json.

    Another objective than that of the weights is allowed for: of what has one row per token id the rows that both have
    are taken, and what an objective adds to a model (times, further tokens) begins anew or is left out. The table of a
    public checkpoint may be padded, by a tenth at most.

    Raises:
        ValueError: when the weights are not those of this backbone, or it is set otherwise than the config.json says;
            names the first tensor or setting that does not fit.
    """
    public = read(folder) if (folder / "config.json").exists() else None
    wanted, given = _tensors(model), _stored(folder) if public is None else _tensors(public)
    for name in [*wanted, *given]:
        if name.startswith(OF_OBJECTIVES) and (name not in wanted or name not in given):
            continue
        ours, theirs = (tuple(tensors[name].shape) if name in tensors else None for tensors in (wanted, given))
        rows_apart = name in BY_TOKEN and _another_objectives(ours, theirs)
        if ours != theirs and not rows_apart:
            raise ValueError(
                f"init_from: the weights of {folder} are of another model: {name} is {_shape(theirs)} there and "
                f"{_shape(ours)} here; choose the arch, width and data that they were trained with"
            )
        target, source = wanted[name], given[name]
        if rows_apart:
            rows = min(len(target), len(source))
            target, source = target[:rows], source[:rows]
        target.copy_(source)
    if public is not None:
        check_settings(model, public, read_config(folder)["model_type"], apart={"num_embeddings", "out_features"})


def _tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers; a tied head once, as the embedding."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _another_objectives(ours: tuple[int, ...] | None, theirs: tuple[int, ...] | None) -> bool:
    """Returns whether two tables differ by no more than an objective's mask token, or the padding of a public
    checkpoint."""
    if ours is None or theirs is None or ours[1:] != theirs[1:]:
        return False
    return -1 <= theirs[0] - ours[0] <= max(1, theirs[0] // 10)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"{list(shape)}"
