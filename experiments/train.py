"""Train one run: python -m experiments.train arch=... objective=... data=... budget.flops=1e13

The last line on standard output is the run's ledger row as one JSON object.
"""

import json
import os
import sys

from omegaconf import DictConfig

from experiments.harness.identity import plain, run_of
from experiments.harness.settings import check_settings
from experiments.terminal import command


@command("train")
def main(config: DictConfig) -> None:
    check_settings(plain(config))
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun has started
    if config.session.progress and first:
        print(f"{config.arch.name} under {config.objective.name}: reading the settings", file=sys.stderr, flush=True)
    run = run_of(config)
    from experiments.harness.run import execute  # pandas, which a mistake in the settings need not wait for

    row = execute(run)
    if first:
        print(json.dumps(row), flush=True)
    if row["status"] != "done":
        sys.exit(1)


if __name__ == "__main__":
    main()
