"""The definition of the cross entropy of a linear head, with all logits.

Shape letters: N tokens, D numbers of a hidden vector, V token ids.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weights: Tensor, soft_cap: float | None,
    z_loss: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the weighted sum of the losses, and the losses [N] of tokens that count; the product is of numbers of
    `dtype`."""
    logits = F.linear(hidden.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    logits = logits if bias is None else logits + bias.to(logits.dtype)
    logits = logits if soft_cap is None else soft_cap * (logits / soft_cap).tanh()
    nats = F.cross_entropy(logits, targets, reduction="none")
    losses = nats + z_loss * logits.logsumexp(-1).square() if z_loss else nats
    weights = token_weights.detach().to(losses.dtype)
    losses = losses.where(weights != 0, 0.0)
    return (losses * weights).sum(), losses.detach()
