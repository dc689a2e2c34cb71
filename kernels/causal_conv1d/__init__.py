"""The short causal depthwise convolution in front of recurrent mixers."""

from torch import Tensor

from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.torch import causal_conv1d_torch

BACKENDS = {"reference": causal_conv1d_reference, "torch": causal_conv1d_torch}


def causal_conv1d(
    x: Tensor, weight: Tensor, *, initial_state: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """y_t = silu(sum_w weight[:, w] * x_{t - W + 1 + w}), each channel by itself.

    Args:
        x: [B, T, C].
        weight: [C, W], the last column weighs the current token.
        initial_state: [B, W - 1, C], the tokens before x; zeros where None.
        backend: "auto", "torch" or "reference".

    Returns:
        y [B, T, C] and the last W - 1 inputs [B, W - 1, C], the state for the next call.

    Raises:
        ValueError: for shapes that do not fit together or an unknown backend.
    """
    B, _, C = x.shape
    window = weight.shape[1] - 1
    if weight.shape[0] != C:
        raise ValueError(f"weight {tuple(weight.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    if initial_state is not None and initial_state.shape != (B, window, C):
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, it must be {(B, window, C)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r} for causal_conv1d: choose from auto, {', '.join(BACKENDS)}")
    if initial_state is None:
        initial_state = x.new_zeros(B, window, C)
    return BACKENDS["torch" if backend == "auto" else backend](x, weight, initial_state)
