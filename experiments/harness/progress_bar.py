"""The progress of a training, on stderr: lines kept up to date on a terminal, elsewhere a line now and then."""

import sys

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.harness.telemetry import Telemetry

LINES = 10  # of a training where nothing can be kept up to date


class ProgressBar(L.Callback):
    """Shows steps, the loss, evaluations and what they found.

    Args:
        telemetry: of the same training, which knows its loss.
        steps: of the whole training.
        compiled: whether the first step waits for a compiler.
    """

    def __init__(self, telemetry: Telemetry, steps: int, compiled: bool):
        self.telemetry, self.steps = telemetry, steps
        console, found = Console(file=sys.stderr), TextColumn("{task.fields[found]}")
        self.lines = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), found,
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.training = self.lines.add_task("compiling" if compiled else "training", total=steps, found="")
        self.evaluating = self.lines.add_task("evaluating", total=None, found="", visible=False)

    def setup(self, trainer, pl_module, stage: str) -> None:
        self.lines.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        step, found = trainer.global_step, f"loss {self.telemetry.train_loss:.3f}"
        self.lines.update(self.training, description="training", completed=step, found=found)
        if step % -(-self.steps // LINES) == 0:
            self.say(f"step {step} of {self.steps}: {found}")

    def on_validation_start(self, trainer, pl_module) -> None:
        self.lines.reset(self.evaluating, total=sum(trainer.num_val_batches), visible=True)
        self.say("evaluating")

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.lines.advance(self.evaluating)

    def on_validation_end(self, trainer, pl_module) -> None:
        found = f"{pl_module.bits_per_byte:.4f} bits per byte"
        self.lines.update(self.evaluating, found=found)
        self.say(f"step {pl_module.evaluated_at} of {self.steps}: {found}")

    def teardown(self, trainer, pl_module, stage: str) -> None:
        self.lines.stop()

    def say(self, text: str) -> None:
        """Print a line where nothing can be kept up to date."""
        if self.lines.disable:
            print(text, file=sys.stderr, flush=True)
