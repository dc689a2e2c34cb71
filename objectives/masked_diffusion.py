"""Absorbing-state (masked) diffusion over tokens, as in MDLM, MD4 and LLaDA."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL
from objectives.likelihood import Likelihood, Samples, answer_nats, mean_nats
from objectives.next_token import draw


class MaskedDiffusion:
    """Continuous-time absorbing diffusion with the linear schedule (Sahoo et al., arXiv 2406.07524; Shi et al.,
    2406.04329): each token is masked with probability t, and

        -log p(x) <= integral_0^1 E[ (1/t) sum over masked positions of -log p(x_i | the rest) ] dt

    The substitution parameterisation holds by construction: the loss and the sampler read the model at masked
    positions only, and the mask token's column is left out of the softmax. The denoiser gets no time.

    Args:
        vocab_size: number of token ids of the data; the mask token is one more.
        eot: not used; every objective is built with the same arguments.
        evaluation_draws: independent draws of masks for `bound`, at least 2 (their spread gives the error).
    """

    visibility = BIDIRECTIONAL
    predicted = 0.5  # share of positions at which the head runs: the mean of t

    def __init__(self, vocab_size: int, eot: int, evaluation_draws: int = 2):
        if evaluation_draws < 2:
            raise ValueError(f"evaluation_draws={evaluation_draws}: a standard error needs at least 2")
        self.vocab_size, self.mask = vocab_size, vocab_size
        self.model_vocab_size = vocab_size + 1
        self.evaluation_draws = evaluation_draws

    def answer_logits(self, model: LanguageModel, tokens_BT: Tensor, answers_BT: Tensor) -> Tensor:
        """Logits [N, vocab_size] of the N tokens where answers_BT is true, from all other tokens, these masked."""
        hidden_BTD = model.hidden(tokens_BT.masked_fill(answers_BT, self.mask), BIDIRECTIONAL)
        return model.logits(hidden_BTD[answers_BT])[:, : self.vocab_size]

    def masked_nats(self, model: LanguageModel, tokens_BT: Tensor, masked_BT: Tensor) -> Tensor:
        """-log p(x_i | unmasked tokens) at masked positions, 0 elsewhere, [B, T]."""
        return answer_nats(self.answer_logits(model, tokens_BT, masked_BT), tokens_BT, masked_BT)

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Tensor:
        """One-draw estimate of the bound in mean nats a token, or an answer where these are marked: only they are then
        ever masked. Times are spread evenly over the batch (Kingma et al., arXiv 2107.00630, appendix I.1), each row's
        own time still uniform on (0, 1]."""
        t_B1 = 1 - spread(len(tokens_BT), generator).to(tokens_BT.device)[:, None].float()
        masked_BT = uniform(tokens_BT.shape, generator).to(tokens_BT.device) < t_B1
        if answers_BT is not None:
            masked_BT &= answers_BT
        return mean_nats(self.masked_nats(model, tokens_BT, masked_BT) / t_B1, answers_BT)

    @torch.no_grad()
    def bound(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Likelihood:
        """The same bound over the whole time window, in the form of Nie et al. (LLaDA, arXiv 2502.09992): given t
        the number of masked tokens is binomial, and integrating t out leaves k uniform on 1..n with weight n / k, of
        the n tokens of a row (or answers, where these are marked). No time is ever cut off, and the variance is lower
        than with a sampled t."""
        B, T = tokens_BT.shape
        asked_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if answers_BT is None else answers_BT
        asked_BT = asked_BT.to(generator.device)
        n_B = asked_BT.sum(1)
        draws = []
        for _ in range(self.evaluation_draws):
            k_B = (spread(B, generator) * n_B).long() + 1
            rank_BT = uniform((B, T), generator).masked_fill(~asked_BT, 2.0).argsort(1).argsort(1)
            masked_BT = (asked_BT & (rank_BT < k_B[:, None])).to(tokens_BT.device)
            nats_B = self.masked_nats(model, tokens_BT, masked_BT).double().sum(1)
            draws.append(nats_B * n_B.to(nats_B.device) / k_B.to(nats_B.device))
        draws_SB = torch.stack(draws)
        variance = draws_SB.sum(1).var().item() / self.evaluation_draws
        return Likelihood(draws_SB.mean(0), variance=variance, exact=False)

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompt_BT: Tensor,
        length: int,
        generator: Generator,
        temperature: float = 1.0,
        steps: int | None = None,
    ) -> Samples:
        """Ancestral sampling: from all masked, `steps` (default: a quarter of the new tokens) times of equal
        length, in each of which a masked position is filled with probability (t - s) / t and then stays.

        Raises:
            ValueError: for steps below 1 or a prompt that leaves nothing to fill.
        """
        B, P = prompt_BT.shape
        if P >= length:
            raise ValueError(f"the prompt has {P} tokens already: ask for a length above that, not {length}")
        steps = max(1, (length - P) // 4) if steps is None else steps
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        tokens_BT = F.pad(prompt_BT, (0, length - P), value=self.mask)
        for left in range(steps, 0, -1):
            fill_BT = uniform(tokens_BT.shape, generator).to(tokens_BT.device) * left < 1
            fill_BT &= tokens_BT == self.mask
            hidden_BTD = model.hidden(tokens_BT, BIDIRECTIONAL)
            logits_NV = model.logits(hidden_BTD[fill_BT])[:, : self.vocab_size]
            tokens_BT = tokens_BT.masked_scatter(fill_BT, draw(logits_NV, temperature, generator))
        return Samples(tokens_BT, evaluations=steps)


def uniform(shape, generator: Generator) -> Tensor:
    """float64 uniforms on [0, 1) on the generator's device: float32 has too coarse a grid near 0."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def spread(n: int, generator: Generator) -> Tensor:
    """n numbers in [0, 1), one in each interval of 1 / n up to rotation, each of them uniform: [n] float64."""
    grid = torch.arange(n, device=generator.device, dtype=torch.float64) / n
    return (uniform((1,), generator) + grid) % 1
