"""The short causal depthwise convolution in front of recurrent mixers."""

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import choose
from kernels.causal_conv1d.reference import causal_conv1d_reference
from kernels.causal_conv1d.torch import causal_conv1d_torch
from kernels.sequences import check_packed, one_by_one

BACKENDS = {"reference": causal_conv1d_reference, "torch": causal_conv1d_torch}


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_w weight[:, w] * x_{t - W + 1 + w}), each channel by itself.

    Args:
        x: [B, T, C].
        weight: [C, W], the last column weighs the current token.
        bias: [C], zeros where None.
        initial_state: [N, W - 1, C], the tokens before x; zeros where None. N = B, or the number of sequences of
            cu_seqlens.
        activation: "silu", or None for the plain sum.
        cu_seqlens: [N + 1] int32 or int64: the batch of one holds N sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]; one may be empty.
        backend: "auto" (see `choose`), "torch", "reference" or "triton" (float32, bfloat16 and float16).

    Returns:
        y [B, T, C] and the last W - 1 inputs [N, W - 1, C], the state for the next call.

    Raises:
        ValueError: for shapes that do not fit together, an unknown activation, or a backend that there is not or
            that cannot run here.
    """
    B, T, C = x.shape
    window = weight.shape[1] - 1
    if cu_seqlens is not None:
        check_packed(B, T, cu_seqlens)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if weight.shape[0] != C:
        raise ValueError(f"weight {tuple(weight.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias {tuple(bias.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    if initial_state is not None and initial_state.shape != (N, window, C):
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, it must be {(N, window, C)}")
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r} for causal_conv1d: choose 'silu' or None")
    backend = choose("causal_conv1d", backend, [*BACKENDS, "triton"], "torch", x, channels=8, taps=window + 1)
    if initial_state is None:
        initial_state = x.new_zeros(N, window, C)
    if backend == "triton":
        from kernels.causal_conv1d.operator import causal_conv1d_triton

        return causal_conv1d_triton(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    run = BACKENDS[backend]
    if cu_seqlens is None:
        y, state = run(x, weight, bias, initial_state)
    else:
        y, state = one_by_one(lambda x, before: run(x, weight, bias, before), [x], initial_state, cu_seqlens, like=x)
    return (F.silu(y) if activation else y).to(x.dtype), state
