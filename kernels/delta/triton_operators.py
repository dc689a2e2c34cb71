"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters: T tokens, H key heads of K dimensions, HV value heads of V dimensions, C tokens of a chunk; B rows of
the batch.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import block_for, block_sizes, check_dtype, launch_kernel, power_of_two, precision_for
from kernels.common.packing import boundaries, chunk_count, chunks_of, takes_steps
from kernels.delta import triton_kernels as kernels
from kernels.delta.chunked import gated_delta_rule_flops

LARGEST_HEAD = 256


def chunk_for(K: int, V: int) -> int:
    """Return the tokens of a chunk: heads above 128 dimensions leave shared memory for half as many."""
    return 64 if max(K, V) <= 128 else 32


def _launchers(q: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, backward: bool = False):
    """Return launchers of the kernels that work on a chunk and of those that go through a sequence."""
    (T, H, K), (HV, V) = q.shape, v.shape[1:]
    sizes, C = block_sizes("gated_delta_rule", K, q), chunk_for(K, V)
    chunks, BLOCK_V = chunks_of(cu_seqlens, T, C), block_for(V, sizes.columns)
    named = chunks._asdict() | {"HV": HV, "H": H, "K": K, "V": V, "C": C, "scale": scale, "PART": kernels.PART}
    named |= {"BLOCK_K": block_for(K, sizes.rows), "BLOCK_V": BLOCK_V, "PRECISION": precision_for(v.dtype)}
    run = partial(launch_kernel, named=named, warps=sizes.backward_warps if backward else sizes.forward_warps)
    per_chunk = partial(run, grid=(len(chunks.begins), HV), stages=1)
    per_sequence = partial(run, grid=(-(-V // BLOCK_V), HV, len(cu_seqlens) - 1), stages=sizes.stages)
    return per_chunk, per_sequence


def _saved_shapes(q: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of what the backward pass needs: inverse, w, v' and the state before each chunk."""
    (T, _, K), (HV, V) = q.shape, v.shape[1:]
    C = chunk_for(K, V)
    chunks = chunk_count(T, len(cu_seqlens) - 1, C)
    return (chunks, HV, C, C), (T, HV, K), (T, HV, V), (chunks, HV, K, V)


@torch.library.custom_op("archipelago::gated_delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return o, the final states and what the backward pass needs (see `_saved_shapes`); for q, k [T, H, K], v [T,
    HV, V], g, beta [T, HV] and initial_state [sequences, HV, K, V]."""
    per_chunk, per_sequence = _launchers(q, v, cu_seqlens, scale)
    shapes = _saved_shapes(q, v, cu_seqlens)
    A, w, new, states = (torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes)
    o, final = torch.empty_like(v), torch.empty_like(initial_state, dtype=torch.float32)
    per_chunk(kernels.scores_kernel, k, g, beta, A)
    per_chunk(kernels.invert_kernel, A, warps=1)
    per_chunk(kernels.writes_kernel, k, v, g, beta, A, new, w)
    per_sequence(kernels.states_kernel, k, g, new, w, states, initial_state, final)
    per_chunk(kernels.outputs_kernel, q, k, g, new, states, o)
    return o, final, A, w, new, states


@forward.register_fake
def _(q, k, v, g, beta, initial_state, cu_seqlens, scale):
    saved = (q.new_empty(shape, dtype=torch.float32) for shape in _saved_shapes(q, v, cu_seqlens))
    return torch.empty_like(v), torch.empty_like(initial_state, dtype=torch.float32), *saved


@torch.library.custom_op("archipelago::gated_delta_rule_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, cu_seqlens: Tensor, A: Tensor, w: Tensor, new: Tensor,
    states: Tensor, do: Tensor, dfinal: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, g, beta and the initial states; all in float32 but dv, in v's dtype."""
    per_chunk, per_sequence = _launchers(q, v, cu_seqlens, scale, backward=True)
    dnew, dstates, dv, dinitial = (torch.empty_like(x) for x in (new, states, v, dfinal))
    dq, dk, dw = (torch.empty_like(w) for _ in range(3))
    dg, dbeta = (torch.empty(g.shape, dtype=torch.float32, device=g.device) for _ in range(2))
    per_chunk(kernels.inside_gradients_kernel, q, k, g, do, dnew)
    per_sequence(kernels.state_gradients_kernel, q, k, g, w, do, dnew, dstates, dinitial, dfinal)
    per_chunk(kernels.output_gradients_kernel, q, k, g, new, states, dstates, do, dnew, dq, dk, dw, dg)
    per_chunk(kernels.write_gradients_kernel, k, v, g, beta, A, w, dw, dnew, dk, dv, dg, dbeta)
    dq, dk = (x.unflatten(1, (q.shape[1], -1)).sum(2) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial


@backward.register_fake
def _(q, k, v, g, beta, cu_seqlens, A, w, new, states, do, dfinal, scale):
    single = (torch.empty_like(x, dtype=torch.float32) for x in (q, k))
    gates = (torch.empty_like(x, dtype=torch.float32) for x in (g, beta))
    return *single, torch.empty_like(v), *gates, torch.empty_like(dfinal)


def _save(ctx, inputs, output):
    q, k, v, g, beta, initial_state, cu_seqlens, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, g, beta, initial_state, cu_seqlens, *output[2:])


def _differentiate(ctx, do, dfinal, *unused):
    q, k, v, g, beta, initial_state, cu_seqlens, A, w, new, states = ctx.saved_tensors
    gradients = backward(
        q, k, v, g, beta, cu_seqlens, A, w, new, states, do.contiguous(), dfinal.contiguous(), ctx.scale
    )
    inputs = (q, k, v, g, beta, initial_state)
    return *(d.to(x.dtype) for d, x in zip(gradients, inputs, strict=True)), None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Count as if all tokens were one sequence; sequences of other lengths have other last chunks."""
    return gated_delta_rule_flops(q_shape[0], v_shape[1], q_shape[2], v_shape[2])


@torch.library.custom_op("archipelago::gated_delta_rule_steps", mutates_args=())
def steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and the final state, token by token, without gradients; shapes as in `gated_delta_rule`."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    o, final, BLOCK_V = torch.empty_like(v), torch.empty_like(initial_state), min(16, power_of_two(V))
    named = {"T": T, "HV": HV, "H": H, "scale": scale, "K": K, "V": V, "BLOCK_K": power_of_two(K), "BLOCK_V": BLOCK_V}
    grid = (-(-V // BLOCK_V), HV, B)
    launch_kernel(kernels.steps_kernel, q, k, v, g, beta, initial_state, o, final, grid=grid, named=named, warps=1)
    return o, final


@steps.register_fake
def _(q, k, v, g, beta, initial_state, scale):
    return torch.empty_like(v), torch.empty_like(initial_state)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule_steps)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return q_shape[0] * q_shape[1] * gated_delta_rule_flops(1, v_shape[2], q_shape[3], v_shape[3])


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o and the final state, shapes as in `gated_delta_rule`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or heads above 256 dimensions.
    """
    check_dtype(v)
    (B, T, _, K), V = q.shape, v.shape[3]
    if takes_steps(T, cu_seqlens, (q, k, v, g, beta, initial_state)):
        return steps(*(x.contiguous() for x in (q, k, v, g, beta, initial_state)), scale)
    if max(K, V) > LARGEST_HEAD:
        raise ValueError(
            f"heads of {K} and {V} dimensions: the Triton kernels take up to {LARGEST_HEAD}; choose backend='torch'"
        )
    packed = (x.flatten(0, 1).contiguous() for x in (q, k, v, g, beta))
    o, final, *_ = forward(*packed, initial_state.contiguous(), boundaries(B, T, cu_seqlens, like=q), scale)
    return o.view(v.shape), final
