"""Uniform-state diffusion: noise replaces tokens by random ones, so that a sampler can revise what it wrote."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL
from objectives.likelihood import Likelihood, bound_by, check_draws, everywhere, mean_nats
from objectives.noise import Polynomial, Schedule, check, draw_times, uniform
from objectives.sampling import Draw, Samples, check_steps, choose, gaps_of


class UniformDiffusion:
    """Continuous-time diffusion towards the uniform law (UDLM, Schiff et al., arXiv 2412.10193; Duo, Sahoo et al.,
    2506.10892): each token is replaced by a uniform one with probability p = 1 - a. With K tokens, x the one-hot clean
    token, q the model's law of it, X = K a x + p and Q = K a q + p, and i the noised token,

        -log p(x) <= integral_0^1 E[ 1 / (K a) (K / Q_i - K / X_i + sum_j X_j / X_i log((Q_i X_j) / (Q_j X_i))) ] dp

    summed over positions. It is tight for a model that gives the law of a token from all noised tokens but its own;
    the law from all of them, its own too, gives more than -log p.

    Args:
        vocab_size: number of token ids of the data, and of the model.
        eot: not used; every objective is built with the same arguments.
        schedule: how often p is drawn, in training and for the bound. Where little is noised a noised token is rare
            and its loss large, so that p = t^3 varies much less than p = t, whose
            variance has no bound.
        times: how a batch's times are drawn (see `draw_times`).
        timed: whether the model is told p, which the tokens do not show.
        evaluation_draws: independent draws of noise for `bound`, at least 2 (their spread gives the error).

    Raises:
        ValueError: for a schedule that does not end with every token noised, or an option that is not one of these.
    """

    visibility = BIDIRECTIONAL

    def __init__(
        self,
        vocab_size: int,
        eot: int,
        schedule: Schedule = Polynomial(3.0),
        times: str = "stratified",
        timed: bool = True,
        evaluation_draws: int = 2,
    ):
        check(schedule, times)
        check_draws(evaluation_draws)
        self.vocab_size = self.model_vocab_size = vocab_size
        self.model_options = {"timed": True} if timed else {}
        self.schedule, self.times, self.timed, self.evaluation_draws = schedule, times, timed, evaluation_draws

    def flops(self, model: LanguageModel, T: int, scored: float = 1.0) -> float:
        """Forward FLOPs of training on a sequence of T tokens, `scored` of which are answers: the head runs on them."""
        return model.flops(T, BIDIRECTIONAL, scored)

    def _log_law(self, model: LanguageModel, noised_BT: Tensor, where_BT: Tensor, p_B: Tensor) -> Tensor:
        """log q [N, vocab_size] float64 at the N positions where where_BT is true."""
        time = {"time": p_B.to(noised_BT.device)[:, None]} if self.timed else {}
        hidden_BTD = model.hidden(noised_BT, BIDIRECTIONAL, **time)
        return model.logits(hidden_BTD[where_BT]).double().log_softmax(-1)

    def answer_logits(self, model: LanguageModel, tokens_BT: Tensor, answers_BT: Tensor) -> Tensor:
        """Logits [N, vocab_size] of the N tokens where answers_BT is true, these replaced by random ones."""
        random_BT = torch.randint(self.vocab_size, tokens_BT.shape, generator=torch.Generator().manual_seed(0))
        noised_BT = torch.where(answers_BT, random_BT.to(tokens_BT.device), tokens_BT)
        return self._log_law(model, noised_BT, answers_BT, torch.ones(len(tokens_BT)))

    def integrand(self, log_q_NV: Tensor, clean_N: Tensor, noised_N: Tensor, p_N: Tensor) -> Tensor:
        """What the integral over p is of, [N] float64, for log q [N, vocab_size] and p in [0, 1)."""
        K, a_N = self.vocab_size, 1 - p_N
        log_Q_NV = torch.logaddexp(log_q_NV + (K * a_N).log()[:, None], p_N.log()[:, None])
        # X is K a + p at the clean token and p at the K - 1 others.
        high_N = K * a_N + p_N
        X_i = torch.where(clean_N == noised_N, high_N, p_N)
        log_Q_i, log_Q_x = (log_Q_NV.gather(1, ids[:, None])[:, 0] for ids in (noised_N, clean_N))
        X_log_X = torch.xlogy(high_N, high_N) + (K - 1) * torch.xlogy(p_N, p_N)
        # At p = 0 the other tokens weigh nothing, whatever their log Q.
        others_N = torch.where(p_N > 0, p_N * (log_Q_NV.sum(1) - log_Q_x), 0.0)
        X_log_Q = high_N * log_Q_x + others_N
        inside_N = K / log_Q_i.exp() - K / X_i + (K * (log_Q_i - X_i.log()) + X_log_X - X_log_Q) / X_i
        return inside_N / (K * a_N)

    def _nats(self, model: LanguageModel, tokens_BT: Tensor, where_BT: Tensor, generator: Generator) -> Tensor:
        """A one-draw estimate of the bound, token by token, [B, T] float64; 0 outside where_BT."""
        device, (B, T) = tokens_BT.device, tokens_BT.shape
        t_B = 1 - draw_times(B, self.times, generator)  # in [0, 1): at p = 1 the integrand is 0 / 0
        p_B = self.schedule.noised(t_B)
        hit_BT = (uniform((B, T), generator) < p_B[:, None]).to(device) & where_BT
        random_BT = torch.randint(self.vocab_size, (B, T), generator=generator, device=generator.device).to(device)
        noised_BT = torch.where(hit_BT, random_BT, tokens_BT)
        log_q_NV = self._log_law(model, noised_BT, where_BT, p_B)
        p_BT, rate_BT = (x.to(device)[:, None].expand(B, T) for x in (p_B, self.schedule.rate(t_B)))
        nats_N = self.integrand(log_q_NV, tokens_BT[where_BT], noised_BT[where_BT], p_BT[where_BT])
        nats_N = nats_N * rate_BT[where_BT]
        return nats_N.new_zeros(B, T).masked_scatter(where_BT, nats_N)

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Tensor:
        """One-draw estimate of the bound in mean nats a token, or an answer where these are marked: only they are then
        ever noised."""
        return mean_nats(self._nats(model, tokens_BT, everywhere(tokens_BT, answers_BT), generator), answers_BT).float()

    @torch.no_grad()
    def bound(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Likelihood:
        """The bound over the whole range of noise, from the least to all."""
        where_BT = everywhere(tokens_BT, answers_BT)
        return bound_by(
            lambda generator: self._nats(model, tokens_BT, where_BT, generator).sum(1), self.evaluation_draws, generator
        )

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompt_BT: Tensor,
        length: int,
        generator: Generator,
        draw: Draw = Draw(),
        sampler: "Revise | None" = None,
    ) -> Samples:
        """Fill the gaps (-1) of a prompt [B, P] and all behind it up to `length`: from random tokens, which every step
        of `sampler` (None: `Revise` with as many steps as gaps) may change again.

        Raises:
            ValueError: for a prompt without a gap that is no shorter than the length, or another kind of sampler.
        """
        tokens_BT, gaps_BT = gaps_of(prompt_BT, length, 0)
        sampler = Revise(int(gaps_BT.sum(1).max())) if sampler is None else sampler
        if not isinstance(sampler, Revise):
            raise ValueError(f"uniform diffusion has no gaps to fill one by one: use Revise(steps), not {sampler}")
        random_BT = torch.randint(self.vocab_size, tokens_BT.shape, generator=generator, device=generator.device)
        tokens_BT = torch.where(gaps_BT, random_BT.to(tokens_BT.device), tokens_BT)
        for left in range(sampler.steps, 0, -1):
            p, after = left / sampler.steps, (left - 1) / sampler.steps
            log_q_NV = self._log_law(model, tokens_BT, gaps_BT, torch.full((len(tokens_BT),), p, dtype=torch.float64))
            law_NV = posterior(draw.probabilities(log_q_NV), tokens_BT[gaps_BT], p, after)
            tokens_BT = tokens_BT.masked_scatter(gaps_BT, choose(law_NV, generator))
        return Samples(tokens_BT, sampler.steps, sampler.steps * int(gaps_BT.sum()) / len(tokens_BT))

    def sampling_flops(self, model: LanguageModel, samples: Samples) -> float:
        """FLOPs of one sequence of these samples."""
        T = samples.tokens_BT.shape[1]
        return samples.evaluations * model.flops(T, BIDIRECTIONAL, 0.0) + samples.predictions * model.head_flops


def posterior(q_NV: Tensor, noised_N: Tensor, p: float, after: float) -> Tensor:
    """The law of a token with noise `after` < p given itself with noise p and the law q of the clean one, [N, V]
    (UDLM, equation 16)."""
    K, a, b = q_NV.shape[1], 1 - p, 1 - after
    step = a / b
    z_NV = F.one_hot(noised_N, K).to(q_NV)
    law_NV = K * a * q_NV * z_NV + (step - a) * z_NV + (b - a) * q_NV + (1 - step) * after / K
    return law_NV / law_NV.sum(1, keepdim=True)


class Revise:
    """The reverse process in `steps` equal steps of p from 1 to 0.

    Raises:
        ValueError: for steps below 1.
    """

    def __init__(self, steps: int):
        check_steps(steps)
        self.steps = steps
