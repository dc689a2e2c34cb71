"""What objectives of post-training share: the likelihood that they tune, models that stand still, and rewards.

Shape letters: B sequences, T tokens, V token ids, N positions picked out of a batch.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Generator, Tensor

from archs.contracts import State
from archs.language_model import LanguageModel
from archs.visibility import CAUSAL, Visibility
from objectives.contracts import Batch, Model, Objective, Predictions, Request, Sampler, Samples
from objectives.likelihood import Likelihood


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that stands still, with the objective that reads and decodes it."""

    model: LanguageModel
    objective: Objective


class Reward(ABC):
    """The worth of finished sequences. models: those that it is read from, which stand still."""

    models: tuple[LanguageModel, ...] = ()

    @abstractmethod
    def __call__(self, tokens_BT: Tensor, drawn_BT: Tensor) -> Tensor:
        """Rewards [B] float64 of sequences. drawn_BT: True at the answer, its end-of-text token included; what stands
        before it is the prompt, and what stands behind has no meaning."""

    @abstractmethod
    def flops(self, T: int) -> float:
        """FLOPs of the reward of one sequence of T tokens."""


class Tuning(Objective):
    """An objective that changes what another has taught a model.

    The other, `base`, says how the model reads and writes and what held-out answers are worth under it. eot: id of the
    end-of-text token, which ends an answer.
    """

    def __init__(self, base: Objective, eot: int):
        self.base, self.eot = base, eot
        self.vocab_size, self.model_vocab_size = base.vocab_size, base.model_vocab_size
        self.visibility, self.model_options, self.samplers = base.visibility, base.model_options, base.samplers
        self.evaluation_draws = base.evaluation_draws
        self.figures: dict[str, float] = {}

    def check(self, model: LanguageModel, sequence_length: int) -> None:
        self.base.check(model, sequence_length)

    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`: those of the base. What tuning costs besides is in `training_flops`."""
        return self.base.flops(model, T, counted)

    def telemetry(self) -> dict[str, float]:
        return self.figures

    def noise(self, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        return self.base.noise(batch, generator)

    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        return self.base.predictions(model, batch, generator)

    def nats(self, model: Model, batch: Batch, generator: Generator) -> Tensor:
        return self.base.nats(model, batch, generator)

    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        return self.base.evaluate(model, batch, generator)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        return self.base.logits(model, batch)

    def denoiser(self, model: Model) -> Any:
        return self.base.denoiser(model)

    def default_sampler(self, request: Request) -> Sampler:
        return self.base.default_sampler(request)

    def sample(self, model: Model, request: Request, sampler: Sampler | None = None) -> Samples:
        return self.base.sample(model, request, sampler)

    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        return self.base.sampling_flops(model, request, samples)


def standing_still(model: LanguageModel) -> LanguageModel:
    """Return a copy of a model that no step changes."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextmanager
def evaluating(model: LanguageModel) -> Iterator[None]:
    """Lets a model that is in training write or be read as it would be afterwards, without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def draw_seed(generator: Generator) -> int:
    """A seed by which several passes can share their noise."""
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def repeated_noise(base: Objective, batch: Batch, draws: int, generator: Generator) -> dict[str, Tensor]:
    """The noise of a base for so many readings of a batch, by name, [B, draws, ...]."""
    drawn = [base.noise(batch, generator) for _ in range(draws)]
    return {name: torch.stack([noise[name] for noise in drawn], 1) for name in drawn[0]}


def readings(batch: Batch, noise: Mapping[str, Tensor], draws: int) -> list[Batch]:
    """The batch with each draw of a `repeated_noise`."""
    return [replace(batch, noise={name: x[:, i] for name, x in noise.items()}) for i in range(draws)]


def prompts_of(batch: Batch) -> list[Tensor]:
    """The tokens of each window before the first that counts.

    Raises:
        ValueError: for a window in which nothing counts: it asks for no answer.
    """
    if not batch.counted_BT.any(1).all():
        raise ValueError(
            "a window of the data marks no answer, so there is nothing to ask for: choose data with prompts and answers"
        )
    first_B = batch.counted_BT.byte().argmax(1).tolist()
    return [tokens_T[:first] for tokens_T, first in zip(batch.tokens_BT, first_B, strict=True)]


def writing_flops(
    objective: Objective, model: LanguageModel, T: int, counted: float, copies: int, sampler: Sampler | None
) -> float:
    """FLOPs of one sequence that a sampler writes without stopping before the end: `copies` continuations of a prompt
    that is a fraction 1 - counted of T tokens. The sampler is run, on a model that knows nothing."""
    prompt_T = torch.zeros(min(T - 1, round((1 - counted) * T)), dtype=torch.long)
    request = Request([prompt_T], T, torch.Generator().manual_seed(0), copies=copies)
    samples = objective.sample(Blank(objective.model_vocab_size), request, sampler)
    return objective.sampling_flops(model, request, samples)


@dataclass(frozen=True)
class Blank:
    """Answers as a `Model` does, that every token is as likely as any other."""

    vocab_size: int

    def empty_states(self, batch: int) -> list[State]:
        return [Seen(0)]

    def hidden(self, tokens_BT: Tensor, visibility: Visibility = CAUSAL, time: Tensor | None = None) -> Tensor:
        return torch.zeros(*tokens_BT.shape, 1)

    def extend(
        self, tokens_BT: Tensor, states: list[State], visibility: Visibility = CAUSAL, time: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        return self.hidden(tokens_BT), [Seen(states[0].length + tokens_BT.shape[1])]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden.expand(*hidden.shape[:-1], self.vocab_size)


@dataclass(frozen=True)
class Seen(State):
    """The number of tokens before, all that is remembered of them."""

    tokens: int

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def nbytes(self) -> int:
        return 0

    def repeat(self, copies: int) -> Self:
        return self
