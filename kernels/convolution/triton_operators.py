"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters: B rows of the batch, T tokens, C channels, W taps.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import ANY_SIZE, BlockSizes, block_sizes, check_dtype, launch_kernel, power_of_two
from kernels.common.packing import boundaries, chunk_count, chunks_of
from kernels.convolution import triton_kernels as kernels
from kernels.convolution.depthwise import causal_conv1d_flops


def _block_sizes(x: Tensor) -> BlockSizes:
    return block_sizes("causal_conv1d", ANY_SIZE, x)


def _launchers(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, silu: bool, backward: bool = False):
    """Return launchers of the kernels that work on a chunk and of those that work on a whole sequence."""
    C, W = weight.shape
    sizes = _block_sizes(x)
    chunks = chunks_of(cu_seqlens, len(x), sizes.rows)
    columns = -(-C // sizes.columns)
    named = chunks._asdict() | {"cu_seqlens": cu_seqlens, "C": C, "W": W, "BIAS": bias is not None, "SILU": silu}
    named |= {"BLOCK_T": sizes.rows, "BLOCK_C": sizes.columns, "BLOCK_W": power_of_two(W - 1)}
    warps = sizes.backward_warps if backward else sizes.forward_warps
    run = partial(launch_kernel, named=named, warps=warps, stages=sizes.stages)
    return partial(run, grid=(len(chunks.begins), columns)), partial(run, grid=(len(cu_seqlens) - 1, columns))


@torch.library.custom_op("archipelago::causal_conv1d", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y [T, C] and the final states, for x [T, C], weight [C, W] and initial_state [sequences, W - 1, C]."""
    per_chunk, per_sequence = _launchers(x, weight, bias, cu_seqlens, silu)
    y, final = torch.empty_like(x), torch.empty_like(initial_state)
    per_chunk(kernels.forward_kernel, x, initial_state, weight, bias, y)
    if weight.shape[1] > 1:
        per_sequence(kernels.final_kernel, x, initial_state, final)
    return y, final


@forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu):
    return torch.empty_like(x), torch.empty_like(initial_state)


@torch.library.custom_op("archipelago::causal_conv1d_backward", mutates_args=())
def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor, silu: bool, dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias (in float32) and the initial states."""
    per_chunk, per_sequence = _launchers(x, weight, bias, cu_seqlens, silu, backward=True)
    C, W = weight.shape
    dx, dstate = torch.empty_like(x), torch.empty_like(initial_state)
    chunks = chunk_count(len(x), len(cu_seqlens) - 1, _block_sizes(x).rows)
    shapes = (x.shape, (chunks, W, C), (chunks, C))
    dz, dweight, dbias = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    per_chunk(kernels.sums_kernel, x, initial_state, weight, bias, dy, dz, dweight, dbias)
    per_chunk(kernels.tokens_gradient_kernel, dz, dfinal, weight, dx)
    if W > 1:
        per_sequence(kernels.state_gradient_kernel, dz, dfinal, weight, dstate)
    return dx, dweight.sum(0).T.contiguous(), dbias.sum(0), dstate


@backward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, dy, dfinal):
    taps = torch.empty_like(weight, dtype=torch.float32)
    return torch.empty_like(x), taps, taps.new_empty(weight.shape[0]), torch.empty_like(initial_state)


def _save(ctx, inputs, output):
    x, weight, bias, initial_state, cu_seqlens, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _differentiate(ctx, dy, dfinal):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = backward(
        x, weight, bias, initial_state, cu_seqlens, ctx.silu, dy.contiguous(), dfinal.contiguous()
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, dstate, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.causal_conv1d)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return causal_conv1d_flops(x_shape[0], *weight_shape)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Return y and the final states, shapes as in `causal_conv1d`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    check_dtype(x)
    B, T, _ = x.shape
    state, cu_seqlens = initial_state.to(x.dtype).contiguous(), boundaries(B, T, cu_seqlens, like=x)
    y, final = forward(x.flatten(0, 1).contiguous(), weight.contiguous(), bias, state, cu_seqlens, silu)
    return y.view(x.shape), final
