"""Score every prediction that was written before its runs: python -m experiments.score root=runs"""

from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from experiments.scaling.holdout import scores
from experiments.terminal import command, console


@command("score")
def main(config: DictConfig) -> None:
    root = Path(config.root)
    if not root.is_dir():
        raise ValueError(f"root={root} is no folder: name the one in which the sweeps lie")
    found = scores(root)
    screen = console()
    table = Table("sweep", "arm", "budget", "written", "predicted", "95 % interval", "outcome", "inside")
    for row in found.itertuples():
        numbers = f"{row.predicted:.4g}", f"[{row.low:.4g}, {row.high:.4g}]", f"{row.outcome:.4g}"
        names = str(row.sweep), str(row.arm), f"{row.budget:.3g}", str(row.written)
        table.add_row(*names, *numbers, "yes" if row.inside else "no")
    screen.print(table)
    inside = int(found.inside.sum())
    screen.print(f"{inside} of {len(found)} predictions held; 95 % intervals should hold about {0.95 * len(found):.1f}")


if __name__ == "__main__":
    main()
