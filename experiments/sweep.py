"""Train a grid of cells and compare the arms: python -m experiments.sweep sweep=quickstart

Started again, it runs only what is missing. dry_run=true prints the cells and runs nothing.
"""

import sys

import hydra
from omegaconf import DictConfig

from experiments.harness.run import execute


@hydra.main(version_base="1.3", config_path="../configs", config_name="sweep")
def main(config: DictConfig) -> dict:
    """One cell, wherever the launcher runs it. The sweep itself is hydra_plugins/isoflop.py."""
    return execute(config)


if __name__ == "__main__":
    sys.argv = ["dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]
    main()
