"""What a run says while it trains: loss, gradient norm, speed and utilisation, over steps, tokens and FLOPs.

Shape letters: B sequences, T tokens.
"""

import math
import time
from collections.abc import Callable

import lightning as L
import numpy as np
from torch.utils.tensorboard import SummaryWriter

from experiments.harness.budget import Allocation

SHOWN = 16  # sequences that the model wrote, of one experience


class Diverged(RuntimeError):
    """The training loss or the held-out value is no longer a finite number."""


class Telemetry(L.Callback):
    """Times the training steps and writes about a hundred points per run to TensorBoard.

    A callback and not part of the module, because Lightning runs it before the checkpoint is written: what it has
    counted is then in the checkpoint of the same step.

    Attributes:
        train_seconds, wall_seconds: time in training steps and in all, over all starts of the run.
        train_loss: running mean over about 50 steps, nats per token: one batch is noise.
    """

    def __init__(
        self, writer: SummaryWriter, allocation: Allocation, peak_flops: float, decode: Callable[[np.ndarray], str]
    ):
        self.writer, self.allocation, self.peak_flops, self.decode = writer, allocation, peak_flops, decode
        self.train_seconds = self.earlier_seconds = 0.0
        self.train_loss = math.nan
        self.started = time.perf_counter()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx: int) -> None:
        self.step_started = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        loss = pl_module.loss.item()  # waits for the device, so that the clock below is honest
        gradient_norm = float(pl_module.gradient_norm)
        seconds = time.perf_counter() - self.step_started
        self.train_seconds += seconds
        if not math.isfinite(loss) or not math.isfinite(gradient_norm):
            raise Diverged(f"loss {loss} and gradient norm {gradient_norm} at step {trainer.global_step}")
        self.train_loss = loss if math.isnan(self.train_loss) else 0.98 * self.train_loss + 0.02 * loss
        if trainer.global_step % max(1, self.allocation.steps // 100) == 0:
            flops_per_second = batch.tokens_BT.numel() / seconds * self.allocation.flops_per_token
            self.write(
                "train",
                trainer.global_step,
                loss=loss,
                gradient_norm=gradient_norm,
                **({"skipped_steps": len(pl_module.spikes.steps)} if pl_module.spikes else {}),
                **({"rewound": len(pl_module.rewinding.undone)} if pl_module.rewinding else {}),
                **({"largest_logit": pl_module.logit_clip.largest} if pl_module.logit_clip else {}),
                learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
                tokens_per_second=batch.tokens_BT.numel() / seconds,
                model_flops_utilisation=flops_per_second / self.peak_flops,
                petaflops=self.allocation.tokens_before(trainer.global_step) * self.allocation.flops_per_token / 1e15,
                **{name: loss.item() for name, loss in pl_module.auxiliary_losses.items()},
                **pl_module.model.telemetry(),
                **pl_module.figures,
            )

            if written := pl_module.objective.written()[:SHOWN]:
                texts = (f"    {self.decode(tokens_T.cpu().numpy())!r}  {reward:.3g}" for tokens_T, reward in written)
                self.writer.add_text("train/written", "\n".join(texts), trainer.global_step)

    def on_validation_end(self, trainer, pl_module) -> None:
        self.write("heldout", trainer.global_step, bits_per_byte=pl_module.bits_per_byte)
        for task, score in pl_module.scores.items():
            self.write(f"task/{task}", trainer.global_step, **{name: estimate[0] for name, estimate in score.items()})

    def write(self, group: str, step: int, **scalars: float) -> None:
        """Scalars with the step as x axis, and again with tokens and with megaFLOPs as x axes."""
        tokens = self.allocation.tokens_before(step)
        megaflops = round(tokens * self.allocation.flops_per_token / 1e6)
        for axis, x in (("", step), ("_by_tokens", tokens), ("_by_megaflops", megaflops)):
            for name, value in scalars.items():
                self.writer.add_scalar(f"{group}{axis}/{name}", value, x)

    @property
    def wall_seconds(self) -> float:
        return self.earlier_seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("train_seconds", "train_loss", "wall_seconds")}

    def load_state_dict(self, state_dict: dict) -> None:
        self.train_seconds, self.train_loss = state_dict["train_seconds"], state_dict["train_loss"]
        self.earlier_seconds = state_dict["wall_seconds"]
