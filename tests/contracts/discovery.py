"""Every mixer, channel, backbone, objective and sampler, found by its config: a new one is tested without a line here.

`variants.yaml` beside this file adds settings of known mixers and channels that no config of a backbone has.
"""

import json
from functools import cache
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from archs.contracts import Channel, Mixer

CONFIGS = Path(__file__).parents[2] / "configs"
WIDTH, LENGTH, VOCABULARY = 32, 24, 19


def names(group: str) -> list[str]:
    """The configs of a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(*overrides: str) -> DictConfig:
    """The config of a small run."""
    return _composed(*overrides).copy()


@cache  # composing takes longer than most tests
def _composed(*overrides: str) -> DictConfig:
    small = [f"arch.width={WIDTH}", "data=hidden_markov", f"data.sequence_length={LENGTH}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*small, *overrides])


def likelihoods() -> list[str]:
    """The objectives that say what text is worth; the others tune what one of these has taught."""
    tunings = "objectives.post_training."
    return [name for name in names("objective") if not _target(name).startswith(tunings)]


def _target(objective: str) -> str:
    return composed(f"objective={objective}").objective.build._target_


def _parts(kind: str) -> dict[str, dict]:
    found, known = {}, set()
    for arch in names("arch"):
        model = OmegaConf.to_container(composed(f"arch={arch}").arch, resolve=True)["model"]
        used = {part for entry in (*model.get("first", []), *model["pattern"]) for part in entry.split("+")}
        for name, part in model.get(kind, {}).items():
            key = json.dumps(part, sort_keys=True)
            if name in used and key not in known:
                known.add(key)
                found[f"{arch}.{name}"] = part
    return found | OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("variants.yaml")))[kind]


MIXERS, CHANNELS = _parts("mixers"), _parts("channels")


def shaken(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The module with every parameter moved, so that every term of it matters."""
    module = module.to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p))
    return module


def build_mixer(name: str, dtype: torch.dtype = torch.float64) -> Mixer:
    torch.manual_seed(0)
    return shaken(instantiate(MIXERS[name])(WIDTH), dtype)


def build_channel(name: str, dtype: torch.dtype = torch.float64) -> Channel:
    torch.manual_seed(0)
    return shaken(instantiate(CHANNELS[name])(WIDTH), dtype)


def vectors(B: int, T: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random inputs [B, T, WIDTH] of a part."""
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
