"""The command: python -m experiments.bench models=[qwen3] precisions=[bf16], or kernels=recurrent for the
operations."""

import torch
from omegaconf import DictConfig

from experiments.bench import models, operations
from experiments.terminal import command


@command("bench")
def main(config: DictConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if "kernels" in config:
        operations.bench(config.kernels)
    else:
        models.bench(config)


if __name__ == "__main__":
    main()
