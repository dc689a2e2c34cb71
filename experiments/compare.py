"""Compare the arms of any table of runs: python -m experiments.compare ledger=runs/quickstart/ledger.jsonl

All arguments are in configs/compare.yaml.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from rich.console import Console

from experiments import CONFIGS, stop
from experiments.findings import check_writable, write_json
from experiments.report.report import sentences
from experiments.scaling.analysis import analyse
from experiments.scaling.foreign import design_of, read_rows


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="compare")
def main(config: DictConfig) -> None:
    try:
        c: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        out = None if c["out"] is None else Path(c["out"])
        if out is not None:
            check_writable(out)
        rows = read_rows(Path(c["ledger"]), c["columns"], c["bounds"])
        analysis = analyse(rows, design_of(rows, c["ref"]))
    except MissingMandatoryValue as error:
        stop(f"{error.full_key or error} must be given, as {error.full_key or 'name'}=...")
    except ValueError as error:
        stop(error)
    console = Console(soft_wrap=True)
    for line in sentences(analysis):
        console.print(line, markup=False)
    if out is not None:
        write_json(out, analysis)
        console.print(f"written to {out}", markup=False)


if __name__ == "__main__":
    main()
