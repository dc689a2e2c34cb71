"""Prices of cells in seconds, by an arm's finished runs or by a few steps of its smallest and its largest model.

Shape letters: B sequences, T tokens.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy.optimize import nnls

from experiments.harness.assembly import spend
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
    cells, known = list(cells), {}
    for name, arm in arms.items():
        done = rows[(rows.arm == name) & (rows.status == "done")]
        mine = sorted((cell for cell in cells if cell.arm == name), key=lambda cell: cell.params)
        if len(done) >= ENOUGH:
            known[name] = fitted(done)
        elif mine:
            known[name] = measured(arm, mine[0], mine[-1])
    return lambda cell: known[cell.arm].of(cell)


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


def _time(arm: Arm, cell: Cell) -> tuple[float, float, float]:
    """Seconds of a training step and of an evaluation, and the FLOPs of a step."""
    config, sized = arm.configure(cell), arm.measure(cell.width)
    allocation, objective = spend(config, arm.data, sized), sized.objective
    model, trainer = build_model(config, objective), build(config.trainer)
    optimiser = sized.optimiser.build(model.roles(), model.width, allocation.tokens)
    evaluation_batch = trainer.evaluation_batch
    module = DataModule(arm.data, allocation, config.seed, config.data.packed, evaluation_batch)
    batch, took = next(iter(module.train_dataloader())), []
    objective.begin(model)
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(0)
        objective.loss(model, objective.experience(model, batch, generator), generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clip)
        optimiser.step()
        optimiser.zero_grad()
        took.append(time.perf_counter() - start)
    heldout = next(iter(module.val_dataloader()))
    start = time.perf_counter()
    with torch.no_grad():
        objective.evaluate(model, heldout, torch.Generator().manual_seed(0))
    once = (time.perf_counter() - start) * len(arm.data.heldout) / heldout.tokens_BT.numel()
    times = trainer.evaluations_in(allocation.flops, sized.evaluation_flops(arm.data))
    return min(took[1:]), once * times, sized.costs.flops_per_token * batch.tokens_BT.numel()
