"""Prices of cells in seconds, by an arm's finished runs or by a few steps of its smallest and its largest model.

Shape letters: B sequences, T tokens.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from scipy.optimize import nnls

from experiments.data.token_data import TokenData
from experiments.harness.assembly import Measured, spend
from experiments.harness.budget import Allocation
from experiments.harness.data_module import DataModule
from experiments.harness.parts import build, build_model
from experiments.scaling.design import Cell
from experiments.sweeps.plan import Arm

ENOUGH = 4  # finished runs of an arm that tell its price
STEPS = 3  # that are timed of a model, after one that is not
SET_UP = 1.0  # seconds of a run before its first step and after its last, besides the evaluation


@dataclass(frozen=True)
class Price:
    """Seconds of an arm's run in one process: start + step x steps + flop x FLOPs + evaluation x FLOPs per token."""

    start: float
    step: float
    flop: float
    evaluation: float

    def of(self, cell: Cell) -> float:
        """Seconds of a cell."""
        per_token = cell.flops / cell.tokens
        return self.start + self.step * cell.steps + self.flop * cell.flops + self.evaluation * per_token


def prices(arms: Mapping[str, Arm], cells: Iterable[Cell], rows: pd.DataFrame) -> Callable[[Cell], float]:
    """Returns cell -> seconds. cells: those that are to be priced; rows: of the ledger."""
    known = prices_so_far(rows)
    sizes: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.params):
        sizes.setdefault(cell.arm, []).append(cell)
    known |= {arm: measured(arms[arm], own[0], own[-1]) for arm, own in sizes.items() if arm not in known}
    return lambda cell: known[cell.arm].of(cell)


def prices_so_far(rows: pd.DataFrame) -> dict[str, Price]:
    """Returns the price of each arm that has enough finished runs among the rows of a ledger to tell it."""
    done = rows[rows.status == "done"]
    return {str(arm): fitted(own) for arm, own in done.groupby("arm") if len(own) >= ENOUGH}


def fitted(done: pd.DataFrame) -> Price:
    """The price that finished runs had: least squares of the relative error, no part below zero."""
    steps, flops, tokens, wall = (done[name].to_numpy(float) for name in ("steps", "flops", "tokens", "wall_seconds"))
    columns = np.stack([np.ones(len(done)), steps, flops, flops / tokens], 1)
    scale = columns.max(0)
    found, _ = nnls(columns / scale / wall[:, None], np.ones(len(done)))
    return Price(*(found / scale))


def measured(arm: Arm, smallest: Cell, largest: Cell) -> Price:
    """The price by a few steps and an evaluated batch of two models, on one thread, as one of several workers has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small_step, small_evaluation, small_flops = _time(arm, smallest)
    step, evaluation, flops = _time(arm, largest)
    torch.set_num_threads(threads)
    flop = max(0.0, (step - small_step) / (flops - small_flops)) if flops > small_flops else step / flops
    per_token = max(small_evaluation * smallest.tokens / smallest.flops, evaluation * largest.tokens / largest.flops)
    return Price(SET_UP, max(0.0, small_step - flop * small_flops), flop, per_token)


class Training:
    """A run's training without a harness, step by step on its first batch, for what a step takes."""

    def __init__(self, config: DictConfig, data: TokenData, measured: Measured, allocation: Allocation):
        trainer = build(config.trainer)
        self.objective, self.gradient_clip = measured.objective, trainer.gradient_clip
        self.model = build_model(config, self.objective)
        self.optimiser = measured.optimiser.build(self.model.roles(), self.model.width, allocation.tokens)
        self.batches = DataModule(data, allocation, config.seed, config.data.packed, trainer.evaluation_batch)
        self.batch = next(iter(self.batches.train_dataloader()))
        self.objective.begin(self.model)

    def step(self) -> None:
        """Train one step."""
        generator = torch.Generator().manual_seed(0)
        self.objective.loss(
            self.model, self.objective.experience(self.model, self.batch, generator), generator
        ).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip)
        self.optimiser.step()
        self.optimiser.zero_grad()


def _time(arm: Arm, cell: Cell) -> tuple[float, float, float]:
    """Seconds of a training step and of an evaluation, and the FLOPs of a step."""
    config, sized = arm.configure(cell), arm.measure(cell.width)
    training, took = Training(config, arm.data, sized, spend(config, arm.data, sized)), []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        training.step()
        took.append(time.perf_counter() - start)
    heldout = next(iter(training.batches.val_dataloader()))
    start = time.perf_counter()
    with torch.no_grad():
        training.objective.evaluate(training.model, heldout, torch.Generator().manual_seed(0))
    once = (time.perf_counter() - start) * len(arm.data.heldout) / heldout.tokens_BT.numel()
    return min(took[1:]), once * arm.evaluations(cell), sized.costs.flops_per_token * training.batch.tokens_BT.numel()
