"""The check that a model is what a config.json describes.

Shape letters, in the names of attributes: E experts.
"""

from collections.abc import Set
from typing import Any

from torch import nn

from archs.positions import Alibi, Rotary

# What training alone goes by, and what modules remember of it.
TRAINING = {"balance_loss", "bias_update_rate", "loss_weight", "training", "z_loss"}
TRAINING |= {"asked", "computed", "fraction_E", "load_E", "loads", "losses"}


def check_likeness(model: nn.Module, expected: nn.Module, family: str) -> None:
    """
    Raises:
        ValueError: where the weights have other names or shapes than those of the expected model, or a module is of
            another kind or set otherwise, so that its logits would not be those of the config.
    """
    ours, theirs = model.state_dict(), expected.state_dict()
    for name, x in theirs.items():
        if name not in ours:
            raise ValueError(f"with this config of {family} a checkpoint has {name}, which the model lacks")
        if ours[name].shape != x.shape:
            shapes = f"{list(x.shape)}, and the model's is {list(ours[name].shape)}"
            raise ValueError(f"with this config of {family}, {name} is {shapes}")
    for name in ours:
        if name not in theirs:
            raise ValueError(f"with this config of {family} a checkpoint has no place for the model's {name}")
    check_settings(model, expected, family)


def check_settings(model: nn.Module, expected: nn.Module, family: str, apart: Set[str] = frozenset()) -> None:
    """Check the modules of the expected model, in all settings but those `apart`; the model may have more modules.

    Raises:
        ValueError: where a module is missing, of another kind or set otherwise.
    """
    modules = dict(model.named_modules())
    for name, module in expected.named_modules():
        wanted, found = _attributes(module), _attributes(modules[name]) if name in modules else {}
        for key in wanted:
            if key not in apart and wanted[key] != found.get(key):
                where = f"{name}.{key}" if name else key
                raise ValueError(
                    f"with this config of {family}, {where} is {wanted[key]}, and the model's is {found.get(key)}"
                )


def _attributes(module: nn.Module) -> dict[str, Any]:
    kinds = bool, int, float, str, tuple, type(None), Rotary, Alibi
    public = {key: x for key, x in vars(module).items() if key[0] != "_" and key not in TRAINING}
    return {"kind": type(module).__name__} | {key: x for key, x in public.items() if isinstance(x, kinds)}
