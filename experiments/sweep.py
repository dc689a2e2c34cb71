"""Train a grid of cells and compare the arms: python -m experiments.sweep sweep=quickstart

Started again, it runs only what is missing. --dry-run prints the cells and what they would tell apart, and runs
nothing. until="multiplier within 5 %" adds runs to the planned ones until the compute multiplier is known as well.
"""

import sys

from omegaconf import DictConfig

from experiments.harness.identity import load_config, run_of
from experiments.terminal import command


@command("sweep")
def main(config: DictConfig) -> dict:
    """Train one cell, wherever the launcher runs it. The sweep itself is hydra_plugins/isoflop.py."""
    from experiments.harness.run import execute
    from experiments.sweeps.worker import Preempted, end_with_the_sweep

    end_with_the_sweep()
    try:
        return execute(run_of(load_config(config.sweep.cell)))
    except SystemExit as stop:  # a pool of workers would end with it
        raise Preempted from stop


if __name__ == "__main__":
    sys.argv = ["sweep.dry_run=true" if argument == "--dry-run" else argument for argument in sys.argv]
    main()
