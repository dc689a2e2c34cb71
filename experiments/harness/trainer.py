"""How a run is trained, whatever it trains: `trainer=`."""

from dataclasses import dataclass
from typing import Literal

import torch

from experiments.harness import hardware

MOST, SHARE = 4, 0.1  # evaluations of "auto", and of the training what they may cost


@dataclass(frozen=True)
class Trainer:
    """Settings of training that are neither the model's nor the objective's.

    Args:
        precision: "float32", "bf16" (autocast), or "auto" for the one that pays on the device.
        compile: whether the model is compiled: true, false, or "auto" for runs that are long enough.
        accelerator: "cpu", "cuda", or "auto".
        devices, nodes, strategy: as Lightning has them. Runs take one device so far, so nothing but 1, 1 and "auto".
        gradient_clip: largest norm of the gradient.
        evaluations: held-out evaluations in a run, the last one at its end; "auto" for as many, four at most, as cost
            no more than a tenth of the training, and the last in any case.
        evaluation_batch: held-out sequences at a time.

    Raises:
        ValueError: for a value that is not one of these.
    """

    precision: str
    compile: bool | str
    accelerator: str
    devices: int
    nodes: int
    strategy: str
    gradient_clip: float
    evaluations: int | Literal["auto"]
    evaluation_batch: int

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
        if (self.devices, self.nodes, self.strategy) != (1, 1, "auto"):
            raise ValueError(
                f"trainer.devices={self.devices}, nodes={self.nodes}, strategy={self.strategy!r}: batches are not yet "
                "cut between processes, so a run takes devices=1, nodes=1, strategy=auto; a sweep's launcher runs "
                "several runs at once"
            )

    def device(self) -> torch.device:
        """The device that is meant by `accelerator`.

        Raises:
            ValueError: for cuda where there is none.
        """
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise ValueError("trainer.accelerator=cuda, but torch sees no CUDA device: choose cpu or auto")
        return torch.device("cpu" if self.accelerator == "cpu" or not torch.cuda.is_available() else "cuda")

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
