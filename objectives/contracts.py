"""The contracts of this floor: an objective or a sampler, which a contributor writes, and the records between them.

An objective says what it needs of a model, what training minimises, what held-out sequences are worth under it, and how
a model trained on it denoises; decoding does the rest. A new one is one class in one file and one config in
configs/objective or configs/sampler: the tests in tests/contracts then find it and hold it to all that is said here.

Shape letters: B sequences, T tokens, D model width, V token ids of the data, N positions picked out of a batch, P
    prompts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from archs.adapters import training_flops
from archs.contracts import State
from archs.language_model import LanguageModel
from archs.visibility import Visibility
from objectives.decoding.draws import Draw
from objectives.likelihood import Likelihood, mean_nats, nats_at

MASKED = -1  # stands in a prompt for a token to be filled in


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences to be learnt from or to be scored.

    tokens_BT: int64.
    weights_BT: float32, what the loss of each token counts: 1 in pre-training, the mask of answers in tuning. Tokens of
        weight 0 are given: they are neither noised nor predicted.
    starts_BT: bool, True where a packed document begins, or None where each sequence is one document.
    extras: whatever else an objective asks its data for, by name; the first axis is B.
    noise: what chance decided of its loss (see `Objective.noise`), or None where that is still to be drawn.
    whole: the batch that it is a part of, or None. The losses of the parts sum to the loss of the whole.
    """

    tokens_BT: Tensor
    weights_BT: Tensor
    starts_BT: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    noise: Mapping[str, Tensor] | None = None
    whole: Batch | None = None

    @classmethod
    def of(cls, tokens_BT: Tensor) -> Batch:
        """Sequences of which every token counts the same."""
        return cls(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.float32))

    @cached_property
    def counted_BT(self) -> Tensor:
        """True at the tokens that are predicted and scored."""
        return self.weights_BT != 0

    @cached_property
    def all_counted(self) -> Tensor:
        """The number of tokens that count in the whole batch, a scalar: what the sums of a loss are divided by."""
        return (self if self.whole is None else self.whole).counted_BT.sum()

    @property
    def share(self) -> float:
        """The fraction of the sequences of the whole batch that are here, 1 where it is whole."""
        return 1.0 if self.whole is None else len(self.tokens_BT) / len(self.whole.tokens_BT)

    def part(self, rows: slice) -> Batch:
        """These sequences of the batch, as a part of it."""
        cut = lambda tensors: tensors and {name: x[rows] for name, x in tensors.items()}  # noqa: E731
        starts_BT = None if self.starts_BT is None else self.starts_BT[rows]
        tensors = self.tokens_BT[rows], self.weights_BT[rows], starts_BT
        return Batch(*tensors, cut(self.extras), cut(self.noise), self if self.whole is None else self.whole)

    def to(self, device: torch.device, **kwargs: Any) -> Batch:
        """The same on another device, as `Tensor.to`."""
        move = lambda x: None if x is None else x.to(device, **kwargs)  # noqa: E731
        tensors = {name: move(getattr(self, name)) for name in ("tokens_BT", "weights_BT", "starts_BT", "whole")}
        named = (self.extras, self.noise)
        extras, noise = (some and {name: move(x) for name, x in some.items()} for some in named)
        return replace(self, **tensors, extras=extras, noise=noise)


