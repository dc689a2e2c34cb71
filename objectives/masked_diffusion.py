"""Absorbing-state (masked) diffusion over tokens: MDLM, MD4, LLaDA, and SEDD's absorbing form.

Shape letters: B sequences, T tokens, D model width, V token ids of the data, N positions picked out of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL
from objectives.contracts import Batch, Model, Objective, Predictions, Request, Samples
from objectives.decoding.unmasking import Ancestral, Unmasking
from objectives.likelihood import Likelihood, bound_by, check_draws, nats_at, summed_nats
from objectives.noise import Polynomial, Schedule, check, draw_times, mask_some, uniform
from objectives.whole_sequence import hidden_of, logits_at, sampling_flops


class MaskedDiffusion(Objective):
    """Continuous-time absorbing diffusion (Sahoo et al., arXiv 2406.07524; Shi et al., 2406.04329): each token is
    masked with probability p, and

        -log p(x) <= integral_0^1 E[ (1 / p) sum over masked positions of -log p(x_i | the rest) ] dp

    The substitution parameterisation holds by construction: the loss and the samplers read the model at masked
    positions only, and the mask token's column is left out of the softmax. With it the denoising score entropy of SEDD
    (Lou et al., 2310.16834, absorbing) is this same integral, LLaDA's loss (2502.09992) the one of the linear schedule,
    and its mean over orders any-order autoregression (Ou et al., 2406.03736); the tests show all three.

    Args:
        vocab_size: number of token ids of the data; the mask token is one more.
        eot: not used; every objective is built with the same arguments.
        schedule: how often training sees which p.
        times: how a batch's times are drawn (see `draw_times`).
        weighting: of the training loss: "bound", or "flat" for a weight of 1 in place of 1 / p, whose loss varies less
            and is no bound. What is reported is the bound either way.
        complementary: whether training reads a batch twice, the second time with those tokens masked that were not the
            first time (LLaDA 2.0, arXiv 2512.15745): each is predicted once, for twice the passes.
        timed: whether the model is told p. The tokens show it, so it is not by default.
        evaluation_draws: independent draws of masks for `evaluate`, at least 2 (their spread gives the error).

    Raises:
        ValueError: for a schedule that does not end with every token masked, or an option that is not one of these.
    """

    visibility = BIDIRECTIONAL
    samplers = (Unmasking,)

    def __init__(
        self,
        vocab_size: int,
        eot: int,
        schedule: Schedule = Polynomial(),
        times: str = "stratified",
        weighting: str = "bound",
        complementary: bool = False,
        timed: bool = False,
        evaluation_draws: int = 2,
    ):
        check(schedule, times)
        check_draws(evaluation_draws)
        if weighting not in ("bound", "flat"):
            raise ValueError(f"weighting={weighting!r} must be 'bound' or 'flat'")
        self.vocab_size, self.mask = vocab_size, vocab_size
        self.model_vocab_size = vocab_size + 1
        self.model_options = {"timed": True} if timed else {}
        self.schedule, self.times, self.weighting, self.timed = schedule, times, weighting, timed
        self.complementary, self.evaluation_draws = complementary, evaluation_draws

    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`: the head runs on masked tokens, in the mean over times."""
        if self.complementary:
            return 2 * model.flops(T, BIDIRECTIONAL, counted / 2)
        t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        return model.flops(T, BIDIRECTIONAL, counted * self.schedule.noised(t).mean().item())

    def _hidden(self, model: Model, batch: Batch, masked_BT: Tensor, p_B: Tensor) -> Tensor:
        """Hidden vectors [B, T, D] where these tokens are masked; p_B: the fraction of tokens noised."""
        noised_BT = batch.tokens_BT.masked_fill(masked_BT, self.mask)
        return hidden_of(model, noised_BT, BIDIRECTIONAL.packed(batch.starts_BT), p_B if self.timed else None)

    def _logits(self, model: Model, batch: Batch, masked_BT: Tensor, p_B: Tensor) -> Tensor:
        """Logits [N, V] at masked positions from all other tokens."""
        return model.logits(self._hidden(model, batch, masked_BT, p_B)[masked_BT])[:, : self.vocab_size]

    def masked_nats(self, model: Model, batch: Batch, masked_BT: Tensor, p_B: Tensor | None = None) -> Tensor:
        """-log p(x_i | unmasked tokens) at masked positions, 0 elsewhere, [B, T]. p_B: the fraction of tokens noised,
        for a timed model; None for that of masked_BT."""
        p_B = masked_BT.double().mean(1) if p_B is None else p_B
        return nats_at(self._logits(model, batch, masked_BT, p_B), batch.tokens_BT, masked_BT)

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """As in `Objective`: all tokens that count are masked together."""
        return self._logits(model, batch, batch.counted_BT, batch.counted_BT.double().mean(1))

    def noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """As in `Objective`: times, and where tokens are masked at them."""
        t_B = draw_times(len(batch.tokens_BT), self.times, generator)
        hit_BT = uniform(batch.tokens_BT.shape, generator) < self.schedule.noised(t_B)[:, None]
        return {"time": t_B, "masked": hit_BT.to(batch.tokens_BT.device)}

    def _readings(self, batch: Batch, generator: Generator) -> tuple[Batch, Tensor, Tensor, Tensor]:
        """Return what training reads: the sequences, twice over where it is complementary; the tokens that count and
        are masked [B, T]; the fraction of noise [B]; and the weights [B, T] of the bound."""
        noise = self.noise_of(batch, generator)
        t_B, masked_BT = noise["time"], noise["masked"]
        p_B, rate_B = self.schedule.noised(t_B), self.schedule.rate(t_B)
        weight_B, where_BT = rate_B / p_B, masked_BT & batch.counted_BT
        if self.complementary:
            starts = None if batch.starts_BT is None else torch.cat([batch.starts_BT] * 2)
            where_BT = torch.cat([where_BT, batch.counted_BT & ~masked_BT])
            batch = Batch(torch.cat([batch.tokens_BT] * 2), torch.cat([batch.weights_BT] * 2), starts)
            weight_B, p_B = torch.cat([weight_B, rate_B / (1 - p_B)]) / 2, torch.cat([p_B, 1 - p_B])
        return batch, where_BT, p_B, weight_B.to(where_BT.device)[:, None].expand_as(where_BT)

    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        """As in `Objective`: the tokens that are masked at a time drawn."""
        read, where_BT, p_B, weights_BT = self._readings(batch, generator)
        logits_NV = self._logits(model, read, where_BT, p_B)
        if not self.complementary:
            return Predictions(logits_NV, where_BT, weights_BT)
        # Each token that counts is in one of the two readings; they are brought into the order of the batch.
        first_BT, (first_weights_BT, rest_weights_BT) = where_BT.chunk(2)[0], weights_BT.chunk(2)
        first_N = first_BT[batch.counted_BT]
        order_N = torch.cat([first_N.nonzero()[:, 0], (~first_N).nonzero()[:, 0]]).argsort()
        return Predictions(
            logits_NV[order_N], batch.counted_BT, torch.where(first_BT, first_weights_BT, rest_weights_BT)
        )

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`: a one-draw estimate of the bound, or of what `weighting` says."""
        read, where_BT, p_B, weights_BT = self._readings(batch, generator)
        weights_BT = read.weights_BT * weights_BT if self.weighting == "bound" else read.weights_BT
        hidden_BTD = self._hidden(model, read, where_BT, p_B)
        total, _ = summed_nats(model, hidden_BTD, read.tokens_BT, weights_BT, where_BT, self.vocab_size)
        return total / batch.all_counted.clamp_min(1)

    @torch.no_grad()
    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        """As in `Objective`: the bound over all p, with p integrated out (see `mask_some`), which varies less than with
        times drawn."""

        def draw(generator: Generator) -> Tensor:
            masked_BT, weight_B, p_B = mask_some(batch.counted_BT, generator)
            masked_BT = masked_BT.to(batch.tokens_BT.device)
            hidden_BTD, ones_BT = self._hidden(model, batch, masked_BT, p_B), torch.ones_like(batch.weights_BT)
            _, nats_BT = summed_nats(model, hidden_BTD, batch.tokens_BT, ones_BT, masked_BT, self.vocab_size)
            return nats_BT.double().sum(1) * weight_B.to(nats_BT.device)

        return bound_by(draw, self.evaluation_draws, generator)

    def denoiser(self, model: Model) -> "WholeSequence":
        return WholeSequence(model, self.mask, self.vocab_size, self.timed)

    def default_sampler(self, request: Request) -> Ancestral:
        """A quarter as many steps as masked positions."""
        _, masked_BT = request.canvas(self.mask)
        return Ancestral(-(-int(masked_BT.sum(1).max()) // 4))

    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        return sampling_flops(model, samples)


@dataclass(frozen=True)
class WholeSequence:
    """A model that runs the whole sequence in every pass; see `MaskedDenoiser`."""

    model: Model
    mask: int
    vocab_size: int
    timed: bool

    def __call__(self, tokens_BT: Tensor, where_BT: Tensor, noised_B: Tensor) -> Tensor:
        told_B = noised_B if self.timed else None
        return logits_at(self.model, tokens_BT, where_BT, BIDIRECTIONAL, told_B)[:, : self.vocab_size]
