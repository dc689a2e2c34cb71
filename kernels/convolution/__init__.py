"""The short causal depthwise convolution in front of recurrent mixers.

Shape letters: B rows of the batch, T tokens, C channels, W taps, N sequences: B, or those packed in the one row.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.common.arguments import check_packed, check_shape, check_tensors
from kernels.common.dispatch import choose_backend, refuse_transforms
from kernels.common.operation import Operation
from kernels.common.packing import run_each_sequence, sequence_count
from kernels.convolution.depthwise import causal_conv1d_depthwise, causal_conv1d_flops
from kernels.convolution.problems import KEPT, random_problem
from kernels.convolution.reference import causal_conv1d_reference

__all__ = ["OPERATION", "causal_conv1d", "causal_conv1d_flops"]

BACKENDS = "reference", "torch"


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
    """Return y_t = silu(bias + sum_w weight[:, w] * x_{t - W + 1 + w}), each channel by itself, and the last inputs.

    Args:
        x: [B, T, C].
        weight: [C, W], the last column weighs the current token.
        bias: [C], zeros where None.
        initial_state: [N, W - 1, C], the tokens before x; zeros where None.
        activation: "silu", or None for the plain sum.
        cu_seqlens: [N + 1] int32 or int64: the batch of one row holds N sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]; one may be empty.
        backend: "auto" (see `choose_backend`), "torch", "reference" or "triton" (float32, bfloat16 and float16).

    Returns:
        y [B, T, C] in x's dtype, and the last W - 1 inputs [N, W - 1, C], the state for the next call.

    Raises:
        ValueError: for tensors, shapes or boundaries that do not fit together (see `check_tensors`, `check_packed`),
            an unknown activation, or a backend that does not exist or that cannot run here.
    """
    check_tensors(
        "causal_conv1d", x=(x, "B T C"), weight=(weight, "C W"), bias=(bias, "C"),
        initial_state=(initial_state, "N W-1 C"),
    )  # fmt: skip
    B, T, C = x.shape
    W = weight.shape[1]
    check_packed(B, T, cu_seqlens, like=x)
    N = sequence_count(B, cu_seqlens)
    if weight.shape[0] != C:
        raise ValueError(f"weight {tuple(weight.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias {tuple(bias.shape)} is not for the {C} channels of x {tuple(x.shape)}")
    check_shape("initial_state", initial_state, (N, W - 1, C))
    if activation not in ("silu", None):
        raise ValueError(f"unknown activation {activation!r} for causal_conv1d: choose 'silu' or None")
    backend = refuse_transforms("causal_conv1d", backend, x, weight, bias, initial_state)
    backend = choose_backend(OPERATION, backend, [*BACKENDS, "triton"], "torch", x, channels=8, taps=W)
    if backend == "triton" and x.numel():
        from kernels.convolution.triton_operators import causal_conv1d_triton

        return causal_conv1d_triton(x, weight, bias, initial_state, cu_seqlens, activation == "silu")
    if initial_state is None:
        initial_state = x.new_zeros(N, W - 1, C)

    def run(x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        convolved = causal_conv1d_reference if backend == "reference" else causal_conv1d_depthwise
        return convolved(x, weight, bias, before)

    y, state = run_each_sequence(run, [x], initial_state, cu_seqlens, like=x)
    return (F.silu(y) if activation else y).to(x.dtype), state


OPERATION = Operation(causal_conv1d, random_problem, KEPT)
