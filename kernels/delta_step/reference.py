"""The step in PyTorch, part by part: the definition, and what runs on a CPU.

Shape letters: B sequences, C channels of the convolution, W its taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common.arguments import at_least_float32, without_autocast
from kernels.common.gates import log_decay, unit


def gated_delta_step_reference(
    qkv: Tensor, a: Tensor | None, b: Tensor, z: Tensor, conv: Tensor, memory: Tensor, conv_weight: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, conv and memory after the token; shapes as in `gated_delta_step`."""
    (HV, K, V), C, exact = memory.shape[1:], qkv.shape[1], at_least_float32(qkv)
    H = (C - HV * V) // (2 * K)
    with without_autocast(qkv):
        window_BWC = torch.cat([conv, qkv[:, None].to(conv.dtype)], dim=1)
        x_BC = F.silu((window_BWC.to(exact) * conv_weight.to(exact).T).sum(1))
        q, k, v = x_BC.split([H * K, H * K, HV * V], dim=1)
        q, k = (unit(x.unflatten(1, (H, K))).repeat_interleave(HV // H, 1) for x in (q, k))
        S = memory
        if a is not None and A_log is not None and dt_bias is not None:
            S = S * log_decay(a.to(exact), A_log, dt_bias).exp()[:, :, None, None]
        stored = (S * k[..., None]).sum(2)
        written = b.to(exact).sigmoid()[..., None] * (v.unflatten(1, (HV, V)) - stored)
        S = S + k[..., None] * written[:, :, None]
        o = K**-0.5 * (S * q[..., None]).sum(2)
        y = o * (o.square().mean(-1, keepdim=True) + eps).rsqrt() * norm_weight.to(exact) * F.silu(z.to(exact))
    return y.to(z.dtype), window_BWC[:, 1:].contiguous(), S.to(memory.dtype)
