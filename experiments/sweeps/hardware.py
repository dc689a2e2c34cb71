"""Prices of a sweep on hardware that is not here, from data sheets and published utilisation."""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.utils._python_dispatch import TorchDispatchMode

from experiments.harness.assembly import spend
from experiments.scaling.design import Cell
from experiments.sweeps.plan import Arm
from experiments.sweeps.prices import Training
from experiments.sweeps.progress import duration

STATE_BYTES = 16  # of a parameter in training: weight, gradient and AdamW's two moments in float32
KINDS = ("tune", "fit", "holdout")  # of cells, in the order of the stages
Range = tuple[float, float]  # least and greatest


@dataclass(frozen=True)
class Hardware:
    """Devices that a sweep could run on, one cell on each.

    A step takes the longer of two times: its FLOPs at the utilisation that published trainings reached, and its
    operations at what the host needs to start one. Starting processes, compiling and reading data come on top.

    Args:
        peak_flops: FLOP/s of a device, as its data sheet has them for the arithmetic of training.
        memory_bytes: of a device.
        utilisation: fraction of the peak, least and greatest.
        operation_seconds: seconds that an operation takes at least, least and greatest.
        devices: how many there are.
        dollars_per_hour: of one device, None where nobody said.

    Raises:
        ValueError: for a value out of its range.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    utilisation: Sequence[float]
    operation_seconds: Sequence[float]
    devices: int
    dollars_per_hour: float | None

    def __post_init__(self):
        for name in ("peak_flops", "memory_bytes", "devices"):
            if not getattr(self, name) > 0:
                raise ValueError(f"hardware.{name}={getattr(self, name)} must be above 0")
        for name, most in (("utilisation", 1.0), ("operation_seconds", math.inf)):
            values = list(getattr(self, name))
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                raise ValueError(f"hardware.{name}={values} must be the least and the greatest value, above 0")
        if self.dollars_per_hour is not None and not self.dollars_per_hour >= 0:
            raise ValueError(f"hardware.dollars_per_hour={self.dollars_per_hour} must not be below 0")

    def seconds(self, steps: int, flops: float, operations: float) -> Range:
        """Seconds of a run of so many steps and FLOPs on one device, least and greatest. operations: of a step."""
        slow, fast = (flops / (self.peak_flops * fraction) for fraction in self.utilisation)
        least, most = (steps * operations * seconds for seconds in self.operation_seconds)
        return max(fast, least), max(slow, most)

    def prices(self, arms: Mapping[str, Arm], cells: Sequence[Cell]) -> Callable[[Cell], Range]:
        """Return cell -> seconds on one device, evaluations included. cells: those that are to be priced."""
        narrowest = {name: min(cell.width for cell in cells if cell.arm == name) for name in arms}
        per_block = {name: operations_per_block(arms[name], width) for name, width in narrowest.items()}

        def price(cell: Cell) -> Range:
            arm = arms[cell.arm]
            evaluation = arm.measure(cell.width).evaluation_flops(arm.data) * arm.evaluations(cell)
            return self.seconds(cell.steps, cell.flops + evaluation, per_block[cell.arm] * cell.depth)

        return price

    def describe(self, cells: Sequence[Cell], seconds: Sequence[Range]) -> Iterator[str]:
        """Yields how long the cells take on all devices, what they cost, and which do not fit one. seconds: of each
        cell on one device."""
        total = [sum(one) for one in zip(*seconds, strict=True)]
        stages = [[one for cell, one in zip(cells, seconds, strict=True) if cell.kind == kind] for kind in KINDS]
        spans = [sum(makespan([one[end] for one in stage], self.devices) for stage in stages) for end in (0, 1)]
        yield (
            f"{sum(cell.flops for cell in cells):.3g} FLOPs in all: {between(total)} of one {self.name}; "
            f"{self.devices} of them would take {between(spans)}, since a stage waits for the one before"
        )
        if self.dollars_per_hour is None:
            yield "Money: hardware.dollars_per_hour=... is what one of them costs you"
        else:
            low, high = (self.dollars_per_hour * x / 3600 for x in total)
            yield f"Money: ${low:,.2f} to ${high:,.2f} at ${self.dollars_per_hour:g} per hour of one, while one trains"
        utilisation, microseconds = list(self.utilisation), [1e6 * seconds for seconds in self.operation_seconds]
        yield (
            f"Taken from others: {utilisation[0]:.0%} to {utilisation[1]:.0%} of {self.peak_flops:.3g} FLOP/s and "
            f"{microseconds[0]:g} to {microseconds[1]:g} us per operation (sources in configs/hardware); starting, "
            "compiling and reading data come on top"
        )
        longest = max(range(len(cells)), key=lambda i: seconds[i])
        if self.devices > 1 and seconds[longest][1] > spans[1] / 2:
            cell, time = cells[longest], between(seconds[longest])
            yield f"The longest cell alone, {cell.arm} at {cell.budget:.3g}, takes {time}: trainer.devices shares a run"
        large = [cell for cell in cells if STATE_BYTES * cell.params > self.memory_bytes]
        if large:
            most = max(large, key=lambda cell: cell.params)
            yield (
                f"{len(large)} cells do not fit one of them: {most.arm} of {most.params:,} parameters has "
                f"{STATE_BYTES * most.params / 1e9:,.0f} GB of weights, gradients and moments; they need "
                "trainer.devices and trainer.strategy=fsdp"
            )


def makespan(seconds: Iterable[float], devices: int) -> float:
    """Returns when the last run ends where each device takes the longest that is left."""
    free = [0.0] * devices
    for one in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + one)
    return max(free)


def between(seconds: Sequence[float]) -> str:
    """Returns a range of seconds in words."""
    low, high = map(duration, seconds)
    return low if low == high else f"{low} to {high}"


class Operations(TorchDispatchMode):
    """Counts the operations that are more than another view of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_per_block(arm: Arm, width: int) -> float:
    """Returns the operations of a training step over the number of blocks: counted in one step of a model of this width
    on the fewest sequences, which has as many as a larger one."""
    config, measured = arm.config.copy(), arm.measure(width)
    config.arch.width = width
    tokens = config.budget.batch_tokens = config.data.sequence_length * arm.data.group
    config.budget.flops = tokens * measured.costs.flops_per_token + measured.flops_per_step
    training = Training(config, arm.data, measured, spend(config, arm.data, measured))
    training.step()  # what is made once
    with Operations() as counted:
        training.step()
    return counted.count / measured.depth
