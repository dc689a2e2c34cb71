"""Train one run: python -m experiments.train arch=... objective=... data=... budget.flops=1e13

The last line on standard output is the run's ledger row as one JSON object.
"""

import json
import sys

import hydra
from omegaconf import DictConfig

from experiments import CONFIGS
from experiments.harness.identity import run_of
from experiments.harness.run import execute


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train")
def main(config: DictConfig) -> None:
    try:
        row = execute(run_of(config))
    except ValueError as error:  # a config that cannot be run
        sys.exit(f"error: {error}")
    print(json.dumps(row), flush=True)
    if row["status"] != "done":
        sys.exit(1)


if __name__ == "__main__":
    main()
