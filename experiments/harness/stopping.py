"""The checkpoints of a training under way: every so many seconds, and when it is told to stop."""

import signal
import sys
import time
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

import lightning as L

from experiments.harness import checkpoints
from experiments.harness.identity import Run

# Sent by whoever takes the machine back: a person, a node that goes down, a time limit of Slurm, submitit.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Checkpoints(L.Callback):
    """Writes a checkpoint of a training every so many seconds and, before one of SIGNALS has its effect, at the end of
    the step or the evaluation under way.

    The effect is the one that the signal had before: a command ends with a line, a launcher starts the job again. Where
    it would have killed the process, the training ends by SystemExit with the code that shells give for that, 143 for
    SIGTERM. In another thread than the main one, to which Python hands no signals, the effect is immediate, and a
    training goes on from its last checkpoint.
    """

    def __init__(self, run: Run):
        self.run, self.seconds = run, run.session.checkpoint_seconds
        self.written = time.monotonic()
        self.signal: int | None = None
        self.effects: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}

    def on_train_start(self, trainer, pl_module) -> None:
        self.listen()

    def on_validation_start(self, trainer, pl_module) -> None:
        self.listen()

    def listen(self) -> None:
        """Set our handlers in the place of Lightning's, of which the one for Slurm would write another checkpoint. What
        was there before is put back by Lightning."""
        if current_thread() is main_thread():
            for number, effect in self.effects.items():
                if effect is not signal.SIG_IGN:
                    signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        # An evaluation that a checkpoint goes before is left out by Lightning when it goes on from there.
        if (batch_idx + 1) % trainer.val_check_batch:
            self.write_where_due(trainer)

    def on_validation_end(self, trainer, pl_module) -> None:
        if trainer.state.fn == "fit":
            self.write_where_due(trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int, dataloader_idx=0) -> None:
        if trainer.state.fn == "validate":  # the last evaluation, of no use by halves
            self.stop_where_told(trainer)

    def write_where_due(self, trainer: L.Trainer) -> None:
        due = self.signal is not None or time.monotonic() - self.written >= self.seconds
        if trainer.strategy.reduce_boolean_decision(due, all=False):
            checkpoints.write(self.run.folder, trainer.global_step, trainer.save_checkpoint)
            self.written = time.monotonic()
            self.stop_where_told(trainer)

    def stop_where_told(self, trainer: L.Trainer) -> None:
        """Let a signal that has come have its effect, to whichever of the processes of a run it came.

        Raises:
            SystemExit: where that was to kill the process.
        """
        if not trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False):
            return
        number, self.signal = self.signal or signal.SIGTERM, None
        told = f"run {self.run.id}: {signal.Signals(number).name} at step {trainer.global_step}"
        print(f"{told}; started again, it goes on from its last checkpoint", file=sys.stderr, flush=True)
        effect = self.effects[number]
        if not callable(effect):
            raise SystemExit(128 + number)
        effect(number, None)
