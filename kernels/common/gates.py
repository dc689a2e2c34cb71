"""Decays from their logarithms."""

import torch.nn.functional as F
from torch import Tensor

# No decay is taken as stronger than e^-60. It would change nothing, and denormal numbers make a CPU slower by far.
LEAST_LOG_DECAY = -60.0


def decay(log_decay: Tensor) -> Tensor:
    """Return e^log_decay, of at least LEAST_LOG_DECAY."""
    return log_decay.clamp(min=LEAST_LOG_DECAY).exp()


def vanishing_decay(log_decay: Tensor) -> Tensor:
    """Return e^log_decay, and 0 from LEAST_LOG_DECAY down, so that -inf and its like forget all."""
    return F.threshold(log_decay, LEAST_LOG_DECAY, -float("inf")).exp_()
