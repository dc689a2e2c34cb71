"""The command: python -m experiments.bench models=[qwen3] precisions=[bf16], profile=true for where their time
goes, kernels=recurrent for the operations, or launches=published for what their launches move."""

import os
import sys

# Read when Triton is first imported: launches are counted in its interpreter.
if any(argument.startswith("launches=") for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from omegaconf import DictConfig

from experiments.bench import ledger, models, operations, profile
from experiments.terminal import command


@command("bench")
def main(config: DictConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if "launches" in config:
        ledger.bench(config.launches)
    elif "kernels" in config:
        operations.bench(config.kernels)
    elif config.profile:
        profile.bench(config)
    else:
        models.bench(config)


if __name__ == "__main__":
    main()
