"""Uniform-state diffusion: noise replaces tokens by random ones, so that a sampler can revise what it wrote.

Shape letters: B sequences, T tokens, V token ids, N positions picked out of a batch. As in the papers,
K is the number of ids.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL
from objectives.contracts import Batch, Model, Objective, Predictions, Request, Samples
from objectives.decoding.revising import Revise
from objectives.likelihood import Likelihood, bound_by, check_draws
from objectives.noise import Polynomial, Schedule, check, draw_times, uniform
from objectives.whole_sequence import logits_at, sampling_flops

AT_ONCE = 2**22  # logits that are in float64 at a time


class UniformDiffusion(Objective):
    """Continuous-time diffusion towards the uniform distribution (UDLM, Schiff et al., arXiv 2412.10193; Duo, Sahoo et
    al., 2506.10892): each token is replaced by a uniform one with probability p = 1 - a. With K tokens, x the one-hot
    clean token, q the model's distribution of it, X = K a x + p and Q = K a q + p, and i the noised token,

        -log p(x) <= integral_0^1 E[ 1 / (K a) (K / Q_i - K / X_i + sum_j X_j / X_i log((Q_i X_j) / (Q_j X_i))) ] dp

    summed over positions. It is tight for a model that gives the distribution of a token from all noised tokens but its
    own; the one from all of them, its own too, gives more than -log p.

    Args:
        vocab_size: number of token ids of the data, and of the model.
        eot: not used; every objective is built with the same arguments.
        schedule: how often p is drawn, in training and for the bound. Where little is noised a noised token is rare
            and its loss large, so that p = t^3 varies much less than p = t, whose
            variance has no bound.
        times: how a batch's times are drawn (see `draw_times`).
        timed: whether the model is told p, which the tokens do not show.
        evaluation_draws: independent draws of noise for `evaluate`, at least 2 (their spread gives the error).

    Raises:
        ValueError: for a schedule that does not end with every token noised, or an option that is not one of these.
    """

    visibility = BIDIRECTIONAL
    samplers = (Revise,)

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

    def flops(self, model: LanguageModel, T: int, counted: float = 1.0) -> float:
        """As in `Objective`: the head runs on the tokens that count."""
        return model.flops(T, BIDIRECTIONAL, counted)

    def _logits(self, model: Model, noised_BT: Tensor, batch: Batch, p_B: Tensor) -> Tensor:
        """Logits [N, V] at the tokens that count, of which a fraction p_B is noised."""
        visibility, told_B = BIDIRECTIONAL.packed(batch.starts_BT), p_B if self.timed else None
        return logits_at(model, noised_BT, batch.counted_BT, visibility, told_B)

    def _log_probs(self, model: Model, noised_BT: Tensor, batch: Batch, p_B: Tensor) -> Tensor:
        """log q [N, V] float64 at the tokens that count, of which a fraction p_B is noised."""
        return log_probs(self._logits(model, noised_BT, batch, p_B))

    def logits(self, model: Model, batch: Batch) -> Tensor:
        """As in `Objective`: the tokens that count are all replaced by random ones, the same for each call."""
        generator, shape = torch.Generator().manual_seed(0), batch.tokens_BT.shape
        random_BT = torch.randint(self.vocab_size, shape, generator=generator).to(batch.tokens_BT.device)
        noised_BT = torch.where(batch.counted_BT, random_BT, batch.tokens_BT)
        return self._log_probs(model, noised_BT, batch, torch.ones(len(noised_BT)))

    def integrand(self, log_q_NV: Tensor, clean_N: Tensor, noised_N: Tensor, p_N: Tensor) -> Tensor:
        """The integrand of the bound over p, [N] float64, for log q [N, V] and p in [0, 1)."""
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

    def _nats_of(self, logits_NV: Tensor, clean_N: Tensor, noised_N: Tensor, p_N: Tensor) -> Tensor:
        """The integrand of the bound from logits, some rows at a time. Where that is more than once, what each makes in
        float64 is made again for its gradient and not kept."""

        def integrand(*some: Tensor) -> Tensor:
            return self.integrand(log_probs(some[0]), *some[1:])

        given, rows = (logits_NV, clean_N, noised_N, p_N), max(1, AT_ONCE // self.vocab_size)
        if len(logits_NV) <= rows:
            return integrand(*given)
        parts = zip(*(x.split(rows) for x in given), strict=True)
        return torch.cat([checkpoint(integrand, *p, use_reentrant=False, preserve_rng_state=False) for p in parts])

    def noise(self, batch: Batch, generator: Generator) -> dict[str, Tensor]:
        """As in `Objective`: times, and tokens noised at them."""
        tokens_BT = batch.tokens_BT
        device, (B, T) = tokens_BT.device, tokens_BT.shape
        t_B = 1 - draw_times(B, self.times, generator)  # in [0, 1): at p = 1 the integrand is 0 / 0
        p_B = self.schedule.noised(t_B)
        hit_BT = (uniform((B, T), generator) < p_B[:, None]).to(device) & batch.counted_BT
        random_BT = torch.randint(self.vocab_size, (B, T), generator=generator, device=generator.device).to(device)
        return {"time": t_B, "noised": torch.where(hit_BT, random_BT, tokens_BT)}

    def _noised(self, batch: Batch, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [B, T] noised at times drawn, the fraction of noise and its rate, [B] each."""
        noise = self.noise_of(batch, generator)
        return noise["noised"], self.schedule.noised(noise["time"]), self.schedule.rate(noise["time"])

    def predictions(self, model: Model, batch: Batch, generator: Generator) -> Predictions:
        """As in `Objective`, with every token from all noised ones, its own too. Their nats are no likelihood: `nats`
        is."""
        noised_BT, p_B, _ = self._noised(batch, generator)
        log_q_NV = self._log_probs(model, noised_BT, batch, p_B)
        return Predictions(log_q_NV, batch.counted_BT, torch.ones_like(batch.weights_BT))

    def nats(self, model: Model, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`, float64."""
        tokens_BT, where_BT = batch.tokens_BT, batch.counted_BT
        noised_BT, p_B, rate_B = self._noised(batch, generator)
        logits_NV = self._logits(model, noised_BT, batch, p_B)
        p_BT, rate_BT = (x.to(tokens_BT.device)[:, None].expand_as(tokens_BT) for x in (p_B, rate_B))
        nats_N = self._nats_of(logits_NV, tokens_BT[where_BT], noised_BT[where_BT], p_BT[where_BT])
        nats_N = nats_N * rate_BT[where_BT]
        return nats_N.new_zeros(tokens_BT.shape).masked_scatter(where_BT, nats_N)

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`: a one-draw estimate of the bound."""
        return super().loss(model, batch, generator).float()

    @torch.no_grad()
    def evaluate(self, model: Model, batch: Batch, generator: Generator) -> Likelihood:
        """As in `Objective`: the bound over the whole range of noise, from the least to all."""
        return bound_by(lambda generator: self.nats(model, batch, generator).sum(1), self.evaluation_draws, generator)

    def denoiser(self, model: Model) -> "NoisedSequence":
        return NoisedSequence(model, self.vocab_size, self.timed)

    def default_sampler(self, request: Request) -> Revise:
        """As many steps as masked positions."""
        _, masked_BT = request.canvas(0)
        return Revise(int(masked_BT.sum(1).max()))

    def sampling_flops(self, model: LanguageModel, request: Request, samples: Samples) -> float:
        return sampling_flops(model, samples)


@dataclass(frozen=True)
class NoisedSequence:
    """A model that runs the whole noised sequence in every pass; see `UniformDenoiser`."""

    model: Model
    vocab_size: int
    timed: bool

    def __call__(self, tokens_BT: Tensor, where_BT: Tensor, noised_B: Tensor) -> Tensor:
        told_B = noised_B if self.timed else None
        return log_probs(logits_at(self.model, tokens_BT, where_BT, BIDIRECTIONAL, told_B))


def log_probs(logits_NV: Tensor) -> Tensor:
    """Return the log probabilities of logits, [N, V] float64."""
    return logits_NV.double().log_softmax(-1)