class Model(Protocol):
    """A model as objectives and samplers ask for it: `LanguageModel`, or what stands in for one in a test."""

    def hidden(self, tokens_BT: Tensor, visibility: Visibility, time: Tensor | None = None) -> Tensor: ...

    def extend(
        self, tokens_BT: Tensor, states: list[State], visibility: Visibility, time: Tensor | None = None
    ) -> tuple[Tensor, list[State]]: ...

    def empty_states(self, batch: int) -> list[State]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Request:
    """Sequences wanted of a sampler.

    prompts: P of int64 [any length], -1 (`MASKED`) where a token is to be filled in.
    length: tokens of each sequence, its prompt included.
    generator: all chance comes from here.
    draw: how ids are drawn from what the model says.
    copies: sequences per prompt. They stand side by side in what is returned.
    stop: ids that end a sequence once they have been drawn.

    Raises:
        ValueError: for no prompt, fewer than one copy, or a prompt that leaves nothing to fill.
    """

    prompts: Sequence[Tensor]
    length: int
    generator: Generator
    draw: Draw = Draw()
    copies: int = 1
    stop: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.prompts or self.copies < 1:
            raise ValueError(f"{len(self.prompts)} prompts of {self.copies} copies: ask for at least one of one")
        for prompt_T in self.prompts:
            known = int((prompt_T != MASKED).sum())
            if len(prompt_T) > self.length or known == self.length:
                raise ValueError(
                    f"length={self.length} leaves nothing to fill behind or within a prompt of {len(prompt_T)} tokens: "
                    "ask for more, or mark masked positions in it"
                )

    def canvas(self, filler: int) -> tuple[Tensor, Tensor]:
        """The prompts brought to `length`, each so many times: tokens [B, length] with the filler where one is wanted,
        and True there."""
        tokens_PT = torch.full((len(self.prompts), self.length), MASKED, device=self.prompts[0].device)
        for row_T, prompt_T in zip(tokens_PT, self.prompts, strict=True):
            row_T[: len(prompt_T)] = prompt_T
        tokens_BT = tokens_PT.repeat_interleave(self.copies, dim=0)
        masked_BT = tokens_BT == MASKED
        return tokens_BT.masked_fill(masked_BT, filler), masked_BT


