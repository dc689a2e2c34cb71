"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters: T tokens of all sequences, R writes of a token, W = T R of them; HV value heads of V dimensions, H heads
of K dimensions, of queries, write keys and read keys each its own number (HQ, HK, HA); D gates of a token and head, K
or 1; C writes of a chunk; N sequences.
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
from kernels.fast_weights import triton_kernels as kernels
from kernels.fast_weights.chunked import delta_rule_flops

LARGEST_HEAD = 256
CHANNELS = 16  # of the keys that the kernels of a chunk take at a time


def _slots(q: Tensor, u: Tensor, cu_seqlens: Tensor | None, length: int) -> int:
    """Return how many slots the chunks take."""
    W, _, V = u.shape
    return slot_count(W // length, length, cu_seqlens, chunk_for(q.shape[2], V, u.dtype))


def _launchers(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, cu_seqlens: Tensor | None, length: int, scale: float
):
    """Return launchers of the kernel that makes what a chunk is to itself, of those that go through a sequence, and of
    the one that makes the gradients of a chunk."""
    (T, HQ, K), (W, HV, V) = q.shape, u.shape
    sizes = block_sizes("delta_rule", K * u.element_size() // 2, q)
    C, sequences = chunk_for(K, V, u.dtype), sequence_count(W // length, cu_seqlens)
    BLOCK_V = fill_card(block_for(V, sizes.columns), V, HV * sequences, q)
    named = {"cu_seqlens": cu_seqlens, "length": length, "sequences": sequences, "scale": scale, "HV": HV, "HQ": HQ}
    named |= {"HK": k.shape[1], "HA": HV if a is None else a.shape[1], "K": K, "V": V, "D": g.shape[2], "R": W // T}
    named |= {
        "LEVELS": C.bit_length() - 1,
        "C": C,
        "PART": PART,
        "PRECISION": precision_for(u.dtype),
        "ALL_K": block_for(K, LARGEST_HEAD),
    }
    named |= {"BLOCK_K": block_for(K, CHANNELS)}
    chunks = (_slots(q, u, cu_seqlens, length), HV)
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


def _chunks(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, cu_seqlens: Tensor | None, length: int, per_chunk
) -> tuple[Tensor | None, ...]:
    """Return what `chunks_kernel` makes: e^since q, e^until k and e^since a [W, HV, K], the decays of whole chunks
    [slots, HV, K], P and the inverses [W, HV, C]."""
    (W, HV, V), K = u.shape, q.shape[2]
    like = partial(torch.empty, dtype=u.dtype, device=u.device)
    keys, pairs = (W, HV, K), (W, HV, chunk_for(K, V, u.dtype))
    q_since, k_until, a_since = like(keys), like(keys), None if a is None else like(keys)
    carries = like((_slots(q, u, cu_seqlens, length), HV, K), dtype=torch.float32)
    scores, inverses = like(pairs), None if a is None else like(pairs)
    made = q_since, k_until, a_since, carries, scores, inverses
    per_chunk(kernels.chunks_kernel, q, k, a, g, cu_seqlens, *made)
    return made


def _outputs(q: Tensor, u: Tensor, cu_seqlens: Tensor | None, length: int, final: bool) -> tuple[Tensor, Tensor]:
    """Return memory for the outputs and, if `final`, for the final states."""
    (T, _, K), (W, HV, V) = q.shape, u.shape
    states = (sequence_count(W // length, cu_seqlens), HV, K, V) if final else 0
    like = partial(torch.empty, device=u.device)
    return like((T, HV, V), dtype=u.dtype), like(states, dtype=torch.float32)


@torch.library.custom_op("archipelago::delta_rule", mutates_args=())
def forward(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, length: int, scale: float, final: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o [T, HV, V] and, if `final`, the final states.

    Args:
        q: [T, H, K].
        k, a, u: [W, H, K], [W, H, K] or None, and [W, HV, V].
        g: [T, HV, D].
        initial_state: [N, HV, K, V], zeros where None.
        cu_seqlens: [N + 1], where sequences begin and end counted in writes; None where all have `length` writes.
        scale: factor on the output.
        final: whether the final states are asked for.
    """
    per_chunk, per_sequence, _ = _launchers(q, k, a, u, g, cu_seqlens, length, scale)
    o, states = _outputs(q, u, cu_seqlens, length, final)
    q_since, k_until, a_since, *others = _chunks(q, k, a, u, g, cu_seqlens, length, per_chunk)
    per_sequence(
        kernels.sequences_kernel, q_since, k_until, a_since, u, *others, initial_state, cu_seqlens, o, None, None,
        states if final else None,
    )  # fmt: skip
    return o, states


@forward.register_fake
def _(q, k, a, u, g, initial_state, cu_seqlens, length, scale, final):
    return _outputs(q, u, cu_seqlens, length, final)


@torch.library.custom_op("archipelago::delta_rule_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, do: Tensor, dfinal: Tensor | None, length: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, a, u, g (in float32) and the initial states; of what is None, nothing. Those of
    heads that several value heads read are in float32, one for each that reads them."""
    per_chunk, per_sequence, per_gradient = _launchers(q, k, a, u, g, cu_seqlens, length, scale)
    gradients = dq, dk, da, du, dg, dinitial = _gradients(q, k, a, u, g, initial_state)
    q_since, k_until, a_since, *others = _chunks(q, k, a, u, g, cu_seqlens, length, per_chunk)
    new = u if a is None else torch.empty_like(u)
    (HV, V), K = u.shape[1:], q.shape[2]
    shape = (_slots(q, u, cu_seqlens, length), HV, K, V)
    states, dstates = (torch.empty(shape, dtype=u.dtype, device=u.device) for _ in range(2))
    per_sequence(
        kernels.sequences_kernel, q_since, k_until, a_since, u, *others, initial_state, cu_seqlens, None,
        None if a is None else new, states, None,
    )  # fmt: skip
    per_sequence(
        kernels.state_gradients_kernel, q_since, k_until, a_since, *others, do, dfinal, cu_seqlens, du, dstates,
        None if initial_state is None else dinitial,
    )  # fmt: skip
    per_gradient(
        kernels.gradients_kernel, q, k, a, g, new, du, states, dstates, do, cu_seqlens, dq, dk,
        None if a is None else da, dg,
    )  # fmt: skip
    return gradients


def _gradients(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return memory for the gradients."""
    HV = u.shape[1]
    like = partial(torch.empty, device=u.device)
    dq, dk, da = (
        like(0) if x is None
        else like((len(x), HV, x.shape[2]), dtype=x.dtype if x.shape[1] == HV else torch.float32)
        for x in (q, k, a)
    )  # fmt: skip
    dinitial = like(0) if initial_state is None else like(initial_state.shape, dtype=initial_state.dtype)
    return dq, dk, da, like(u.shape, dtype=u.dtype), like(g.shape, dtype=torch.float32), dinitial


@backward.register_fake
def _(q, k, a, u, g, initial_state, cu_seqlens, do, dfinal, length, scale):
    return _gradients(q, k, a, u, g, initial_state)


def _save(ctx, inputs, output):
    *tensors, ctx.length, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, do, dfinal):
    q, _, _, u, *_ = ctx.saved_tensors
    do = u.new_zeros((len(q), *u.shape[1:])) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    gradients = backward(*ctx.saved_tensors, do, dfinal, ctx.length, ctx.scale)
    given = zip(gradients, ctx.saved_tensors[:6], strict=True)
    return *(None if x is None else _summed(d, x).to(x.dtype) for d, x in given), *(None,) * 4


def _summed(d: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x from that of its heads repeated."""
    return d if d.shape == x.shape else d.unflatten(1, (x.shape[1], -1)).sum(2)


forward.register_autograd(_differentiate, setup_context=_save)


def _flops(tokens: int, q_shape, a_shape, u_shape, g_shape) -> int:
    return delta_rule_flops(
        tokens, u_shape[1], q_shape[2], u_shape[2], writes=u_shape[0] // q_shape[0], erases=a_shape is not None,
        per_channel=g_shape[2] > 1,
    )  # fmt: skip


@register_flop_formula(torch.ops.archipelago.delta_rule)
def _(q_shape, k_shape, a_shape, u_shape, g_shape, *args, out_shape=None, **kwargs) -> int:
    """Count as if all tokens were one sequence; sequences of other lengths have other last chunks."""
    return _flops(q_shape[0], q_shape, a_shape, u_shape, g_shape)


@torch.library.custom_op("archipelago::delta_rule_steps", mutates_args=())
def steps(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor | None, tokens: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o and the final states of sequences of so many tokens, token by token, without gradients; other arguments
    as of `forward`."""
    (T, HQ, K), (W, HV, V) = q.shape, u.shape
    o, final = _outputs(q, u, None, W // T * tokens, True)
    BLOCK_V = min(16, power_of_two(V))
    named = {"T": tokens, "HV": HV, "HQ": HQ, "HK": k.shape[1], "HA": HV if a is None else a.shape[1], "scale": scale}
    named |= {"K": K, "V": V, "D": g.shape[2], "R": W // T, "ALL_K": power_of_two(K), "BLOCK_V": BLOCK_V}
    grid = (-(-V // BLOCK_V), HV, T // tokens)
    launch_kernel(kernels.steps_kernel, q, k, a, u, g, initial_state, o, final, grid=grid, named=named, warps=1)
    return o, final


@steps.register_fake
def _(q, k, a, u, g, initial_state, tokens, scale):
    return _outputs(q, u, None, len(u) // len(q) * tokens, True)


@register_flop_formula(torch.ops.archipelago.delta_rule_steps)
def _(q_shape, k_shape, a_shape, u_shape, g_shape, *args, out_shape=None, **kwargs) -> int:
    return q_shape[0] * _flops(1, q_shape, a_shape, u_shape, g_shape)


def delta_rule_triton(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor | None, scale: float,
    cu_seqlens: Tensor | None, output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return o and the final state, arguments as of `delta_rule_reference`, cu_seqlens as of `delta_rule`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or heads above 256 dimensions.
    """
    check_dtype(u)
    (B, T, R, HV, V), K = u.shape, q.shape[3]
    cu_seqlens = None if cu_seqlens is None else boundaries(T, cu_seqlens) * R
    q, g = (x.flatten(0, 1).contiguous() for x in (q, g))
    k, u = (x.flatten(0, 2).contiguous() for x in (k, u))
    a = None if a is None else a.flatten(0, 2).contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    given = [x for x in (q, k, a, u, g, initial_state) if x is not None]
    if takes_steps(T, cu_seqlens, tuple(given)):
        o, final = steps(q, k, a, u, g, initial_state, T, scale)
    elif max(K, V) > LARGEST_HEAD:
        raise ValueError(
            f"heads of {K} and {V} dimensions: the Triton kernels take up to {LARGEST_HEAD}; choose backend='torch'"
        )
    else:
        o, final = forward(q, k, a, u, g, initial_state, cu_seqlens, T * R, scale, output_final_state)
    return o.view(B, T, HV, V), final if output_final_state else None
