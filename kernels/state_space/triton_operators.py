"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters, beside the matrices B and C: T tokens, H heads of P channels, G groups of heads, N numbers of a state
per channel.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import (
    ANY_SIZE,
    block_for,
    block_sizes,
    check_dtype,
    launch_kernel,
    power_of_two,
    precision_for,
)
from kernels.common.packing import boundaries, chunk_count, chunks_of, takes_steps
from kernels.state_space import triton_kernels as kernels
from kernels.state_space.chunked import CHUNK, ssd_flops

PASSED = 1024  # numbers of a state that one program hands from chunk to chunk


def _launchers(x: Tensor, B: Tensor, cu_seqlens: Tensor, backward: bool = False):
    """Return launchers of the kernels that work on a chunk and of the one that hands states from chunk to chunk."""
    (T, H, P), (G, N) = x.shape, B.shape[1:]
    sizes = block_sizes("ssd", ANY_SIZE, x)
    chunks = chunks_of(cu_seqlens, T, CHUNK)
    named = chunks._asdict() | {"H": H, "G": G, "P": P, "N": N, "L": CHUNK, "SIZE": P * N, "BLOCK": PASSED}
    named |= {"BLOCK_P": block_for(P, sizes.rows), "BLOCK_N": block_for(N, sizes.columns)}
    named |= {"PRECISION": precision_for(x.dtype), "READ": backward, "REVERSE": backward}
    warps = sizes.backward_warps if backward else sizes.forward_warps
    per_chunk = partial(launch_kernel, grid=(len(chunks.begins), H), named=named, warps=warps, stages=sizes.stages)
    hand_over = partial(launch_kernel, grid=(-(-P * N // PASSED), H, len(cu_seqlens) - 1), named=named)
    return per_chunk, hand_over


def _states(x: Tensor, B: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return memory for a state per chunk [chunks, H, P, N]."""
    (T, H, P), N = x.shape, B.shape[2]
    chunks = chunk_count(T, len(cu_seqlens) - 1, CHUNK)
    return torch.empty(chunks, H, P, N, dtype=torch.float32, device=x.device)


@torch.library.custom_op("archipelago::ssd", mutates_args=())
def forward(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, cu_seqlens: Tensor, single: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (in float32 if `single`, else in x's dtype), the final states, and the state before each chunk; for x
    [T, H, P], dt, g [T, H], B, C [T, G, N] and initial_states [sequences, H, P, N]."""
    per_chunk, hand_over = _launchers(x, B, cu_seqlens)
    y = torch.empty_like(x, dtype=torch.float32 if single else x.dtype)
    final, states = torch.empty_like(initial_states), _states(x, B, cu_seqlens)
    per_chunk(kernels.outer_kernel, x, B, dt, g, states)
    hand_over(kernels.pass_kernel, g, states, initial_states, final)
    per_chunk(kernels.outputs_kernel, x, dt, g, B, C, states, y)
    return y, final, states


@forward.register_fake
def _(x, dt, g, B, C, initial_states, cu_seqlens, single):
    y = torch.empty_like(x, dtype=torch.float32 if single else x.dtype)
    return y, torch.empty_like(initial_states), _states(x, B, cu_seqlens)


@torch.library.custom_op("archipelago::ssd_backward", mutates_args=())
def backward(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor, states: Tensor, dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, g, B, C and the initial states; all in float32 but dx, in x's dtype."""
    per_chunk, hand_over = _launchers(x, B, cu_seqlens, backward=True)
    dstates, dinitial, dx = _states(x, B, cu_seqlens), torch.empty_like(dfinal), torch.empty_like(x)
    ddt, dg = (torch.empty(g.shape, dtype=torch.float32, device=g.device) for _ in range(2))
    dB, dC = (torch.empty(*g.shape, B.shape[2], dtype=torch.float32, device=g.device) for _ in range(2))
    per_chunk(kernels.outer_kernel, dy, C, dt, g, dstates)
    hand_over(kernels.pass_kernel, g, dstates, dfinal, dinitial)
    per_chunk(kernels.values_gradient_kernel, x, dt, g, B, C, dstates, dy, dx, ddt)
    per_chunk(kernels.keys_gradient_kernel, x, dt, g, B, C, states, dstates, dy, dg, dB, dC)
    dB, dC = (d.unflatten(1, (B.shape[1], -1)).sum(2) for d in (dB, dC))
    return dx, ddt, dg, dB, dC, dinitial


@backward.register_fake
def _(x, dt, g, B, C, cu_seqlens, states, dy, dfinal):
    others = (torch.empty_like(t, dtype=torch.float32) for t in (dt, g, B, C))
    return torch.empty_like(x), *others, torch.empty_like(dfinal)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], output[2])


def _differentiate(ctx, dy, dfinal, _):
    x, dt, g, B, C, initial_states, cu_seqlens, states = ctx.saved_tensors
    gradients = backward(x, dt, g, B, C, cu_seqlens, states, dy.contiguous(), dfinal.contiguous())
    inputs = (x, dt, g, B, C, initial_states)
    return *(d.to(t.dtype) for d, t in zip(gradients, inputs, strict=True)), None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.ssd)
def _(x_shape, dt_shape, g_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    """Count as if all tokens were one sequence; sequences of other lengths have other last chunks."""
    T, H, P = x_shape
    return ssd_flops(T, H, B_shape[1], P, B_shape[2])


@torch.library.custom_op("archipelago::ssd_steps", mutates_args=())
def steps(
    x: Tensor, dt: Tensor, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, single: bool
) -> tuple[Tensor, Tensor]:
    """Return y and the final states, token by token, without gradients; shapes as in `ssd`."""
    (sequences, T, H, P), (G, N) = x.shape, B.shape[2:]
    y, final = torch.empty_like(x, dtype=torch.float32 if single else x.dtype), torch.empty_like(initial_states)
    BLOCK_P = min(16, power_of_two(P))
    named = {"T": T, "H": H, "G": G, "P": P, "N": N, "BLOCK_P": BLOCK_P, "BLOCK_N": power_of_two(N)}
    grid = (-(-P // BLOCK_P), H, sequences)
    launch_kernel(kernels.steps_kernel, x, dt, g, B, C, initial_states, y, final, grid=grid, named=named, warps=1)
    return y, final


@steps.register_fake
def _(x, dt, g, B, C, initial_states, single):
    return torch.empty_like(x, dtype=torch.float32 if single else x.dtype), torch.empty_like(initial_states)


@register_flop_formula(torch.ops.archipelago.ssd_steps)
def _(x_shape, dt_shape, g_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    sequences, T, H, P = x_shape
    return sequences * T * ssd_flops(1, H, B_shape[2], P, B_shape[3])


def ssd_triton(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor, cu_seqlens: Tensor | None,
    single: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y (in float32 if `single`, else in x's dtype) and the final states, shapes as in `ssd`, with the log
    decays g = dt A, of all sequences or for each.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    check_dtype(x)
    rows, T, H, _ = x.shape
    g = g.expand(rows, T, H)
    dt = torch.ones_like(g) if dt is None else dt
    if takes_steps(T, cu_seqlens, (x, dt, g, B, C, initial_states)):
        return steps(*(t.contiguous() for t in (x, dt, g, B, C, initial_states)), single)
    packed = (t.flatten(0, 1).contiguous() for t in (x, dt, g, B, C))
    y, final_states, _ = forward(*packed, initial_states.contiguous(), boundaries(rows, T, cu_seqlens, like=x), single)
    return y.view(x.shape), final_states
