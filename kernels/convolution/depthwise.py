"""The short convolution through PyTorch's depthwise convolution, channels last.

Shape letters: B rows of the batch, T tokens, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.common.arguments import at_least_float32, is_transformed, without_autocast


def causal_conv1d_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and the final state, shapes as in `causal_conv1d`, without the activation.

    Half precision is computed in float32 on a CPU, where few have arithmetic for it and the others are up to forty
    times slower.
    """
    padded = torch.cat([initial_state.to(x.dtype), x], dim=1)
    on_cpu = x.device.type == "cpu"
    dtype = at_least_float32(x) if on_cpu else x.dtype
    with without_autocast(x):
        if on_cpu and x.shape[1] == 1:  # a decoded token: PyTorch's convolution takes several times as long there
            y_BTC = (padded.to(dtype) * weight.to(dtype).T).sum(1, keepdim=True)
        else:
            run = _depthwise if is_transformed(x, weight, initial_state) else _Depthwise.apply
            y_BTC = run(padded.to(dtype), weight.to(dtype))
    return y_BTC if bias is None else y_BTC + bias.to(dtype), padded[:, x.shape[1] :]


def _depthwise(x_BTC: Tensor, weight: Tensor) -> Tensor:
    """Return y_t = sum_w weight[:, w] * x_{t + w}. As a 2-D convolution of height 1, which alone knows channels
    last."""
    y_BC1T = F.conv2d(x_BTC.mT[:, :, None], weight[:, None, None], groups=x_BTC.shape[2])
    return y_BC1T[:, :, 0].mT


class _Depthwise(torch.autograd.Function):
    """The convolution with gradients of its own: PyTorch's take three times as long on a CPU."""

    @staticmethod
    def forward(ctx, x_BTC: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTC, weight)
        return _depthwise(x_BTC, weight)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,), (x_BTC, weight) = gradients, ctx.saved_tensors
        taps, T = weight.shape[1], gradient.shape[1]
        to_x = _depthwise(F.pad(gradient, (0, 0, taps - 1, taps - 1)), weight.flip(1))
        to_weight = torch.stack([(x_BTC[:, w : w + T] * gradient).sum((0, 1)) for w in range(taps)], dim=1)
        return to_x, to_weight


def causal_conv1d_flops(T: int, channels: int, width: int) -> int:
    """Return the forward FLOPs of one sequence of T tokens."""
    return 2 * width * channels * T
