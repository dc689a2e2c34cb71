"""The log-likelihood of answers that a policy has written itself, as policy gradients differentiate it.

For autoregression it is exact. A masked or a block diffusion model has none that is cheap, and each of these classes is
one that has been published in its place. With a sampler whose order does not depend on the model, the trajectory is the
one whose gradient is unbiased; the tests print the angle of each to the exact gradient.

Shape letters: B sequences, T tokens, K passes, N sequences that passes gave something.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Batch, Objective
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.noise import uniform
from objectives.post_training.tuning import readings, repeated_noise

Masked = MaskedDiffusion | BlockDiffusion


class SampledLikelihood(ABC):
    """A stand-in for log p of sequences that were sampled. bases: the objectives that it can be read from."""

    bases: tuple[type[Objective], ...]

    def noise(self, base: Objective, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """Draw what chance decides of `log_probs`, as in `Objective`."""
        return {}

    def noise_of(self, base: Objective, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        """The noise that was drawn for a batch, or is drawn now."""
        return self.noise(base, batch, generator) if batch.noise is None else batch.noise

    def check(self, base: Objective) -> None:
        """
        Raises:
            ValueError: for a base that it cannot be read from.
        """
        if not isinstance(base, self.bases):
            able = ", ".join(kind.__name__ for kind in self.bases)
            raise ValueError(
                f"likelihood={type(self).__name__} cannot be read from {type(base).__name__}, only from {able}"
            )

    @abstractmethod
    def log_probs(self, base: Objective, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """Return parts [B, T] whose sum over a sequence's tokens stands for its log p, with gradients; 0 at tokens that
        do not count. extras["order"] [B, T]: the pass in which each token was drawn (`Samples.order_BT`)."""

    @abstractmethod
    def passes(self, drawn: int) -> float:
        """Passes of the network for a sequence with so many tokens drawn, at most."""


class Exact(SampledLikelihood):
    """The chain rule."""

    bases = (NextToken,)

    def log_probs(self, base: Objective, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        return -base.nats(model, batch, generator)

    def passes(self, drawn: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Bound(SampledLikelihood):
    """The bound, a mean of `draws` estimates (VRPO, arXiv 2505.19223; ESPO, 2512.03759)."""

    draws: int = 1
    bases = (MaskedDiffusion, BlockDiffusion)

    def noise(self, base: Objective, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        return repeated_noise(base, batch, self.draws, generator)

    def log_probs(self, base: Objective, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        noised = readings(batch, self.noise_of(base, batch, generator), self.draws)
        return -torch.stack([base.nats(model, reading, generator) for reading in noised]).mean(0)

    def passes(self, drawn: int) -> float:
        return float(self.draws)


class Trajectory(SampledLikelihood):
    """The probability of every token in the pass in which it was drawn, given what the pass saw: one pass of the
    network for each that the sampler took, all in one batch."""

    bases = (MaskedDiffusion, BlockDiffusion)

    def log_probs(self, base: Objective, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        assert isinstance(base, Masked)
        order_BT, counted_BT = batch.extras["order"], batch.counted_BT
        K, B = int(order_BT.max()) + 1, len(order_BT)
        pass_K11 = torch.arange(K, device=order_BT.device)[:, None, None]
        masked_KBT, now_KBT = (order_BT >= pass_K11) & counted_BT, (order_BT == pass_K11) & counted_BT
        some_KB = now_KBT.any(-1)  # a sequence that a pass gave nothing takes no part in its replay
        if batch.whole is not None and not some_KB.any():
            some_KB[0, 0] = True  # of nothing, since other processes wait for the gradients of all weights
        where = some_KB.nonzero(as_tuple=True)
        starts = None if batch.starts_BT is None else batch.starts_BT[where[1]]
        replay = Batch(batch.tokens_BT[where[1]], batch.weights_BT[where[1]], starts)
        nats_NT = base.masked_nats(model, replay, masked_KBT[where]) * now_KBT[where]
        return nats_NT.new_zeros(B, nats_NT.shape[1]).index_add(0, where[1], -nats_NT)

    def passes(self, drawn: int) -> float:
        return float(drawn)


@dataclass(frozen=True)
class OneStep(SampledLikelihood):
    """Every token from one pass with the whole answer masked, and each token of the prompt with a probability
    (diffu-GRPO, Zhao et al., arXiv 2504.12216: 0.15)."""

    mask_prompt: float = 0.0
    bases = (MaskedDiffusion,)

    def noise(self, base: Objective, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        return {"hidden": uniform(batch.counted_BT.shape, generator) < self.mask_prompt}

    def log_probs(self, base: Objective, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        assert isinstance(base, MaskedDiffusion)
        counted_BT = batch.counted_BT
        hidden_BT = self.noise_of(base, batch, generator)["hidden"].to(counted_BT.device) | counted_BT
        return -base.masked_nats(model, batch, hidden_BT) * counted_BT

    def passes(self, drawn: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Coupled(SampledLikelihood):
    """The mean of `OneStep` and of two passes that mask complementary parts of the answer, a fraction t of it between
    `low` and `high` and the rest, each weighted by the inverse of its fraction (coupled-GRPO, Gong et al., arXiv
    2506.20639)."""

    low: float = 0.2
    high: float = 0.8
    bases = (MaskedDiffusion,)

    def noise(self, base: Objective, batch: Batch, generator: Generator) -> Mapping[str, Tensor]:
        B, T = batch.tokens_BT.shape
        t_B1 = self.low + (self.high - self.low) * uniform((B, 1), generator)
        return {"fraction": t_B1, "hit": uniform((B, T), generator) < t_B1}

    def log_probs(self, base: Objective, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        assert isinstance(base, MaskedDiffusion)
        counted_BT, device = batch.counted_BT, batch.tokens_BT.device
        noise = self.noise_of(base, batch, generator)
        part_BT, t_B1 = noise["hit"].to(device) & counted_BT, noise["fraction"].to(device)
        rest_BT = counted_BT & ~part_BT
        three = replace(batch, tokens_BT=batch.tokens_BT.repeat(3, 1), weights_BT=batch.weights_BT.repeat(3, 1))
        masked = torch.cat([counted_BT, part_BT, rest_BT])
        whole_BT, first_BT, second_BT = base.masked_nats(model, replace(three, extras={}), masked).chunk(3)
        return -(whole_BT + first_BT / t_B1.to(first_BT) + second_BT / (1 - t_B1).to(second_BT)) / 2

    def passes(self, drawn: int) -> float:
        return 3.0
