"""Decays from their logarithms."""

from torch import Tensor

# No decay is taken as stronger than e^-60. It would change nothing, and denormal numbers make a CPU slower by far.
LEAST_LOG_DECAY = -60.0


def decay(log_decay: Tensor) -> Tensor:
    """Return e^log_decay, of at least LEAST_LOG_DECAY."""
    return log_decay.clamp(min=LEAST_LOG_DECAY).exp()
