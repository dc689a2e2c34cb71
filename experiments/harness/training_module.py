"""The LightningModule: one backbone under one objective.

Shape letters: B sequences, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from archs.language_model import LanguageModel
from experiments.harness import processes
from experiments.harness.expert_parallel import DealtExperts
from experiments.harness.logit_clip import LogitClip, watched
from experiments.harness.optimisers import Optimiser
from experiments.harness.rewinding import Rewinding, state_of
from experiments.harness.schedules import Schedule, scheduled
from experiments.harness.sharding import leave_to_all, read_by_all, whole
from experiments.harness.spikes import Spikes
from experiments.harness.telemetry import Diverged
from objectives.contracts import Batch, Objective

EVALUATION_SEED = 1  # the same masks for every run, so that arms and sizes are paired


class TrainingModule(L.LightningModule):
    """Trains `model` on `objective` for `steps` steps of `tokens` tokens in all and evaluates it on held-out windows.

    A batch is shared by the processes, each of which takes its part in `passes` passes, of the number of its sequences.
    All see the whole batch and draw the noise for all of it, so that it does not depend on who takes what.

    Attributes, after a step:
        loss: that of the whole batch, auxiliary_losses included.
        figures: what the objective says of it; where it was taken in parts, their mean.

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
        group: int = 1,
        passes: Callable[[int], int] = lambda sequences: 1,
        shard: Callable[[LanguageModel, DeviceMesh], None] | None = None,
        spikes: Spikes | None = None,
        experts: DealtExperts | None = None,
        rewinding: Rewinding | None = None,
        clip_logits: float | None = None,
    ):
        super().__init__()
        self.model, self.objective, self.optimiser, self.schedule = model, objective, optimiser, schedule
        self.gradient_clip, self.steps, self.tokens = gradient_clip, steps, tokens
        self.heldout_bytes, self.seed, self.score = heldout_bytes, seed, score
        self.group, self.passes, self.shard, self.spikes = group, passes, shard, spikes
        self.cut = shard is not None
        self.experts, self.rewinding = experts, rewinding
        self.logit_clip = None if clip_logits is None else LogitClip(model, clip_logits)
        if experts is not None:
            experts.leave_to_us(self)
        self.beside: Sequence[LanguageModel] = objective.begin(model)
        self.learnt_from: tuple[int, Batch] | None = None  # an experience, and the step that it was made in
        self.scores: dict = {}

    def configure_optimizers(self) -> dict:  # pyrefly: ignore[bad-override]
        optimizer = self.optimiser.build(self.model.roles(), self.model.width, self.tokens)
        schedule = scheduled(optimizer, self.schedule, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_model(self) -> None:
        if self.shard is not None:
            copies = [model for model in self.beside if model.embedding.weight.is_meta]  # of what `shard` begins with
            for model in (self.model, *copies):
                self.shard(model, self.device_mesh["data_parallel"])  # pyrefly: ignore[unsupported-operation]
            if self.logit_clip:
                watched(self.model)  # anew, since what it began to look for was on the meta device
            self.shard = None  # once: Lightning asks again before it evaluates

    def on_fit_start(self) -> None:
        for model in self.beside:
            model.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.zero_grad()
        # A generator made anew from (seed, step) needs no place in the checkpoint; torch takes 32 bits of a seed.
        drawn = np.random.SeedSequence([self.seed, self.global_step]).generate_state(1)
        generator = torch.Generator().manual_seed(int(drawn[0]))
        made_in = self.global_step - self.global_step % self.objective.updates
        if self.learnt_from is None or self.learnt_from[0] != made_in:
            with whole(self.model, *self.beside) if self.objective.writes else nullcontext():
                self.learnt_from = made_in, self.objective.experience(self.model, batch, generator)
        batch = self.learnt_from[1]
        parts = self.parts(len(batch.tokens_BT))
        if processes.number() * len(parts) > 1:
            return self._shared_step(batch, parts, generator)
        loss = self.objective.loss(self.model, batch, generator)
        self.auxiliary_losses = self.model.auxiliary_losses()
        loss = loss + sum(self.auxiliary_losses.values())
        self.loss, self.figures = loss.detach(), self.objective.telemetry()
        return loss

    def parts(self, sequences: int) -> list[slice]:
        """The rows of a batch of so many sequences that this process takes, pass by pass, whole groups of them."""
        number = processes.number() * (passes := self.passes(sequences))
        groups = sequences // self.group
        bounds = [groups * part // number * self.group for part in range(number + 1)]
        first = processes.rank() * passes
        return [slice(*bounds[i : i + 2]) for i in range(first, first + passes)]

    def _shared_step(self, batch: Batch, parts: list[slice], generator: torch.Generator) -> Tensor:
        """The loss of the last part, of which the gradient is still to be taken."""
        batch = replace(batch, noise=self.objective.noise(batch, generator))
        totals: dict[str, Tensor] = {}
        figures: dict[str, float] = {}

        def of_part(rows: slice) -> Tensor:
            part = batch.part(rows)
            losses = {"": self.objective.loss(self.model, part, generator)}
            losses |= {name: part.share * loss for name, loss in self.model.auxiliary_losses().items()}
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.detach().double()
            for name, figure in self.objective.telemetry().items():
                figures[name] = figures.get(name, 0.0) + part.share * figure
            # Strategies take the mean of gradients over processes.
            return torch.stack(list(losses.values())).sum() * processes.number()

        for rows in parts[:-1]:
            loss = of_part(rows)
            with torch.autocast(self.device.type, enabled=False):  # as around Lightning's own backward pass
                loss.backward()  # in the forward pass of DDP, which sums gradients after the last
        loss = of_part(parts[-1])
        shown = loss.new_tensor(list(figures.values()), dtype=torch.float64)
        summed = processes.summed(torch.cat([torch.stack(list(totals.values())), shown])).float()
        of_losses, of_figures = summed.split([len(totals), len(figures)])
        self.loss, self.auxiliary_losses = of_losses.sum(), dict(zip(list(totals)[1:], of_losses[1:], strict=True))
        self.figures = dict(zip(figures, of_figures.tolist(), strict=True))
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer) -> None:
        pass  # Lightning would do it between the passes of a step and the last of them

    def optimizer_step(self, *args, **kwargs) -> None:
        # Not in a hook at the batch's end, which would come after the checkpoint of the step is written.
        super().optimizer_step(*args, **kwargs)
        self.model.after_step()
        if self.logit_clip:
            self.logit_clip.after_step()
        if self.rewinding:
            self.rewinding.after(self.global_step, float(self.loss), self.model, self.trainer.optimizers[0])

    def on_after_backward(self) -> None:
        if self.experts is not None:
            self.experts.take_mean()

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        clip = torch.nn.utils.clip_grad_norm_ if self.experts is None else self.experts.clip
        self.gradient_norm = processes.gathered(clip(self.parameters(), self.gradient_clip))
        if self.spikes and self.spikes.at(self.global_step, float(self.gradient_norm)):
            self.zero_grad()  # what has no gradient is not moved, by momentum and decay either

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        if self.experts is not None:
            self.experts.gather(checkpoint, self, self.trainer.optimizers[0])
        if self.spikes:
            checkpoint["spikes"] = self.spikes.state()
        if self.rewinding:
            kept = checkpoint["rewinding"] = self.rewinding.state()
            if self.cut:
                kept["states"] = leave_to_all(checkpoint, kept["states"])
        if self.logit_clip:
            checkpoint["clipped_logits"] = self.logit_clip.clipped
        if self.objective.updates > 1 and self.learnt_from is not None:
            step, batch = self.learnt_from
            checkpoint["learnt_from"] = step, batch.tokens_BT, batch.weights_BT, batch.starts_BT, dict(batch.extras)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if self.experts is not None:  # before Lightning builds the optimiser, of which the order is asked
            self.experts.deal(checkpoint, self, self.configure_optimizers()["optimizer"])
        if self.spikes:
            self.spikes.load(checkpoint["spikes"])
        if self.rewinding:
            kept = checkpoint["rewinding"]
            if self.cut:
                like = partial(state_of, self.model, self.trainer.optimizers[0])
                kept["states"] = read_by_all(Path(str(self.trainer.ckpt_path)), kept["states"], like)
            self.rewinding.load(kept)
        if self.logit_clip:
            self.logit_clip.clipped = checkpoint["clipped_logits"]
        if "learnt_from" in checkpoint:
            step, *parts = checkpoint["learnt_from"]
            self.learnt_from = step, Batch(*parts).to(self.device)

    def on_validation_epoch_start(self) -> None:
        self.nats: list[tuple[Tensor, float]] = []  # and the variance of their sum, batch by batch

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        index = batch_idx * processes.number() + processes.rank()
        generator = torch.Generator().manual_seed(EVALUATION_SEED + index)
        likelihood = self.objective.evaluate(self.model, batch, generator)
        self.nats.append((likelihood.nats_B.cpu(), likelihood.variance))
        self.exact = likelihood.exact

    def on_validation_epoch_end(self) -> None:
        in_turn = [found for turn in zip(*processes.from_all(self.nats), strict=True) for found in turn]
        found, variances = zip(*in_turn[: self.trainer.datamodule.heldout_batches], strict=True)  # type: ignore
        nats = torch.cat(found)
        if not nats.isfinite().all():
            raise Diverged(f"held-out likelihood is not finite at step {self.global_step}")
        to_bits = 1 / (math.log(2) * self.heldout_bytes)
        self.heldout_nats = nats.numpy()
        self.bits_per_byte = nats.sum().item() * to_bits
        self.bits_per_byte_se = math.sqrt(sum(variances)) * to_bits
        self.bits_per_byte_data_se = nats.std().item() * math.sqrt(len(nats)) * to_bits if len(nats) > 1 else None
        self.scores = {} if self.score is None else self.score(self.model)
        self.evaluated_at = self.global_step
        self.log("bits_per_byte", self.bits_per_byte, prog_bar=True, logger=False)
