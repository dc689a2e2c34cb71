"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters: T tokens, H key heads of K dimensions, HV value heads of V dimensions, C tokens of a chunk; B rows of
the batch; N sequences.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import (
    block_for,
    block_sizes,
    check_dtype,
    chunk_for,
    fill_card,
    launch_kernel,
    power_of_two,
    precision_for,
)
from kernels.common.packing import boundaries, sequence_count, slot_count, takes_steps
from kernels.common.tiles import PART
from kernels.delta import triton_kernels as kernels
from kernels.delta.chunked import gated_delta_rule_flops

LARGEST_HEAD = 256


def _slots(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, length: int) -> int:
    """Return how many slots the chunks take."""
    return slot_count(q.shape[0] // length, length, cu_seqlens, chunk_for(q.shape[2], v.shape[2], v.dtype))


def _launchers(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, length: int, scale: float):
    """Return launchers of the kernels that work on chunks of a key head, of those that go through a sequence, and of
    the one that makes the gradients of a chunk."""
    (_, H, K), (HV, V) = q.shape, v.shape[1:]
    sizes = block_sizes("gated_delta_rule", K * v.element_size() // 2, q)
    C, sequences = chunk_for(K, V, v.dtype), sequence_count(q.shape[0] // length, cu_seqlens)
    BLOCK_V = fill_card(block_for(V, sizes.columns), V, HV * sequences, q)
    named = {"cu_seqlens": cu_seqlens, "length": length, "sequences": sequences, "HV": HV, "H": H, "K": K, "V": V}
    named |= {"ROW_Q": q.stride(0), "ROW_K": k.stride(0), "ROW_V": v.stride(0), "C": C, "PART": PART}
    named |= {"BLOCK_K": block_for(K, LARGEST_HEAD), "scale": scale, "PRECISION": precision_for(v.dtype)}
    chunks = (_slots(q, v, cu_seqlens, length), H)
    per_chunk = partial(launch_kernel, named=named, grid=chunks, warps=sizes.forward_warps, stages=1)
    per_sequence = partial(
        launch_kernel, named=named | {"BLOCK_V": BLOCK_V}, grid=(-(-V // BLOCK_V), HV, sequences),
        warps=sizes.forward_warps, stages=sizes.stages,
    )  # fmt: skip
    gradients = partial(
        launch_kernel, named=named | {"BLOCK_V": block_for(V, sizes.rows)}, grid=chunks, warps=sizes.backward_warps,
        stages=1,
    )  # fmt: skip
    return per_chunk, per_sequence, gradients


def _made(
    q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, length: int, norms: bool,
    final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return memory for what the forward pass makes (see `forward`); of what is not asked for, none."""
    (T, H, K), (HV, V) = q.shape, v.shape[1:]
    single = partial(torch.empty, dtype=torch.float32, device=q.device)
    return (
        torch.empty(v.shape, dtype=v.dtype, device=v.device),
        single((sequence_count(T // length, cu_seqlens), HV, K, V) if final else 0),
        torch.empty((T, HV, chunk_for(K, V, v.dtype)), dtype=v.dtype, device=v.device),
        torch.empty((T, HV), dtype=torch.float64, device=v.device),
        single((T, H) if norms else 0),
        single((T, H) if norms else 0),
    )


def _or_none(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


@torch.library.custom_op("archipelago::gated_delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, cu_seqlens: Tensor | None, length: int, scale: float, norms: bool, final: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return o, the final states if `final`, and what the backward pass needs: the inverses [T, HV, C] in v's dtype,
    the sums of gates [T, HV] in float64 and, if `norms`, the factors of q and k [T, H].

    Args:
        q, k, v: [T, H, K], [T, H, K] and [T, HV, V]; tokens may lie apart, a token's numbers may not.
        g, beta: [T, HV].
        initial_state: [N, HV, K, V], zeros where None.
        A_log, dt_bias: [HV], or None where g is the gate itself.
        cu_seqlens: [N + 1], or None where every sequence has `length` tokens.
        scale: factor on the output.
        norms: whether q and k are divided by their norms.
        final: whether the final states are asked for.
    """
    per_chunk, per_sequence, _ = _launchers(q, k, v, cu_seqlens, length, scale)
    made = _made(q, v, initial_state, cu_seqlens, length, norms, final)
    o, states, inverses, sums, *norms_made = made
    factors = [_or_none(x) for x in norms_made]
    per_chunk(kernels.inverses_kernel, q, k, g, beta, A_log, dt_bias, cu_seqlens, inverses, sums, *factors)
    per_sequence(
        kernels.sequences_kernel, q, k, v, beta, inverses, sums, *factors, initial_state, cu_seqlens, o, None, None,
        _or_none(states),
    )  # fmt: skip
    return made


@forward.register_fake
def _(q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, length, scale, norms, final):
    return _made(q, v, initial_state, cu_seqlens, length, norms, final)


@torch.library.custom_op("archipelago::gated_delta_rule_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, cu_seqlens: Tensor | None, inverses: Tensor, sums: Tensor, q_norms: Tensor,
    k_norms: Tensor, do: Tensor, dfinal: Tensor | None, length: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v, g (in float32), beta and the initial states, and of A_log and dt_bias what each
    chunk adds, [slots, 2, HV]; of what is None, nothing."""
    per_chunk, per_sequence, per_gradient = _launchers(q, k, v, cu_seqlens, length, scale)
    gradients = dq, dk, dv, dg, dbeta, dinitial, dgates = _gradients(
        q, k, v, g, beta, initial_state, A_log, cu_seqlens, length
    )
    (HV, V), K, factors = v.shape[1:], q.shape[2], (_or_none(q_norms), _or_none(k_norms))
    new, dr = torch.empty_like(dv), torch.empty_like(dv)
    states, dstates = (
        torch.empty((_slots(q, v, cu_seqlens, length), HV, K, V), dtype=v.dtype, device=v.device) for _ in range(2)
    )
    per_sequence(
        kernels.sequences_kernel, q, k, v, beta, inverses, sums, *factors, initial_state, cu_seqlens, None, new,
        states, None,
    )  # fmt: skip
    per_sequence(
        kernels.state_gradients_kernel, q, k, beta, inverses, sums, *factors, do, dfinal, cu_seqlens, dr, dstates,
        _or_none(dinitial),
    )  # fmt: skip
    per_gradient(
        kernels.gradients_kernel, q, k, v, g, beta, A_log, dt_bias, sums, *factors, new, dr, states, dstates, do,
        cu_seqlens, dq, dk, dv, dg, dbeta, _or_none(dgates),
    )  # fmt: skip
    return gradients


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, A_log: Tensor | None,
    cu_seqlens: Tensor | None, length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return memory for the gradients."""
    like = partial(torch.empty, device=q.device)
    dq, dk, dv, dbeta = (like(x.shape, dtype=x.dtype) for x in (q, k, v, beta))
    dinitial = like(0) if initial_state is None else like(initial_state.shape, dtype=initial_state.dtype)
    slots = 0 if A_log is None else _slots(q, v, cu_seqlens, length)
    dgates = torch.zeros((slots, 2, v.shape[1]), dtype=torch.float32, device=q.device)  # an empty slot adds nothing
    return dq, dk, dv, like(g.shape, dtype=torch.float32), dbeta, dinitial, dgates


@backward.register_fake
def _(
    q, k, v, g, beta, initial_state, A_log, dt_bias, cu_seqlens, inverses, sums, q_norms, k_norms, do, dfinal, length,
    scale,
):  # fmt: skip
    return _gradients(q, k, v, g, beta, initial_state, A_log, cu_seqlens, length)


def _save(ctx, inputs, output):
    *tensors, ctx.length, ctx.scale, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, do, dfinal, *unused):
    v, g, A_log, dt_bias = (ctx.saved_tensors[i] for i in (2, 3, 6, 7))
    do = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    dq, dk, dv, dg, dbeta, dinitial, dgates = backward(*ctx.saved_tensors, do, dfinal, ctx.length, ctx.scale)
    dinitial = None if ctx.saved_tensors[5] is None else dinitial
    of_gate = (None, None) if A_log is None else dgates.sum(0)
    of_gate = (d if d is None else d.to(x.dtype) for d, x in zip(of_gate, (A_log, dt_bias), strict=True))
    return dq, dk, dv, dg.to(g.dtype), dbeta, dinitial, *of_gate, *(None,) * 5


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Count as if all tokens were one sequence; sequences of other lengths have other last chunks."""
    return gated_delta_rule_flops(q_shape[0], v_shape[1], q_shape[2], v_shape[2])


@torch.library.custom_op("archipelago::gated_delta_rule_steps", mutates_args=())
def steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, A_log: Tensor | None,
    dt_bias: Tensor | None, length: int, scale: float, norms: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o and the final state, token by token, without gradients; arguments as of `forward`."""
    (T, H, K), (HV, V) = q.shape, v.shape[1:]
    o, final = _stepped(q, v, length)
    BLOCK_V = min(16, power_of_two(V))
    named = {"T": length, "HV": HV, "H": H, "scale": scale, "K": K, "V": V, "NORMALISED": norms}
    named |= {"ROW_Q": q.stride(0), "ROW_K": k.stride(0), "ROW_V": v.stride(0)}
    named |= {"BLOCK_K": power_of_two(K), "BLOCK_V": BLOCK_V}
    grid = (-(-V // BLOCK_V), HV, T // length)
    tensors = (q, k, v, g, beta, A_log, dt_bias, initial_state, o, final)
    launch_kernel(kernels.steps_kernel, *tensors, grid=grid, named=named, warps=1)
    return o, final


def _stepped(q: Tensor, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return memory for outputs and final states."""
    (T, _, K), (HV, V) = q.shape, v.shape[1:]
    final = torch.empty((T // length, HV, K, V), dtype=torch.float32, device=v.device)
    return torch.empty(v.shape, dtype=v.dtype, device=v.device), final


@steps.register_fake
def _(q, k, v, g, beta, initial_state, A_log, dt_bias, length, scale, norms):
    return _stepped(q, v, length)


@register_flop_formula(torch.ops.archipelago.gated_delta_rule_steps)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return q_shape[0] * gated_delta_rule_flops(1, v_shape[1], q_shape[2], v_shape[2])


def _tokens(x: Tensor) -> Tensor:
    """Turn [B, T, heads, D] into [B T, heads, D], in its own memory only where a token's numbers do not lie together
    or the tokens are not equally far from each other."""
    x = x.flatten(0, 1)
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def gated_delta_rule_triton(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, A_log: Tensor | None, dt_bias: Tensor | None, use_qk_l2norm: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return o and the final state, arguments as of `gated_delta_rule`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or heads above 256 dimensions.
    """
    check_dtype(v)
    (B, T, _, K), V = q.shape, v.shape[3]
    cu_seqlens = None if cu_seqlens is None else boundaries(T, cu_seqlens)
    q, k, v = (_tokens(x) for x in (q, k, v))
    g, beta = (x.flatten(0, 1).contiguous() for x in (g, beta))
    others = [x if x is None else x.contiguous() for x in (initial_state, A_log, dt_bias)]
    if takes_steps(T, cu_seqlens, (q, k, v, g, beta, *(x for x in others if x is not None))):
        o, final = steps(q, k, v, g, beta, *others, T, scale, use_qk_l2norm)
    elif max(K, V) > LARGEST_HEAD:
        raise ValueError(
            f"heads of {K} and {V} dimensions: the Triton kernels take up to {LARGEST_HEAD}; choose backend='torch'"
        )
    else:
        o, final, *_ = forward(q, k, v, g, beta, *others, cu_seqlens, T, scale, use_qk_l2norm, output_final_state)
    return o.view(B, T, *v.shape[1:]), final if output_final_state else None
