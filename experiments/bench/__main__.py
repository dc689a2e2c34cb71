"""The command: python -m experiments.bench models=[qwen3] precisions=[bf16], or kernels=recurrent for the
operations."""

import sys

import hydra
import torch
from omegaconf import DictConfig

from experiments import CONFIGS
from experiments.bench import models, operations


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="bench")
def main(config: DictConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        if "kernels" in config:
            operations.bench(config.kernels)
        else:
            models.bench(config)
    except ValueError as error:  # a config that cannot be run
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
