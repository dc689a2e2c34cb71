"""Compare the arms of any table of runs: python -m experiments.compare ledger=runs/quickstart/ledger.jsonl

All arguments are in configs/compare.yaml.
"""

from pathlib import Path

from omegaconf import DictConfig

from experiments.findings import check_writable, write_json
from experiments.report.wording import sentences
from experiments.scaling.analysis import analyse
from experiments.scaling.foreign import design_of, read_rows
from experiments.terminal import command, console, given


@command("compare")
def main(config: DictConfig) -> None:
    screen, c = console(), given(config)
    out = None if c["out"] is None else Path(c["out"])
    if out is not None:
        check_writable(out)
    rows = read_rows(Path(c["ledger"]), c["columns"], c["bounds"])
    analysis = analyse(rows, design_of(rows, c["ref"]))
    for line in sentences(analysis):
        screen.print(line, markup=False)
    if out is not None:
        write_json(out, analysis)
        screen.print(f"written to {out}", markup=False)


if __name__ == "__main__":
    main()
