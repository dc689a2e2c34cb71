"""Needs of a cell: what the launchers that share machines out (configs/hydra/launcher) have to give it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
from omegaconf import DictConfig

from experiments.scaling.design import Cell
from experiments.sweeps.prices import prices_so_far


@dataclass(frozen=True)
class Needs:
    """cpus: cores. gpus: a number of them or a part of one, None for the launcher's own. memory_gb: of the machine,
    None for what is usual there. minutes: the longest that it may take."""

    cpus: int
    gpus: float | None
    memory_gb: float | None
    minutes: int


def needs_of(cells: Iterable[Cell], settings: DictConfig, rows: pd.DataFrame) -> list[Needs]:
    """Returns what each cell needs.

    settings: the node `sweep.needs`. rows: of the ledger, whose finished runs tell the time of the next ones of their
    arm; before there are enough of them it is the settings'.
    """
    prices, small, needs = prices_so_far(rows), settings.small, []
    for cell in cells:
        minutes = settings.minutes
        if cell.arm in prices:
            minutes = min(minutes, math.ceil(settings.margin * prices[cell.arm].of(cell) / 60))
        gpus = small.gpus if small and cell.params < small.parameters else settings.gpus
        needs.append(Needs(settings.cpus, gpus, settings.memory_gb, max(1, minutes)))
    return needs
