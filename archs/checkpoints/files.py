"""A checkpoint's folder: config.json and safetensors, in one file or in shards. Nothing in it is ever executed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON, or no object.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}: give the folder of a downloaded checkpoint")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no JSON object")
    return fields


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder, by name, each read when it is asked for.

    Raises:
        FileNotFoundError: where there are no safetensors, or not all shards that the index names.
        ValueError: where there are pickles instead, an index that names files elsewhere, or a name twice.
    """

    def __init__(self, folder: Path):
        self._files = {}
        for shard in _shards(folder):
            file = safe_open(shard, framework="pt")
            if twice := self._files.keys() & set(file.keys()):
                raise ValueError(f"{folder} holds {min(twice)} in more than one file")
            self._files |= dict.fromkeys(file.keys(), file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        names = set(read_json(folder / INDEX).get("weight_map", {}).values())
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder / INDEX} names {min(elsewhere)!r}, which does not lie in its folder")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise FileNotFoundError(f"{folder} lacks {min(missing)}, which its {INDEX} names: download all shards")
        return [folder / name for name in sorted(names)]
    if pickles := sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES):
        raise ValueError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when it is read: convert it to safetensors"
        )
    raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}: give the folder of a downloaded checkpoint")


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    config_name: str = CONFIG,
    weights_name: str = WEIGHTS,
) -> None:
    """Write a config and safetensors. Each replaces what was there in one step, so that a file which is still being
    read stays what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = folder / f"{weights_name}.tmp"
    owned = {name: x.cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    save_file(owned, fresh, metadata={"format": "pt"})
    fresh.replace(folder / weights_name)
    fresh = folder / f"{config_name}.tmp"
    fresh.write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(folder / config_name)
