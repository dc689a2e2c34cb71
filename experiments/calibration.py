"""Count how often verdicts are right, on planted laws: python -m experiments.calibration repetitions=200"""

from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed
from omegaconf import DictConfig
from rich.table import Table

from experiments.findings import check_writable
from experiments.scaling.calibration import Case, PlantedLaw, repetition, summary
from experiments.terminal import command, console, given


@command("calibration")
def main(config: DictConfig) -> None:
    c = given(config)
    if c["repetitions"] < 1:
        raise ValueError(f"repetitions={c['repetitions']} must be at least 1")
    out = Path(c["out"])
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for settings in c["cases"]:
        case = Case(settings["noise"], PlantedLaw(**settings["new"]))
        done = Parallel(n_jobs=c["processes"])(delayed(repetition)(case, seed) for seed in range(c["repetitions"]))
        differs = ", ".join(f"{name} {value:g}" for name, value in settings["new"].items())
        rows.append({"new arm": differs} | summary(case, done))
        pd.DataFrame(rows).to_csv(out, index=False, float_format="%.4g")
    table = pd.DataFrame(rows)
    shown = Table(*table.columns, title=f"{c['repetitions']} repetitions of each")
    for row in table.itertuples(index=False):
        shown.add_row(*(x if isinstance(x, str) else f"{x:.3g}" for x in row))
    screen = console(width=230)
    screen.print(shown)
    screen.print(f"written to {out}", markup=False)


if __name__ == "__main__":
    main()
