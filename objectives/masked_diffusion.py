"""Absorbing-state (masked) diffusion over tokens: MDLM, MD4, LLaDA, and SEDD's absorbing form."""

import torch
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL
from objectives.likelihood import Likelihood, bound_by, check_draws, everywhere, mean_nats, nats_at
from objectives.noise import Polynomial, Schedule, check, draw_times, mask_some, uniform
from objectives.sampling import Ancestral, Draw, Sampler, Samples, gaps_of


class MaskedDiffusion:
    """Continuous-time absorbing diffusion (Sahoo et al., arXiv 2406.07524; Shi et al., 2406.04329): each token is masked
    with probability p, and

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
        timed: whether the model is told p. The tokens show it, so it is not by default.
        evaluation_draws: independent draws of masks for `bound`, at least 2 (their spread gives the error).

    Raises:
        ValueError: for a schedule that does not end with every token masked, or an option that is not one of these.
    """

    visibility = BIDIRECTIONAL

    def __init__(
        self,
        vocab_size: int,
        eot: int,
        schedule: Schedule = Polynomial(),
        times: str = "stratified",
        weighting: str = "bound",
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
        self.evaluation_draws = evaluation_draws

    def flops(self, model: LanguageModel, T: int, scored: float = 1.0) -> float:
        """Forward FLOPs of training on a sequence of T tokens, `scored` of which are answers: the head runs on masked
        tokens, in the mean over times."""
        t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        return model.flops(T, BIDIRECTIONAL, scored * self.schedule.noised(t).mean().item())

    def answer_logits(
        self, model: LanguageModel, tokens_BT: Tensor, masked_BT: Tensor, p_B: Tensor | None = None
    ) -> Tensor:
        """Logits [N, vocab_size] of the N tokens where masked_BT is true, from all other tokens. p_B: the share of
        tokens noised, for a timed model; None for the share of masked_BT."""
        time = {}
        if self.timed:
            p_B = masked_BT.double().mean(1) if p_B is None else p_B.to(tokens_BT.device)
            time = {"time": p_B[:, None]}
        hidden_BTD = model.hidden(tokens_BT.masked_fill(masked_BT, self.mask), BIDIRECTIONAL, **time)
        return model.logits(hidden_BTD[masked_BT])[:, : self.vocab_size]

    def masked_nats(
        self, model: LanguageModel, tokens_BT: Tensor, masked_BT: Tensor, p_B: Tensor | None = None
    ) -> Tensor:
        """-log p(x_i | unmasked tokens) at masked positions, 0 elsewhere, [B, T]."""
        return nats_at(self.answer_logits(model, tokens_BT, masked_BT, p_B), tokens_BT, masked_BT)

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Tensor:
        """One-draw estimate of the bound in mean nats a token, or an answer where these are marked: only they are then
        ever masked."""
        t_B = draw_times(len(tokens_BT), self.times, generator)
        p_B, rate_B = self.schedule.noised(t_B), self.schedule.rate(t_B)
        masked_BT = (uniform(tokens_BT.shape, generator) < p_B[:, None]).to(tokens_BT.device)
        masked_BT &= everywhere(tokens_BT, answers_BT)
        nats_BT = self.masked_nats(model, tokens_BT, masked_BT, p_B)
        if self.weighting == "bound":
            nats_BT = nats_BT * (rate_B / p_B).to(nats_BT)[:, None]
        return mean_nats(nats_BT, answers_BT)

    @torch.no_grad()
    def bound(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Likelihood:
        """The bound over all p, with p integrated out (see `mask_some`): less varied than with times drawn."""
        noisable_BT = everywhere(tokens_BT, answers_BT)

        def draw(generator: Generator) -> Tensor:
            masked_BT, weight_B, p_B = mask_some(noisable_BT, generator)
            nats_BT = self.masked_nats(model, tokens_BT, masked_BT.to(tokens_BT.device), p_B)
            return nats_BT.double().sum(1) * weight_B.to(nats_BT.device)

        return bound_by(draw, self.evaluation_draws, generator)

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompt_BT: Tensor,
        length: int,
        generator: Generator,
        draw: Draw = Draw(),
        sampler: Sampler | None = None,
    ) -> Samples:
        """Fill the gaps (-1) of a prompt [B, P] and all behind it up to `length`, by `sampler` (None: `Ancestral` with
        a quarter as many steps as gaps).

        Raises:
            ValueError: for a prompt without a gap that is no shorter than the length.
        """
        tokens_BT, gaps_BT = gaps_of(prompt_BT, length, self.mask)
        sampler = Ancestral(max(1, -(-int(gaps_BT.sum(1).max()) // 4))) if sampler is None else sampler

        def denoise(tokens_BT: Tensor, where_BT: Tensor) -> Tensor:
            left_B1 = (tokens_BT == self.mask).sum(1, keepdim=True)
            time = {"time": left_B1 / gaps_BT.sum(1, keepdim=True).clamp(min=1)} if self.timed else {}
            hidden_BTD = model.hidden(tokens_BT, BIDIRECTIONAL, **time)
            return model.logits(hidden_BTD[where_BT])[:, : self.vocab_size]

        return sampler(denoise, tokens_BT, gaps_BT, self.mask, draw, generator)

    def sampling_flops(self, model: LanguageModel, samples: Samples) -> float:
        """FLOPs of one sequence of these samples: passes over the whole of it, and the head where it was read."""
        T = samples.tokens_BT.shape[1]
        return samples.evaluations * model.flops(T, BIDIRECTIONAL, 0.0) + samples.predictions * model.head_flops