@dataclass(frozen=True, eq=False)
class Samples:
    """Sequences that a sampler has made.

    tokens_BT: int64, prompts included.
    lengths_B: tokens up to the first stop token that was drawn, it included; T where none was. What stands behind is
        without meaning.
    log_probs_BT: float64, log-probability of each token that was drawn under the distribution that it was drawn from,
        in the pass in which it got its last value; 0 for the tokens of the prompt.
    order_BT: int64, the number of that pass, from 0 on; within its block, where blocks are filled one after the other.
        -1 for the tokens of the prompt.
    evaluations: passes of the network, and predictions: tokens that the head was run on; both per sequence, in the
        mean.
    """

    tokens_BT: Tensor
    lengths_B: Tensor
    log_probs_BT: Tensor
    order_BT: Tensor
    evaluations: float
    predictions: float

    @cached_property
    def answers_BT(self) -> Tensor:
        """True at the tokens that were drawn, up to the first stop token among them, it included."""
        place_T = torch.arange(self.order_BT.shape[1], device=self.order_BT.device)
        return (self.order_BT >= 0) & (place_T < self.lengths_B[:, None])


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of a model for some tokens of a batch in one pass.

    logits_NV: of the N tokens where where_BT is true. weights_BT: factors by which the nats of these tokens, summed,
    estimate those of the whole sequence without bias.
    """

    logits_NV: Tensor
    where_BT: Tensor
    weights_BT: Tensor


class Sampler(ABC):
    """A way to fill masked positions, or to continue, with what a denoiser says."""

    @property
    def blind(self) -> bool:
        """Return True where the place that it writes next does not depend on what the denoiser says, and what it has
        written stays. Then the probabilities with which its tokens were drawn multiply to that of the samples, given
        the order."""
        return False

    @abstractmethod
    def __call__(self, denoiser: Any, request: Request) -> Samples:
        """Sequences for the request. Each kind of sampler says what its denoiser is to be able to do."""


class Objective(ABC):
    """The objective that a model is trained on.

    vocab_size: token ids of the data; model_vocab_size: those that the model needs (a mask token is one more).
    visibility: what training asks of the mixers.
    model_options: parts that it needs of the model, as options of `LanguageModel`.
    samplers: the kinds of sampler that can decode it.
    evaluation_draws: passes of the network that `evaluate` takes over a sequence.
    updates: optimiser steps that are taken on one `experience`.
    answers: sequences of an experience for each sequence of the data.
    even: whether it brings as many tokens of every sequence through the model.
    reads_head: whether its loss reads the head of the model.
    writes: whether `experience` runs the model, for which all its weights are on every device.
    reads_weights: whether its loss is of the weights themselves too.

    The losses of a batch's parts sum to its loss, so that several processes, or passes, can share a step: sums over
    tokens are divided by what counts in the whole batch (`Batch.all_counted`), means over sequences weighed by
    `Batch.share`, and all chance of the loss is drawn in `noise`.
    """

    vocab_size: int
    model_vocab_size: int
    visibility: Visibility
    model_options: Mapping[str, Any]
    samplers: tuple[type[Sampler], ...]
    evaluation_draws: int = 1
    updates: int = 1
    answers: int = 1
    even: bool = True
    reads_head: bool = True
    writes: bool = False
    reads_weights: bool = False

    def check(self, model: LanguageModel, sequence_length: int) -> None:
        """
        Raises:
            ValueError: when this objective cannot be trained with this model or on sequences of this length.
        """
        kind, able = self.visibility.kind, model.visibilities
        if kind not in able:
            raise ValueError(
                f"it needs {kind.value} visibility, and a mixer of the model can only do "
                f"{sorted(k.value for k in able)}: choose another arch, or an objective with a visibility that it has"
            )

    @abstractmethod
    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """Forward FLOPs of training on one document of T tokens, a fraction `counted` of which are predicted."""

    def training_flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """FLOPs of training on one document, as `flops` but forward, backward and all: each matrix product is run once
        forward and twice backward, but once where its weights are frozen."""
        return training_flops(model, lambda m: self.flops(m, T, counted))

    def begin(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """Take what is to be remembered of the model before its first step; return the models that stand still beside
        it, to be kept on its device."""
        return ()

    def experience(self, model: LanguageModel, batch: Batch, generator: Generator) -> Batch:
        """Return what `updates` steps learn from, made of a batch of the data: the batch itself, unless an objective
        has the model write answers of its own. Without gradients."""
        return batch

    def telemetry(self) -> dict[str, float]:
        """Figures of the last loss that are worth watching, by name; none before it."""
        return {}

    def written(self) -> Sequence[tuple[Tensor, float]]:
        """Sequences [T] of the last experience that the model wrote, up to their ends, each with its reward."""
        return ()

    def noise(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """Draw what chance decides of the loss of a batch, by name, the first axis B; {} where nothing is."""
        return {}

    def noise_of(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """The noise that was drawn for a batch, or is drawn now."""
        return self.noise(batch, generator) if batch.noise is None else batch.noise

    @abstractmethod
    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        """Return what the model says of tokens that count, from what training lets each be seen from; with gradients.
        All chance comes from the generator."""

    def nats(self, model: Model, batch: Batch, generator: Generator) -> Tensor:
        """A one-draw estimate of -log p, or of its bound, token by token, [B, T] with gradients; 0 at tokens that do
        not count."""
        said = self.predictions(model, batch, generator)
        nats_BT = nats_at(said.logits_NV, batch.tokens_BT, said.where_BT)
        return nats_BT * said.weights_BT.to(nats_BT)

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """Return what training minimises, a scalar with gradients: nats per token that counts, each times its weight,
        and what the objective adds. All chance comes from the generator. Of a part of a batch (`Batch.whole`) its part
        of that."""
        return mean_nats(self.nats(model, batch, generator), batch.weights_BT, batch.all_counted)

    @abstractmethod
    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        """Nats of the tokens of each sequence that count given those that do not, exact or as an upper bound."""

    @abstractmethod
    def logits(self, model: Model, batch: Batch) -> Tensor:
        """Logits [N, V] of the N tokens that count, each from what the objective lets a prediction see: what accuracy
        is read from."""

    @abstractmethod
    def denoiser(self, model: Model) -> Any:
        """A trained model as the samplers of this objective ask for it."""

    @abstractmethod
    def default_sampler(self, request: Request) -> Sampler:
        """The sampler that is taken where none is named."""

    @torch.no_grad()
    def sample(self, model: Model, request: Request, sampler: Sampler | None = None) -> Samples:
        """Sequences by a sampler; None for the default one.

        Raises:
            ValueError: for a kind of sampler that cannot decode this objective.
        """
        sampler = self.default_sampler(request) if sampler is None else sampler
        if not isinstance(sampler, self.samplers):
            able = ", ".join(kind.__name__ for kind in self.samplers)
            raise ValueError(
                f"{type(self).__name__} cannot be decoded by {type(sampler).__name__}: it takes one of {able}"
            )
        return sampler(self.denoiser(model), request)

    @abstractmethod
    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        """FLOPs per sequence of these samples."""
