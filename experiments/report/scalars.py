"""A sweep in TensorBoard: bits per byte against training FLOPs, a curve for each arm and size, named by both."""

import re
import shutil
from pathlib import Path

import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from experiments.findings import count
from experiments.scaling.arm_runs import lowest_by_budget

UNIT = 1e6  # FLOPs of a step
TAG = "sweep/bits per byte, step = 1e6 FLOPs"


def write(folder: Path, rows: pd.DataFrame) -> None:
    """Write the folder anew, from the ledger's rows: "<arm>, 66.9k parameters" with the mean of its seeds at every
    budget, and "<arm>, lowest" with the lowest run of every budget. Tuning runs, at other rates, are left out."""
    shutil.rmtree(folder, ignore_errors=True)
    done = rows[(rows.status == "done") & (rows.kind != "tune")]
    for (arm, size), runs in done.groupby(["arm", done.params_total.map(count)]):
        _curve(folder, f"{arm}, {size} parameters", runs.groupby("flops").bits_per_byte.mean())
    for arm, runs in done.groupby("arm"):
        lowest = lowest_by_budget(runs)
        _curve(folder, f"{arm}, lowest", lowest.groupby("flops").bits_per_byte.min())


def _curve(folder: Path, name: str, losses: pd.Series) -> None:
    """losses: bits per byte by FLOPs."""
    with SummaryWriter(folder / re.sub(r"[^\w+.,() -]", "_", name)) as writer:
        for flops, loss in zip(losses.index, losses, strict=True):
            writer.add_scalar(TAG, loss, round(flops / UNIT))
