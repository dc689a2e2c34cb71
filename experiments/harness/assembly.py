"""From a run's config to what the run will be, before anything is trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from omegaconf import DictConfig

from archs.channels.router import Router
from archs.costs import Costs, costs
from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.data.windows import check_enough, document_lengths
from experiments.harness.budget import Allocation, allocate
from experiments.harness.identity import Run
from experiments.harness.logit_clip import watched
from experiments.harness.optimisers import Optimiser
from experiments.harness.parts import build, build_adapter, build_model, build_objective
from experiments.harness.schedules import Schedule
from experiments.harness.trainer import Trainer
from experiments.harness.weights import load_trained
from objectives.contracts import Objective
from objectives.post_training.tuning import Trained, Tuning


@dataclass(frozen=True)
class Measured:
    """A run's model before it is trained, or even given memory.

    forward: FLOPs of one forward pass per token. flops_per_step: what the optimiser costs in each step. objective,
    optimiser: the parts themselves. averaged: whether a loss of the model is a mean over the tokens of a pass;
    balanced: whether it is of all of them together. experts: the numbers of experts in its mixtures.
    """

    costs: Costs
    forward: float
    depth: int
    flops_per_step: float
    objective: Objective
    optimiser: Optimiser
    averaged: bool
    balanced: bool
    experts: frozenset[int]

    def evaluation_flops(self, data: TokenData) -> float:
        """Returns what one evaluation on all held-out tokens costs."""
        return self.forward * self.objective.evaluation_draws * len(data.heldout)


@dataclass(frozen=True)
class Prepared:
    """The costs and tokens of a run, known before anything is trained."""

    measured: Measured
    allocation: Allocation
    trainer: Trainer
    schedule: Schedule
    device: torch.device
    precision: str
    compiled: bool

    def __str__(self) -> str:
        """Returns what a person wants to know before it begins."""
        params, allocation = self.measured.costs.params_total, self.allocation
        return (
            f"{params:,} parameters, {allocation.steps:,} steps of {allocation.tokens / allocation.steps:,.0f} tokens, "
            f"{allocation.flops:.3g} FLOPs, {self.precision}{', compiled' if self.compiled else ''}"
        )


def model_on_meta(config: DictConfig, objective: Objective) -> LanguageModel:
    """Returns the model that a run trains, its adapters included, on the meta device."""
    with torch.device("meta"):
        model = build_model(config, objective)
        if adapter := build_adapter(config):
            adapter.adapt(model)
    return model


def measure(config: DictConfig, data: TokenData, trained: Mapping[str, Trained] = MappingProxyType({})) -> Measured:
    """Costs of a run's model, which is built on the meta device. trained: the models that its objective asks for, by
    name.

    Raises:
        ValueError: when backbone and objective, or objective and length, do not go together.
    """
    if data.filled and config.data.packed:
        raise ValueError(
            f"data.packed=true would set apart each end that fills a window of {data.name}: set data.packed=false"
        )
    objective, optimiser = build_objective(config, data, trained), build(config.optim)
    T = config.data.sequence_length
    model = model_on_meta(config, objective)
    try:
        objective.check(model, T)
    except ValueError as error:
        raise ValueError(f"objective={config.objective.name} with arch={config.arch.name}: {error}") from error
    lengths = document_lengths(data.train, data.eot, T) if config.data.packed else {T: 1.0}

    def whole(flops: Callable[..., float]) -> float:
        return sum(number * flops(model, length, data.counted) for length, number in lengths.items())

    forward, training = whole(objective.flops), whole(objective.training_flops)
    if config.trainer.get("clip_logits") is not None:
        try:
            watched(model)
        except ValueError as error:
            raise ValueError(
                f"trainer.clip_logits={config.trainer.clip_logits} with arch={config.arch.name}: {error}"
            ) from error
        training += whole(objective.flops) - forward  # in no backward pass
    per_step = optimiser.flops(model.roles())
    routers = [part for part in model.modules() if isinstance(part, Router)]
    balanced = any(router.balance_loss for router in routers)
    averaged = balanced or any(router.z_loss for router in routers)
    cost = costs(model, T, training)
    experts = frozenset(router.experts for router in routers)
    return Measured(cost, forward / T, model.depth, per_step, objective, optimiser, averaged, balanced, experts)


def spend(config: DictConfig, data: TokenData, measured: Measured) -> Allocation:
    """Tokens, steps and batches that the budget pays for.

    Raises:
        ValueError: when it pays for less than one step, or the corpus is shorter than the run and data.allow_repeats is
            false.
    """
    allocation = allocate(
        config.budget.flops,
        measured.costs.flops_per_token,
        config.data.sequence_length,
        config.budget.batch_tokens,
        measured.flops_per_step,
        data.group,
    )
    check_enough(len(data.train), allocation.tokens, config.data.allow_repeats)
    return allocation


def prepare_run(run: Run, data: TokenData) -> Prepared:
    """Return what a run will be. Raises ValueError as `measure` and `spend` do, for a trainer that is not there, and
    for a run that cannot be spread as it is asked for."""
    config = run.config
    trainer: Trainer = build(config.trainer, **run.spread)
    schedule: Schedule = build(config.schedule)
    measured = measure(config, data, load_trained(run.others))
    allocation, device = spend(config, data, measured), trainer.device()
    _check_mending(config, trainer, measured.objective)
    _check_spread(config, data, trainer, measured, allocation)
    precision = trainer.precision_on(device, config.arch.width)
    compiled = trainer.compiles(device, allocation.flops)
    return Prepared(measured, allocation, trainer, schedule, device, precision, compiled)


def _check_spread(
    config: DictConfig, data: TokenData, trainer: Trainer, measured: Measured, allocation: Allocation
) -> None:
    """
    Raises:
        ValueError: for batches that the run's processes and passes cannot share.
    """
    groups, objective = allocation.sequences // allocation.group, measured.objective
    per_step = groups // allocation.steps, -(-groups // allocation.steps)
    least, most = (n * allocation.group * objective.answers for n in per_step)
    passes = trainer.passes(most)
    asked = f"trainer.devices={trainer.devices}, nodes={trainer.nodes}, microbatch={trainer.microbatch}"
    _check_experts(config, trainer, measured)
    if trainer.sharded and objective.reads_weights:
        raise ValueError(
            f"objective={config.objective.name} reads the weights of the model, which trainer.strategy=fsdp has cut: "
            "choose ddp"
        )
    if trainer.sharded and not objective.even:
        raise ValueError(
            f"objective={config.objective.name} brings some sequences through the model more often than others, and "
            "under trainer.strategy=fsdp all devices pass through it together: choose ddp"
        )
    if not trainer.divides(most) and not trainer.sharded:
        return
    if measured.averaged and not objective.even:
        raise ValueError(
            f"{asked}: losses of arch={config.arch.name}'s router are means over tokens, and "
            f"objective={config.objective.name} brings more of some sequences through the model than of others, so "
            "parts of a batch do not add up: take devices=1 and microbatch=null, or no balance_loss and z_loss"
        )
    if passes > 1 and measured.balanced:
        raise ValueError(
            f"{asked}: the balance of arch={config.arch.name}'s experts is of all tokens of a step together, which "
            f"{passes} passes one after the other do not see: take microbatch=null, or a balance_loss of 0"
        )
    if least // allocation.group // trainer.processes < passes:
        raise ValueError(
            f"{asked}: steps of {least} to {most} sequences leave a pass without one: raise budget.batch_tokens or "
            "microbatch, or take fewer devices"
        )


def _check_mending(config: DictConfig, trainer: Trainer, objective: Objective) -> None:
    """
    Raises:
        ValueError: for a run that cannot go back to earlier states, or whose logits cannot be clipped.
    """
    for name in ("rewind_spikes", "clip_logits"):
        if getattr(trainer, name) is None:
            continue
        asked = f"trainer.{name}={getattr(trainer, name)}"
        if isinstance(objective, Tuning):
            raise ValueError(f"{asked} is of pre-training, not of objective={config.objective.name}: set it to null")
    if trainer.rewind_spikes is not None and trainer.experts > 1:
        raise ValueError(
            f"trainer.rewind_spikes={trainer.rewind_spikes} needs all experts on every device: take experts=1, or set "
            "it to null"
        )
    if trainer.clip_logits is not None and config.get("adapter"):
        raise ValueError(
            f"trainer.clip_logits={trainer.clip_logits} scales weights that adapters leave as they are: set "
            "adapter=none, or it to null"
        )


def _check_experts(config: DictConfig, trainer: Trainer, measured: Measured) -> None:
    """
    Raises:
        ValueError: for experts that cannot be dealt out as they are asked to be.
    """
    if trainer.experts == 1:
        return
    asked = f"trainer.experts={trainer.experts}"
    if trainer.sharded:
        raise ValueError(f"{asked} deals out experts beside copies of all else: take strategy=ddp, or experts=1")
    if trainer.processes % trainer.experts:
        raise ValueError(f"{asked} does not divide the {trainer.processes} processes: choose a number that does")
    if not measured.experts:
        raise ValueError(f"{asked}: arch={config.arch.name} has no experts: take experts=1, or a mixture of experts")
    if rest := [number for number in sorted(measured.experts) if number % trainer.experts]:
        raise ValueError(
            f"{asked} does not divide the {rest[0]} experts of arch={config.arch.name}: choose a number that does"
        )
