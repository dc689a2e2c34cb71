"""What a sweep would run and what it would tell apart, before it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd
from rich.table import Table

from experiments.findings import Refused
from experiments.scaling.design import Cell
from experiments.scaling.joint import join
from experiments.scaling.power import planned_power
from experiments.scaling.results import Power
from experiments.sweeps.hardware import Hardware, Range, between
from experiments.sweeps.plan import Arm, Plan
from experiments.sweeps.prices import prices

MOST = 2.0  # times the estimate: what is added on the way, and workers that share a machine (docs/measurements.md)


def describe(
    plan: Plan,
    arms: Mapping[str, Arm],
    cells: Sequence[Cell],
    rows: pd.DataFrame,
    noise: float,
    hardware: Hardware | None = None,
) -> Iterator[Table | str]:
    """Yields what to print: every cell that is expected with its FLOPs and an estimate of its time, and the design's
    power.

    noise: standard deviation of ln(loss) of a run, where the ledger's rows do not say. hardware: what the times are
    of, None for this machine.
    """
    table = Table(title=f"{plan.name}: {len(cells)} cells, nothing is run")
    for column in ("stage", "arm"):
        table.add_column(column)
    for column in ("budget", "width", "depth", "parameters", "tokens", "steps", "FLOPs", "time"):
        table.add_column(column, justify="right")
    price = hardware.prices(arms, cells) if hardware else _prices_here(arms, cells, rows)
    seconds = [price(cell) for cell in cells]
    for cell, own in zip(cells, seconds, strict=True):
        numbers = (f"{cell.budget:.3g}", cell.width, cell.depth, f"{cell.params:,}", f"{cell.tokens:,}", cell.steps)
        table.add_row(cell.kind, cell.arm, *map(str, numbers), f"{cell.flops:.4g}", between(own))
    yield table
    if hardware:
        yield from hardware.describe(cells, seconds)
    else:
        flops, total = sum(cell.flops for cell in cells), [sum(one) for one in zip(*seconds, strict=True)]
        told = f"{between(total)} of one thread; as many cells as a launcher has jobs run at a time"
        yield f"{flops:.3g} FLOPs in all, {told}"
    if plan.settings["recentre"] and len(plan.budgets) > 2:
        yield "Sizes from the third budget on are a guess: they will be laid around what the smaller budgets find."
    yield from describe_power(plan, arms, [cell for cell in cells if cell.kind == "fit"], rows, noise)


def _prices_here(arms: Mapping[str, Arm], cells: Sequence[Cell], rows: pd.DataFrame) -> Callable[[Cell], Range]:
    price = prices(arms, cells, rows)
    return lambda cell: (price(cell), MOST * price(cell))


def describe_power(
    plan: Plan, arms: Mapping[str, Arm], cells: Sequence[Cell], rows: pd.DataFrame, noise: float
) -> Iterator[str]:
    """Yields what the fitted cells would tell of each arm against the reference, and what smaller differences would
    take."""
    joint = join(rows, plan.design, {})
    known = None if isinstance(joint, Refused) or joint.arms != tuple(plan.arms) else joint.fit
    # An arm of another objective than the reference's has another kind of likelihood, and so a floor of its own.
    objectives = [arm.config.objective.name for arm in arms.values()]
    powers = planned_power(cells, plan.arms, [name != objectives[0] for name in objectives], noise, known)
    if known is None:
        yield f"For runs whose ln(loss) has a standard deviation of {noise:g} (sweep.noise, assumed), by chance alone:"
    else:
        spread = ", ".join(f"{x:.2g}" for x in known.spread)
        yield f"For runs that scatter as those in the ledger do ({spread} of the loss), by chance alone:"
    for arm, power in zip(plan.arms[1:], powers, strict=True):
        yield f"{arm} against {plan.arms[0]}: {power_sentence(power)}"


def power_sentence(power: Power) -> str:
    """Returns what is told apart, and what smaller multipliers would take."""
    text = f"a multiplier of {power.told_apart:.3f} is told from 1 in 80 % of repetitions"
    for remedy in power.remedies:
        seeds = "no number of seeds" if remedy.seeds is None else f"{remedy.seeds} seeds of every size"
        text += (
            f"; {remedy.target:g} would take {seeds}, or is told in {remedy.larger_budget_power:.0%} of them with one "
            f"more budget, {remedy.flops:.2g} FLOPs for both arms"
        )
    return text
