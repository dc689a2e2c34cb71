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
    for number, settings in enumerate(c["cases"]):
        seeds = range(number * c["repetitions"], (number + 1) * c["repetitions"])  # no two cases have the same noise
        both, new = settings.get("both", {}), settings["new"]
        case = Case(settings["noise"], PlantedLaw(**both, **new), PlantedLaw(**both))
        done = Parallel(n_jobs=c["processes"])(delayed(repetition)(case, seed) for seed in seeds)
        words = (", ".join(f"{name} {value:g}" for name, value in part.items()) for part in (both, new))
        rows.append(dict(zip(("both arms", "new arm"), words, strict=True)) | summary(case, done))
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
