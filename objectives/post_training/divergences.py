"""Estimates of how far a policy has moved from a reference, from its own samples.

Shape letters: any shape [...]; B sequences, T tokens, V token ids, N tokens that count.
"""

from typing import Literal

import torch
from torch import Tensor

from objectives.contracts import Batch, Model, Objective

Estimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_p: Tensor, log_reference: Tensor, estimator: Estimator) -> Tensor:
    """Estimates [...] of KL(p || reference) from samples of p, with r = reference / p (Schulman, "Approximating KL
    divergence", 2020).

    k1 = -log r is unbiased and k3 = r - 1 - log r as well and never negative; k2 = log^2 r / 2 is biased.

    Their gradients, over samples that stand still, are others (Liu et al., arXiv 2510.01555): that of k1 is 0 in
    expectation, that of k2 the gradient of KL(p || reference), and that of k3 the one of KL(reference || p).
    """
    log_r = log_reference - log_p
    match estimator:
        case "k1":
            return -log_r
        case "k2":
            return log_r.square() / 2
        case "k3":
            return log_r.expm1() - log_r
    raise ValueError(f"estimator={estimator!r} must be one of k1, k2, k3")


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [...] of distributions given by their logarithms [..., V]."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


@torch.no_grad()
def written_kl(writer: Model, other: Model, objective: Objective, written: Batch) -> Tensor:
    """Estimates [B] float64 of KL(writer || other) in nats per answer, from one answer of the writer each: the sum over
    its tokens of the divergences of the next token's distributions. Its mean is that of the log-ratio of what was
    drawn, and it varies less."""
    log_p_NV, log_other_NV = (objective.logits(model, written).double().log_softmax(-1) for model in (writer, other))
    nats_N = kl(log_p_NV, log_other_NV)
    return nats_N.new_zeros(written.tokens_BT.shape).masked_scatter(written.counted_BT, nats_N).sum(1)


def mixed_kl(log_p: Tensor, log_teacher: Tensor, mixture: float) -> Tensor:
    """The generalised Jensen-Shannon divergence [...] between a student's p and a teacher's distribution, both by their
    logarithms [..., V] (Agarwal et al., arXiv 2306.13649, equation 1): mixture KL(teacher || m) + (1 - mixture)
    KL(p || m) with m = mixture teacher + (1 - mixture) p. At 0 it is the forward KL(teacher || p) and at 1 the reverse
    KL(p || teacher), to which it tends when it is divided by mixture, and by 1 - mixture."""
    if mixture == 0:
        return kl(log_teacher, log_p)
    if mixture == 1:
        return kl(log_p, log_teacher)
    weights = torch.tensor([mixture, 1 - mixture], dtype=log_p.dtype, device=log_p.device).log()
    log_m = torch.logaddexp(log_teacher + weights[0], log_p + weights[1])
    return mixture * kl(log_teacher, log_m) + (1 - mixture) * kl(log_p, log_m)
