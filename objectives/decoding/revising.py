"""Sampling that may change every token in every step, from noise of random tokens.

Shape letters: B sequences, T tokens, V token ids, N positions picked out of a batch.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from objectives.contracts import Request, Sampler, Samples
from objectives.decoding.draws import choose
from objectives.decoding.unmasking import check_steps, lengths_of


class UniformDenoiser(Protocol):
    """The model that is asked. vocab_size: V, the ids that noise is drawn from."""

    @property
    def vocab_size(self) -> int: ...

    def __call__(self, tokens_BT: Tensor, where_BT: Tensor, noised_B: Tensor) -> Tensor:
        """Log-probabilities [N, V], float64, of the clean tokens at the N positions where where_BT is true, from one
        pass of the network. noised_B: the probability with which a token there has been replaced by a random one."""
        ...


@dataclass(frozen=True)
class Revise(Sampler):
    """The reverse process of uniform noise in `steps` equal steps of p from 1 to 0.

    Raises:
        ValueError: for steps below 1.
    """

    steps: int

    def __post_init__(self):
        check_steps(self.steps)

    def __call__(self, denoiser: UniformDenoiser, request: Request) -> Samples:
        tokens_BT, masked_BT = request.canvas(0)
        generator, B = request.generator, len(tokens_BT)
        random_BT = torch.randint(denoiser.vocab_size, tokens_BT.shape, generator=generator, device=generator.device)
        tokens_BT = torch.where(masked_BT, random_BT.to(tokens_BT.device), tokens_BT)
        log_probs_BT = torch.zeros_like(tokens_BT, dtype=torch.float64)
        for left in range(self.steps, 0, -1):
            p, after = left / self.steps, (left - 1) / self.steps
            log_q_NV = denoiser(tokens_BT, masked_BT, torch.full((B,), p, dtype=torch.float64))
            q_NV = posterior(request.draw.probabilities(log_q_NV), tokens_BT[masked_BT], p, after)
            ids_N, log_probs_N = choose(q_NV, generator)
            tokens_BT = tokens_BT.masked_scatter(masked_BT, ids_N)
            log_probs_BT = log_probs_BT.masked_scatter(masked_BT, log_probs_N)
        lengths_B = lengths_of(tokens_BT, masked_BT, request.stop)
        predictions = self.steps * int(masked_BT.sum()) / B
        order_BT = torch.where(masked_BT, self.steps - 1, -1)
        return Samples(tokens_BT, lengths_B, log_probs_BT, order_BT, float(self.steps), predictions)


def posterior(q_NV: Tensor, noised_N: Tensor, p: float, after: float) -> Tensor:
    """The distribution [N, V] of a token with noise `after` < p given itself with noise p and the distribution q of the
    clean one (UDLM, Schiff et al., arXiv 2412.10193, equation 16)."""
    K, a, b = q_NV.shape[1], 1 - p, 1 - after
    step = a / b
    z_NV = F.one_hot(noised_N, K).to(q_NV)
    mixed_NV = K * a * q_NV * z_NV + (step - a) * z_NV + (b - a) * q_NV + (1 - step) * after / K
    return mixed_NV / mixed_NV.sum(1, keepdim=True)
