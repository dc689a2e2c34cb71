"""The short causal depthwise convolution in front of recurrent mixers."""

import torch.nn.functional as F
from torch import Tensor

from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.torch import causal_conv1d_torch

BACKENDS = {"reference": causal_conv1d_reference, "torch": causal_conv1d_torch}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_w weight[:, w] * x_{t - W + 1 + w}), each channel by itself.

    Args:
        x: [B, T, C].
        weight: [C, W], the last column weighs the current token.
        bias: [C], zeros where None.
        initial_state: [B, W - 1, C], the tokens before x; zeros where None.
        activation: "silu", or None for the plain sum.
        backend: "auto", "torch" or "reference".

    Returns:
        y [B, T, C] and the last W - 1 inputs [B, W - 1, C], the state for the next call.

    Raises:
        ValueError: for shapes that do not fit together, an unknown activation or an unknown backend.
    """
    B, _, C = x.shape
    window = weight.shape[1] - 1
    if weight.shape[0] != C:
        raise ValueError(f"weight {tuple(weight.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias {tuple(bias.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    if initial_state is not None and initial_state.shape != (B, window, C):
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, it must be {(B, window, C)}")
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r} for causal_conv1d: choose 'silu' or None")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r} for causal_conv1d: choose from auto, {', '.join(BACKENDS)}")
    if initial_state is None:
        initial_state = x.new_zeros(B, window, C)
    y, state = BACKENDS["torch" if backend == "auto" else backend](x, weight, bias, initial_state)
    return F.silu(y) if activation else y, state
