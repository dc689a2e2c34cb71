"""Parts and price of each backbone: parameters, FLOPs per token and decode state at several lengths.

python -m experiments.anatomy 'archs=[gpt2,qwen3_next]' arch.width=256

Nothing is trained and no weight is made: the models are built on the meta device.
"""

from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from archs.costs import costs
from archs.visibility import BIDIRECTIONAL, CAUSAL
from experiments import CONFIGS
from experiments.terminal import command, nearest

ARCHS = Path(CONFIGS) / "arch"


def anatomy(config: DictConfig, length: int) -> dict:
    """Costs of one arch at one length: counts of parameters, forward FLOPs per token, bytes of one sequence's state.

    Raises:
        ValueError: for a length below 1, and a visibility that the arch cannot do.
    """
    if length < 1:
        raise ValueError(f"lengths={length} must be at least 1 token")
    visibility = {"causal": CAUSAL, "bidirectional": BIDIRECTIONAL}.get(config.visibility)
    if visibility is None:
        raise ValueError(f"visibility={config.visibility} must be causal or bidirectional")
    with torch.device("meta"):
        model = instantiate(config.arch.model, vocab_size=config.vocab_size)
    if visibility.kind not in model.visibilities:
        raise ValueError(f"arch={config.arch.name} cannot do visibility={config.visibility}")
    cost = costs(model, length, 3 * model.flops(length, visibility))
    return {
        "arch": config.arch.name,
        "width": config.arch.width,
        "depth": model.depth,
        "params": cost.params_total,
        "active": cost.params_active,
        "non_embedding": cost.params_non_embedding,
        f"flops_per_token@{length}": round(cost.flops_per_token / 3),
        f"state_bytes@{length}": cost.state_bytes,
    }


def table(names: list[str], lengths: list[int], overrides: list[str]) -> pd.DataFrame:
    """One row per arch."""
    rows = []
    for name in names:
        row = {}
        for length in lengths:
            changes = [*overrides, f"arch={name}", f"data.sequence_length={length}"]
            row |= anatomy(hydra.compose("anatomy", changes), length)
        rows.append(row)
    columns = list(rows[0])
    return pd.DataFrame(rows)[sorted(columns, key=lambda c: ("flops" in c, "state" in c) > (False, False))]


@command("anatomy")
def main(config: DictConfig) -> None:
    known = sorted(path.stem for path in ARCHS.glob("*.yaml"))
    chosen = HydraConfig.get().runtime.choices["arch"]
    given = HydraConfig.get().overrides.task
    names = list(config.archs or ([chosen] if any(o.startswith("arch=") for o in given) else known))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"arch={unknown[0]} is not known{nearest(unknown[0], known)}")
    overrides = [o for o in given if not o.startswith(("arch=", "data."))]
    result = table(names, list(config.lengths), overrides)
    print(result.map(lambda value: value if isinstance(value, str) else f"{value:,}").to_string(index=False))


if __name__ == "__main__":
    main()
