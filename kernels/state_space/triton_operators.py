"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode.

Shape letters, beside the matrices B and C: S sequences of T tokens (or packed in one row of T tokens), H heads of P
channels, G groups of heads, N numbers of a state per channel.
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
from kernels.common.packing import sequence_count, slot_count, takes_steps
from kernels.state_space import triton_kernels as kernels
from kernels.state_space.chunked import ssd_flops

LARGEST_STATE = 256  # numbers per channel
HEADS_FORWARD, HEADS_BACKWARD = 8, 16  # of a group, that a program takes one after the other
FORWARD_STAGES = 2  # of the kernel that takes a chunk: with three its registers spill
GATES = 16  # heads of which a program makes the gates
ADDED = 1024  # numbers of dB and dC that a program adds up


def _chunk(B: Tensor, backward: bool) -> int:
    """Return the tokens of a chunk: 128 forward and 64 backward, fewer where the rows of a state are long, so that what
    a program holds of B and C fits into registers and shared memory."""
    row_bytes = block_for(B.shape[-1], LARGEST_STATE) * B.element_size()
    return min(64, 16384 // row_bytes) * (1 if backward else 2)


def _rows(t: Tensor) -> Tensor:
    """Return t, or a copy of it where its heads are not side by side or its tokens not equally far apart: a stream that
    was cut out of a wider one needs none."""
    (rows, T, _, D), (row, token, head, column) = t.shape, t.stride()
    return t if (head, column) == (D, 1) and (rows == 1 or row == T * token) else t.contiguous()


def _parts(H: int, G: int, heads: int) -> int:
    """Return into how many parts programs of so many heads cut a group."""
    return -(-(H // G) // heads)


def _launchers(
    x: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, cu_seqlens: Tensor | None,
    steps: tuple[bool, float, float], backward: bool,
):  # fmt: skip
    """Return the slots of chunks, the tokens of a chunk, and launchers of the kernels of gates, of the one that goes
    from chunk to chunk and of those that take a chunk.

    Args:
        x, A, B, C, z, cu_seqlens: as in `ssd`, those with heads from `_rows`.
        steps: how time steps are made: whether there is a softplus, the least and the greatest.
        backward: of which pass.
    """
    (rows, T, H, P), (G, N) = x.shape, B.shape[2:]
    sizes = block_sizes("ssd", ANY_SIZE if x.dtype == torch.float32 else N, x)
    L, heads = _chunk(B, backward), HEADS_BACKWARD if backward else HEADS_FORWARD
    sequences, slots = sequence_count(rows, cu_seqlens), slot_count(rows, T, cu_seqlens, L)
    named = dict(zip(("SOFTPLUS", "least", "most"), steps, strict=True))
    named |= {"cu_seqlens": cu_seqlens, "T": T, "sequences": sequences, "H": H, "G": G, "P": P, "N": N, "L": L}
    named |= {f"ROW_{name}": 0 if t is None else t.stride(1) for name, t in zip("XBCZ", (x, B, C, z), strict=True)}
    named |= {"PER_TOKEN": A.dim() > 1, "BLOCK_H": GATES, "PER": heads, "PRECISION": precision_for(x.dtype)}
    BLOCK_P, columns = block_for(P, sizes.rows), block_for(N, sizes.columns)
    named |= {"BLOCK_P": BLOCK_P, "BLOCK_N": block_for(N, LARGEST_STATE)}
    run = partial(launch_kernel, stages=sizes.stages)

    def states_of(a: Tensor, b: Tensor, *others: Tensor | None, reverse: bool) -> None:
        part = {"BLOCK_N": columns, "ROW_A": a.stride(1), "ROW_B": b.stride(1), "REVERSE": reverse}
        grid = (sequences, H, -(-P // BLOCK_P) * -(-N // columns))
        run(kernels.states_kernel, a, b, *others, grid=grid, named=named | part)

    per_gates = partial(run, grid=(slots, -(-H // GATES)), named=named)
    warps = sizes.backward_warps if backward else sizes.forward_warps
    stages = sizes.stages if backward else min(sizes.stages, FORWARD_STAGES)
    grid = (slots, G * _parts(H, G, heads))
    return slots, L, per_gates, states_of, partial(launch_kernel, grid=grid, named=named, warps=warps, stages=stages)


@torch.library.custom_op("archipelago::ssd", mutates_args=())
def forward(
    x: Tensor, dt: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, softplus: bool, least: float,
    most: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y in x's dtype and the final states in float32; shapes as in `ssd`, time steps in [least, most]."""
    x, B, C, z = _rows(x), _rows(B), _rows(C), None if z is None else _rows(z)
    slots, L, per_gates, states_of, per_chunk = _launchers(
        x, A, B, C, z, cu_seqlens, (softplus, least, most), backward=False
    )
    y, (H, P), N = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.shape[2:], B.shape[3]
    final = torch.empty(sequence_count(len(x), cu_seqlens), H, P, N, dtype=torch.float32, device=x.device)
    gates = torch.empty(slots, H, kernels.GATES.value, L, dtype=torch.float32, device=x.device)
    states = torch.empty(slots, H, P, N, dtype=x.dtype, device=x.device)
    per_gates(kernels.gates_kernel, A, dt, dt_bias, gates)
    states_of(x, B, gates, states, initial_states, final, reverse=False)
    per_chunk(kernels.outputs_kernel, x, B, C, D, z, gates, states, y, None, None)
    return y, final


@forward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, softplus, least, most):
    sequences = sequence_count(x.shape[0], cu_seqlens)
    return x.new_empty(x.shape), x.new_empty((sequences, *x.shape[2:], B.shape[3]), dtype=torch.float32)


@torch.library.custom_op("archipelago::ssd_backward", mutates_args=())
def backward(
    x: Tensor, dt: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, softplus: bool, least: float,
    most: float, dy: Tensor, dfinal: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, dt, A, B, C, z and the initial states, empty ones of what is None and of an A [H]; and
    in float32 those of A, dt_bias and D per head [3, H]. dy and dfinal are contiguous."""
    x, B, C, z = _rows(x), _rows(B), _rows(C), None if z is None else _rows(z)
    slots, L, per_gates, states_of, per_chunk = _launchers(
        x, A, B, C, z, cu_seqlens, (softplus, least, most), backward=True
    )
    (H, P), (G, N) = x.shape[2:], B.shape[2:]
    parts = _parts(H, G, HEADS_BACKWARD)
    single = partial(torch.empty, dtype=torch.float32, device=x.device)
    states, dstates = (torch.empty(slots, H, P, N, dtype=x.dtype, device=x.device) for _ in range(2))
    gates, of_gates = (single(slots, H, n.value, L) for n in (kernels.GATES, kernels.PARTS))
    dx, ddt, dA, dB, dC, dz, dinitial = (
        _empty(t) for t in (x, dt, A if A.dim() > 1 else None, B, C, z, initial_states)
    )
    of_chunks = single(3, slots, H)  # what each chunk adds to the gradients of A, dt_bias and D
    dA_parts = dA if A.dim() > 1 else of_chunks[0]
    dB_parts, dC_parts = (dB, dC) if parts == 1 else single(2, parts, *B.shape)
    per_gates(kernels.gates_kernel, A, dt, dt_bias, gates)
    states_of(x, B, gates, states, initial_states, None, reverse=False)
    if z is not None:
        dgated = torch.empty_like(dy)
        per_chunk(kernels.outputs_kernel, x, B, C, D, z, gates, states, dz, dy, dgated)
        dy = dgated
    states_of(dy, C, gates, dstates, dfinal, None if initial_states is None else dinitial, reverse=True)
    per_chunk(kernels.values_gradient_kernel, x, B, C, D, gates, dstates, dy, dx, of_chunks[2], of_gates)
    per_chunk(kernels.keys_gradient_kernel, x, B, C, gates, states, dstates, dy, dB_parts, dC_parts, of_gates)
    per_gates(
        kernels.gates_gradient_kernel, A, dt, dt_bias, of_gates, None if dt is None else ddt, dA_parts, of_chunks[1]
    )
    if parts > 1:
        named = {"parts": parts, "SIZE": B.numel(), "BLOCK": ADDED}
        launch_kernel(kernels.add_kernel, dB_parts, dC_parts, dB, dC, grid=(-(-B.numel() // ADDED),), named=named)
    return dx, ddt, dA, dB, dC, dz, dinitial, of_chunks.sum(1)


def _empty(t: Tensor | None) -> Tensor:
    """Return memory for the gradient of t, or an empty tensor."""
    return torch.empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device)


@backward.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, *others):
    kept = (x, dt, A if A.dim() > 1 else None, B, C, z, initial_states)
    return *(_empty(t) for t in kept), x.new_empty((3, x.shape[2]), dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, ctx.softplus, ctx.least, ctx.most = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # a gradient of the final states that nobody asked for is not zeros but None


def _differentiate(ctx, dy, dfinal):
    *inputs, cu_seqlens = ctx.saved_tensors
    dy = torch.zeros_like(inputs[0]) if dy is None else dy
    dx, ddt, dA, dB, dC, dz, dinitial, of_heads = backward(
        *inputs, cu_seqlens, ctx.softplus, ctx.least, ctx.most, dy.contiguous(),
        None if dfinal is None else dfinal.contiguous(),
    )  # fmt: skip
    dA_parts, dbias, dD = of_heads
    gradients = dx, ddt, dA_parts if inputs[2].dim() == 1 else dA, dB, dC, dD, dz, dbias, dinitial
    gradients = (d.to(t.dtype) if t is not None else None for d, t in zip(gradients, inputs, strict=True))
    return *gradients, None, None, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.ssd)
def _(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    """Count packed tokens as if they were one sequence; sequences of other lengths have other last chunks."""
    rows, T, H, P = x_shape
    return rows * ssd_flops(T, H, B_shape[2], P, B_shape[3])


@torch.library.custom_op("archipelago::ssd_steps", mutates_args=())
def steps(
    x: Tensor, dt: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, softplus: bool, least: float, most: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y and the final states, token by token, without gradients; as `forward`, of contiguous tensors."""
    (sequences, T, H, P), (G, N) = x.shape, B.shape[2:]
    y, final = torch.empty_like(x), torch.empty(sequences, H, P, N, dtype=torch.float32, device=x.device)
    BLOCK_P = min(16, power_of_two(P))
    named = {"T": T, "H": H, "G": G, "P": P, "N": N, "BLOCK_P": BLOCK_P, "BLOCK_N": power_of_two(N)}
    named |= {"SOFTPLUS": softplus, "least": least, "most": most, "PER_TOKEN": A.dim() > 1}
    launch_kernel(
        kernels.steps_kernel, x, dt, A, B, C, D, z, dt_bias, initial_states, y, final,
        grid=(-(-P // BLOCK_P), H, sequences), named=named, warps=1,
    )  # fmt: skip
    return y, final


@steps.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, softplus, least, most):
    return torch.empty_like(x), x.new_empty((x.shape[0], *x.shape[2:], B.shape[3]), dtype=torch.float32)


@register_flop_formula(torch.ops.archipelago.ssd_steps)
def _(x_shape, dt_shape, A_shape, B_shape, *args, out_shape=None, **kwargs) -> int:
    sequences, T, H, P = x_shape
    return sequences * T * ssd_flops(1, H, B_shape[2], P, B_shape[3])


def _packed(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def ssd_triton(
    x: Tensor, dt: Tensor | None, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial_states: Tensor | None, cu_seqlens: Tensor | None, softplus: bool, least: float,
    most: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return y in x's dtype and the final states, shapes as in `ssd`, with time steps in [least, most].

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or more than 256 numbers per channel.
    """
    check_dtype(x)
    T, N = x.shape[1], B.shape[3]
    if N > LARGEST_STATE:
        raise ValueError(
            f"{N} numbers per channel: the Triton kernels take up to {LARGEST_STATE}; choose backend='torch'"
        )
    given = [t for t in (x, dt, A, B, C, D, z, dt_bias, initial_states) if t is not None]
    if takes_steps(T, cu_seqlens, tuple(given)):
        x, A, B, C = (t.contiguous() for t in (x, A, B, C))
        dt, D, z, dt_bias, initial_states = (_packed(t) for t in (dt, D, z, dt_bias, initial_states))
        return steps(x, dt, A, B, C, D, z, dt_bias, initial_states, softplus, least, most)
    dt, D, dt_bias, initial_states = (_packed(t) for t in (dt, D, dt_bias, initial_states))
    return forward(x, dt, A.contiguous(), B, C, D, z, dt_bias, initial_states, cu_seqlens, softplus, least, most)
