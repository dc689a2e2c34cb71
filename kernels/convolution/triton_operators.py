"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters: B rows of the batch, T tokens, C channels, W taps.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import ANY_SIZE, block_sizes, check_dtype, launch_kernel
from kernels.common.packing import sequence_count, slot_count
from kernels.convolution import triton_kernels as kernels
from kernels.convolution.depthwise import causal_conv1d_flops

AT_ONCE = 8  # tokens that a program loads before it computes


def _rows(x: Tensor) -> Tensor:
    """Return x, or a copy of it where its channels are not side by side or its tokens not equally far apart."""
    (B, T, _), (row, token, channel) = x.shape, x.stride()
    return x if channel == 1 and (B == 1 or row == T * token) else x.contiguous()


def _launch(
    kernel, x: Tensor, *tensors: Tensor | None, weight: Tensor, cu_seqlens: Tensor | None, silu: bool, backward: bool
) -> None:
    (B, T, C), W, sizes = x.shape, weight.shape[1], block_sizes("causal_conv1d", ANY_SIZE, x)
    named = {"cu_seqlens": cu_seqlens, "T": T, "sequences": sequence_count(B, cu_seqlens), "C": C, "W": W}
    named |= {"ROW": x.stride(1), "SILU": silu, "AT_ONCE": AT_ONCE, "BLOCK_T": sizes.rows, "BLOCK_C": sizes.columns}
    grid = (slot_count(B, T, cu_seqlens, sizes.rows), -(-C // sizes.columns))
    warps = sizes.backward_warps if backward else sizes.forward_warps
    launch_kernel(kernel, x, *tensors, grid=grid, named=named, warps=warps, stages=sizes.stages)


@torch.library.custom_op("archipelago::causal_conv1d", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y [B, T, C] and the final states [sequences, W - 1, C]; shapes as in `causal_conv1d`."""
    x, (C, W) = _rows(x), weight.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = torch.empty(sequence_count(len(x), cu_seqlens), W - 1, C, dtype=x.dtype, device=x.device)
    _launch(
        kernels.forward_kernel, x, initial_state, weight, bias, y, final,
        weight=weight, cu_seqlens=cu_seqlens, silu=silu, backward=False,
    )  # fmt: skip
    return y, final


@forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu):
    C, W = weight.shape
    return x.new_empty(x.shape), x.new_empty(sequence_count(x.shape[0], cu_seqlens), W - 1, C)


@torch.library.custom_op("archipelago::causal_conv1d_backward", mutates_args=())
def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool,
    dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, of the initial states (empty where there are none), and in float32 of the taps and the
    bias [W + 1, C]. dy and dfinal are contiguous."""
    x, (B, T, C), W = _rows(x), x.shape, weight.shape[1]
    slots = slot_count(B, T, cu_seqlens, block_sizes("causal_conv1d", ANY_SIZE, x).rows)
    parts = torch.empty(slots, W + 1, C, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dstate = x.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    _launch(
        kernels.backward_kernel, x, initial_state, weight, bias, dy, dfinal, dx,
        None if initial_state is None else dstate, parts,
        weight=weight, cu_seqlens=cu_seqlens, silu=silu, backward=True,
    )  # fmt: skip
    return dx, dstate, parts.sum(0)


@backward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, dy, dfinal):
    C, W = weight.shape
    dstate = x.new_empty(0) if initial_state is None else torch.empty_like(initial_state)
    return x.new_empty(x.shape), dstate, x.new_empty((W + 1, C), dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # a gradient of the final states that nobody asked for is not zeros but None


def _differentiate(ctx, dy, dfinal):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dstate, sums = backward(
        x, weight, bias, initial_state, cu_seqlens, ctx.silu, dy.contiguous(),
        None if dfinal is None else dfinal.contiguous(),
    )  # fmt: skip
    dbias = None if bias is None else sums[-1].to(bias.dtype)
    return dx, sums[:-1].T.to(weight.dtype), dbias, None if initial_state is None else dstate, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.causal_conv1d)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return causal_conv1d_flops(x_shape[0] * x_shape[1], *weight_shape)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y and the final states, shapes as in `causal_conv1d`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    check_dtype(x)
    state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    return forward(x, weight.contiguous(), None if bias is None else bias.contiguous(), state, cu_seqlens, silu)
