"""Decays from their logarithms, those logarithms from the inputs of gates, and the norms of keys."""

import torch.nn.functional as F
from torch import Tensor

from kernels.common.arguments import at_least_float32

# No decay is taken as stronger than e^-60. It would change nothing, and denormal numbers make a CPU slower by far.
LEAST_LOG_DECAY = -60.0


def decay(log_decay: Tensor) -> Tensor:
    """Return e^log_decay, of at least LEAST_LOG_DECAY."""
    return log_decay.clamp(min=LEAST_LOG_DECAY).exp()


def vanishing_decay(log_decay: Tensor) -> Tensor:
    """Return e^log_decay, and 0 from LEAST_LOG_DECAY down, so that -inf and its like forget all."""
    return F.threshold(log_decay, LEAST_LOG_DECAY, -float("inf")).exp_()


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return -exp(A_log) softplus(a + dt_bias) (Mamba-2, arXiv 2405.21060) in at least float32; a: [..., HV], A_log,
    dt_bias: [HV]."""
    dtype = at_least_float32(a)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))


def unit(x: Tensor) -> Tensor:
    """Return the vectors of the last dimension divided by their L2 norms, 1e-6 under the root, in at least float32."""
    x = x.to(at_least_float32(x))
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
