"""The LightningModule: one backbone under one objective.

Shape letters: B sequences, T tokens.
"""

import math
from collections.abc import Callable, Sequence

import lightning as L
import torch
from torch import Tensor

from archs.language_model import LanguageModel
from experiments.harness.optimisers import Optimiser
from experiments.harness.schedules import Schedule, scheduled
from experiments.harness.telemetry import Diverged
from objectives.contracts import Batch, Objective

EVALUATION_SEED = 1  # the same masks for every run, so that arms and sizes are paired


class TrainingModule(L.LightningModule):
    """Trains `model` on `objective` for `steps` steps of `tokens` tokens in all and evaluates it on held-out windows.

    Attributes, after an evaluation:
        heldout_nats: [held-out sequences] float64.
        bits_per_byte, bits_per_byte_se, bits_per_byte_data_se: value, Monte Carlo error given the held-out bytes (0
            where exact) and error from the finite number of held-out sequences (None for a single one).
        exact: whether that is the likelihood itself and not a bound.
        evaluated_at: the step it was made at.
        scores: what `score` found, {} where there is nothing to score by.
    """

    evaluated_at = -1

    def __init__(
        self,
        model: LanguageModel,
        objective: Objective,
        optimiser: Optimiser,
        schedule: Schedule,
        gradient_clip: float,
        steps: int,
        tokens: int,
        heldout_bytes: int,
        seed: int,
        score: Callable[[LanguageModel], dict] | None = None,
    ):
        super().__init__()
        self.model, self.objective, self.optimiser, self.schedule = model, objective, optimiser, schedule
        self.gradient_clip, self.steps, self.tokens = gradient_clip, steps, tokens
        self.heldout_bytes, self.seed, self.score = heldout_bytes, seed, score
        self.beside: Sequence[LanguageModel] = objective.begin(model)
        self.learnt_from: tuple[int, Batch] | None = None  # an experience, and the step that it was made in
        self.scores: dict = {}

    def configure_optimizers(self) -> dict:  # pyrefly: ignore[bad-override]
        optimizer = self.optimiser.build(self.model.roles(), self.model.width, self.tokens)
        schedule = scheduled(optimizer, self.schedule, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        for model in self.beside:
            model.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # A generator made anew from (seed, step) needs no place in the checkpoint.
        generator = torch.Generator().manual_seed(self.seed * 2**40 + self.global_step)
        made_in = self.global_step - self.global_step % self.objective.updates
        if self.learnt_from is None or self.learnt_from[0] != made_in:
            self.learnt_from = made_in, self.objective.experience(self.model, batch, generator)
        loss = self.objective.loss(self.model, self.learnt_from[1], generator)
        self.auxiliary_losses = self.model.auxiliary_losses()
        return loss + sum(self.auxiliary_losses.values())

    def optimizer_step(self, *args, **kwargs) -> None:
        # Not in a hook at the batch's end, which would come after the checkpoint of the step is written.
        super().optimizer_step(*args, **kwargs)
        self.model.after_step()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.gradient_clip)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.objective.updates > 1 and self.learnt_from is not None:
            step, batch = self.learnt_from
            checkpoint["learnt_from"] = step, batch.tokens_BT, batch.weights_BT, batch.starts_BT, dict(batch.extras)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if "learnt_from" in checkpoint:
            step, *parts = checkpoint["learnt_from"]
            self.learnt_from = step, Batch(*parts).to(self.device)

    def on_validation_epoch_start(self) -> None:
        self.nats, self.variance = [], 0.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        generator = torch.Generator().manual_seed(EVALUATION_SEED + batch_idx)
        likelihood = self.objective.evaluate(self.model, batch, generator)
        self.nats.append(likelihood.nats_B.cpu())
        self.variance += likelihood.variance
        self.exact = likelihood.exact

    def on_validation_epoch_end(self) -> None:
        nats = torch.cat(self.nats)
        if not nats.isfinite().all():
            raise Diverged(f"held-out likelihood is not finite at step {self.global_step}")
        to_bits = 1 / (math.log(2) * self.heldout_bytes)
        self.heldout_nats = nats.numpy()
        self.bits_per_byte = nats.sum().item() * to_bits
        self.bits_per_byte_se = math.sqrt(self.variance) * to_bits
        self.bits_per_byte_data_se = nats.std().item() * math.sqrt(len(nats)) * to_bits if len(nats) > 1 else None
        self.scores = {} if self.score is None else self.score(self.model)
        self.evaluated_at = self.global_step
        self.log("bits_per_byte", self.bits_per_byte, prog_bar=True, logger=False)
