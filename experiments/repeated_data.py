"""Who wins when data is short: python -m experiments.repeated_data

Every objective trains one backbone on the first tokens of a corpus, read once, twice and so on, each number of epochs in
a run of its own (Prabhudesai et al., arXiv 2507.15857; Ni et al., 2511.03276, at playground size). A second start goes on
where the first was stopped. Writes <out>.csv, one row a run, and <out>.png, and says who is ahead after how many epochs.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
from hydra.core.hydra_config import HydraConfig
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.progress import track
from scipy.stats import t as student_t

from experiments.harness.run import execute, measure, open_data
from experiments.scaling.figures import COLOURS, MARKERS

KEPT = ("id", "status", "objective", "seed", "tokens", "flops", "params_total", "bits_per_byte", "bits_per_byte_se")
KEPT += ("bits_per_byte_kind", "train_loss", "train_seconds", "device")


def cells(config: DictConfig, overrides: list[str]) -> Iterator[tuple[int, DictConfig]]:
    """The number of epochs and the config of every run.

    Raises:
        ValueError: for an objective that the arch cannot do.
    """
    tokens = config.repeated.train_tokens
    data = None
    for objective in config.repeated.objectives:
        for seed in config.repeated.seeds:
            for epochs in config.repeated.epochs:
                cell = hydra.compose("repeated_data", [*overrides, f"objective={objective}", f"seed={seed}"])
                cell.data.tokens = {
                    "_target_": "experiments.data.token_data.beginning",
                    "data": cell.data.tokens,
                    "train_tokens": tokens,
                }
                data = open_data(cell) if data is None else data
                cost, _ = measure(cell, data)
                cell.budget.flops = cost.flops_per_token * tokens * epochs
                yield epochs, cell


def run(epochs: int, config: DictConfig) -> dict:
    row = execute(config)
    return {"epochs": epochs} | {key: row[key] for key in KEPT}


def table_of(config: DictConfig, overrides: list[str]) -> pd.DataFrame:
    """One row a run.

    Raises:
        ValueError: as `cells`, before anything is trained.
    """
    planned = list(cells(config, overrides))
    rows = Parallel(n_jobs=config.jobs, return_as="generator")(delayed(run)(*cell) for cell in planned)
    return pd.DataFrame(track(rows, total=len(planned), description="runs"))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Of every objective and number of epochs the mean over seeds, and half of its 95 % interval (Student's t)."""
    done = table[table.status == "done"]
    groups = done.groupby(["objective", "epochs"], sort=False).bits_per_byte.agg(["mean", "std", "count"]).reset_index()
    reach = student_t.ppf(0.975, np.maximum(groups["count"] - 1, 1)) * groups["std"] / np.sqrt(groups["count"])
    return groups.assign(reach=reach)


def verdicts(table: pd.DataFrame, objectives: list[str]) -> Iterator[str]:
    """For every number of epochs, who is ahead: from the differences of runs of the same seed, if their 95 % interval
    leaves zero out."""
    first, *others = objectives
    done = table[table.status == "done"].pivot(index=["epochs", "seed"], columns="objective", values="bits_per_byte")
    for other in others:
        for epochs, rows in done.groupby(level="epochs"):
            difference = (rows[other] - rows[first]).dropna()
            if len(difference) < 2:
                yield f"{epochs} epochs: too few seeds to compare {other} with {first}"
                continue
            reach = student_t.ppf(0.975, len(difference) - 1) * difference.std() / len(difference) ** 0.5
            mean = difference.mean()
            ahead = "cannot tell" if abs(mean) <= reach else f"{first if mean > 0 else other} is ahead"
            yield f"{epochs} epochs: {other} less {first} = {mean:+.3f} +- {reach:.3f} bits per byte: {ahead}"


def figure(table: pd.DataFrame) -> Figure:
    """Held-out bits per byte against epochs, with intervals over seeds."""
    canvas = Figure(figsize=(7, 4.6), layout="constrained")
    axes = canvas.subplots()
    rows = summary(table)
    for i, name in enumerate(dict.fromkeys(table.objective)):
        curve = rows[rows.objective == name]
        bound = (table[table.objective == name].bits_per_byte_kind == "bound").any()
        axes.errorbar(
            curve.epochs, curve["mean"], curve.reach, color=COLOURS[i], marker=MARKERS[i], capsize=3,
            label=f"{name} (upper bound)" if bound else name,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="epochs over the same tokens", ylabel="held-out bits per byte")
    axes.set_xticks(sorted(set(rows.epochs)), [str(n) for n in sorted(set(rows.epochs))], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return canvas


@hydra.main(version_base="1.3", config_path="../configs", config_name="repeated_data")
def main(config: DictConfig) -> None:
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    given = [o for o in HydraConfig.get().overrides.task if not o.startswith(("objective=", "seed="))]
    try:
        table = table_of(config, given)
    except ValueError as error:
        sys.exit(f"error: {error}")
    table.to_csv(out.with_suffix(".csv"), index=False, float_format="%.6g")
    figure(table).savefig(out.with_suffix(".png"), dpi=110)
    print(summary(table).to_string(index=False))
    for line in verdicts(table, list(config.repeated.objectives)):
        print(line)
    print(f"written to {out}.csv and {out}.png")


if __name__ == "__main__":
    main()
