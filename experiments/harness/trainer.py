"""How a run is trained, whatever it trains: `trainer=`."""

from dataclasses import dataclass
from typing import Literal

import torch

from experiments.harness import hardware
from experiments.harness.rewinding import Rewinding
from experiments.harness.spikes import Spikes

MOST, SHARE = 4, 0.1  # evaluations of "auto", and of the training what they may cost


@dataclass(frozen=True)
class Trainer:
    """Settings of training that are neither the model's nor the objective's.

    Args:
        precision: "float32", "bf16" (autocast), or "auto" for the one that pays on the device.
        compile: whether the model is compiled: true, false, or "auto" for runs that are long enough.
        accelerator: "cpu", "cuda", or "auto".
        gradient_clip: largest norm of the gradient.
        evaluations: held-out evaluations in a run, the last one at its end; "auto" for as many, four at most, as cost
            no more than a tenth of the training, and the last in any case.
        evaluation_batch: held-out sequences at a time.
        skip_spikes: a step whose gradient's norm is so many times the median of those before it is left out, and its
            number stands in the row; None leaves out none.
        rewind_spikes: where the loss stays so many deviations above the median of those before it, the run goes back
            to an earlier state and leaves out the batches between, whose steps stand in the row; None for never.
        clip_logits: an attention head's largest logit in a step, above which its queries and keys are scaled down to
            that; the row says how often. None for no such bound.

    How a run is spread, which rounds its sums otherwise and is no part of its identity:
        devices: processes per node, each with one device, that share every batch.
        nodes: machines.
        strategy: "ddp", a copy of the model on each device; "fsdp", weights, gradients and the optimiser's state cut
            between them; "auto", a copy.
        experts: processes that the experts of a mixture are dealt out to; 1 for all of them on each.
        microbatch: most sequences of a forward pass on one device, None for all that it has of a batch.
        recompute: whether the backward pass runs each block again, so that only what goes into it is kept.

    Raises:
        ValueError: for a value that is not one of these.
    """

    precision: str
    compile: bool | str
    accelerator: str
    gradient_clip: float
    evaluations: int | Literal["auto"]
    evaluation_batch: int
    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"
    experts: int = 1
    microbatch: int | None = None
    recompute: bool = False
    skip_spikes: float | None = None
    rewind_spikes: float | None = None
    clip_logits: float | None = None

    def __post_init__(self):
        for name, allowed in (
            ("precision", ("auto", "float32", "bf16")),
            ("compile", ("auto", True, False)),
            ("accelerator", ("auto", "cpu", "cuda")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"trainer.{name}={value!r}: choose one of {', '.join(map(str, allowed))}")
        for name in ("evaluations", "evaluation_batch"):
            if (value := getattr(self, name)) != "auto" and value < 1:
                raise ValueError(f"trainer.{name}={value} must be at least 1")
        if not self.gradient_clip > 0:
            raise ValueError(f"trainer.gradient_clip={self.gradient_clip} must be above 0")
        if self.skip_spikes is not None and not self.skip_spikes > 1:
            raise ValueError(f"trainer.skip_spikes={self.skip_spikes} must be above 1, or null to leave out no step")
        for name in ("rewind_spikes", "clip_logits"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"trainer.{name}={value} must be above 0, or null to leave it")

    @property
    def processes(self) -> int:
        """The number of processes that share a run."""
        return self.devices * self.nodes

    @property
    def sharded(self) -> bool:
        """Return whether the model is cut between the processes."""
        return self.strategy == "fsdp"

    def spikes(self) -> Spikes | None:
        """Return what tells the steps that are left out; None where none are."""
        return None if self.skip_spikes is None else Spikes(self.skip_spikes)

    def rewinding(self) -> Rewinding | None:
        """Return what goes back to earlier states; None where nothing does."""
        return None if self.rewind_spikes is None else Rewinding(self.rewind_spikes)

    def device(self) -> torch.device:
        """The device that is meant by `accelerator`.

        Raises:
            ValueError: for cuda where there is none, and for more devices than the machine has.
        """
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise ValueError("trainer.accelerator=cuda, but torch sees no CUDA device: choose cpu or auto")
        if self.accelerator == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        if self.devices > torch.cuda.device_count():
            raise ValueError(
                f"trainer.devices={self.devices}, but this machine has {torch.cuda.device_count()} CUDA devices"
            )
        return torch.device("cuda")

    def passes(self, sequences: int) -> int:
        """The number of forward passes that each process makes of its part of a batch of so many sequences."""
        part = -(-sequences // self.processes)
        return 1 if self.microbatch is None else -(-part // self.microbatch)

    def divides(self, sequences: int) -> bool:
        """Return whether a batch of so many sequences is taken in more parts than one."""
        return self.processes > 1 or self.passes(sequences) > 1

    def precision_on(self, device: torch.device, width: int) -> str:
        """ "float32" or "bf16", for a model of this width."""
        return hardware.best_precision(device, width) if self.precision == "auto" else self.precision

    def compiles(self, device: torch.device, flops: float) -> bool:
        """Returns whether a run of so many FLOPs is compiled."""
        return hardware.compiling_pays(device, flops) if self.compile == "auto" else bool(self.compile)

    def evaluations_in(self, training_flops: float, evaluation_flops: float) -> int:
        """The number of evaluations in a run, the last one included."""
        if self.evaluations != "auto":
            return self.evaluations
        return max(1, min(MOST, int(SHARE * training_flops / evaluation_flops)))
