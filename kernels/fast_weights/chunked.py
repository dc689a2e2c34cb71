"""The delta rule in chunks of C tokens, forward and backward: matrix products within a chunk, one state hand-over
between chunks.

Queries and read keys are alike: both are rows x that read the memory, a token's query after its last write, a read key
before its own. With G the sum of g within a chunk, S the state before it, and gram the products of rows and write keys,
channel by channel weighted by the decay between their tokens (`decays.py`; the WY form of Yang et al., arXiv
2406.06484, with gates per channel as in Kimi Linear, 2510.26692),

    L = gram of the read keys, strictly earlier writes    P = gram of the queries, writes up to their token
    reads = (e^G x) S      v' = (I + L)^-1 (u - reads of a)      o = scale (reads of q + P v')
    S_next = e^{G_last} S + (e^{G_last - G} k)^T v'

Only reads, v' and S go through the chunks one by one. The gradients are written out: autograd would hold twice the
matrices and take twice the time.

Shape letters: M = N chunks x B sequences x HV value heads, in this order, so that the heads of one chunk lie together;
T tokens of a sequence, C of a chunk; R writes of a token, E rows that it reads with: its query and, where there is
erasing, R read keys; D gates of a token and head; K and V dimensions of keys and values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.arguments import without_autocast
from kernels.common.launch import power_of_two
from kernels.fast_weights.decays import edge_decays, weighted_products, weighted_products_backward, within_token
from kernels.fast_weights.triangular import PART, unit_triangular_inverse

CHUNK = 64  # writes of a chunk


def chunk_for(T: int, writes: int) -> int:
    """Return the tokens of a chunk: a power of two, of at least as many as are inverted row by row."""
    most = power_of_two(CHUNK // writes + 1) // 2
    return max(PART, min(most, power_of_two(T)))


def _by_chunks(x: Tensor, C: int, heads: int) -> Tensor:
    """View [B, T, H, ...] as [N, B, H, heads / H, C, ...], heads repeated. A padding token has zeros everywhere: it
    changes nothing."""
    if pad := -x.shape[1] % C:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
    x = x.unflatten(1, (-1, C)).movedim(0, 1).transpose(2, 3).unsqueeze(3)
    return x.expand(*x.shape[:3], heads // x.shape[2], *x.shape[4:])


def _chunked(x: Tensor, C: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Turn [B, T, H, ...] into [M, C, ...] in its own memory."""
    x = _by_chunks(x, C, heads)
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format).flatten(0, 3)


def _joined(x: Tensor, like: Tensor) -> Tensor:
    """Turn [M, C, ...] into the shape [B, T, H, ...] of `like`, summed over the value heads that share one of its."""
    B, T, H = like.shape[:3]
    x = x.unflatten(0, (-(-T // x.shape[1]), B, H, -1))
    x = x.sum(3) if x.shape[3] > 1 else x[:, :, :, 0]
    x = x.transpose(2, 3).movedim(0, 1).clone(memory_format=torch.contiguous_format)
    return x.flatten(1, 2)[:, :T].contiguous()


def _inputs(q, k, a, u, g, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows that read [M, C, E, K], keys [M, C, R, K], u [M, C, R, V] and g [M, C, D], in `dtype`."""
    C, heads = chunk_for(u.shape[1], u.shape[2]), u.shape[3]
    k, u, g = (_chunked(x, C, heads, dtype) for x in (k.transpose(2, 3), u.transpose(2, 3), g))
    rows = k.new_empty(*k.shape[:2], 1 if a is None else 1 + k.shape[2], k.shape[3])
    for place, x in ((rows[:, :, :1], q[:, :, :, None]), (rows[:, :, 1:], a)):
        if x is not None:
            x = _by_chunks(x if x is not a else x.transpose(2, 3), C, heads)
            place.unflatten(0, x.shape[:4]).copy_(x)
    return rows, k, u, g


def _mask_own_writes(gram: Tensor) -> None:
    """Let the r-th read key of a token meet its own writes before the r-th only."""
    reads, R = gram.shape[2] - 1, gram.shape[4]
    earlier = torch.ones(reads, R, dtype=gram.dtype, device=gram.device).tril_(-1)
    within_token(gram)[:, :, 1:].mul_(earlier)


def _inverse(gram: Tensor) -> Tensor:
    """Return (I + L)^-1 [M, C R, C R]; nothing [0, C R, C R] without erasing."""
    erasing = gram[:, :, 1:].flatten(3)
    if erasing.shape[2] == 0:
        return gram.new_empty(0, erasing.shape[3], erasing.shape[3])
    return unit_triangular_inverse(erasing.flatten(1, 2))


def chunked_forward(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return o, the final state, and what the backward pass needs: gram, inverse, v' and the state before each chunk.

    Shapes as in `delta_rule_reference`; computes in the dtype of the initial state.
    """
    B, T, _, HV, V = u.shape
    rows, keys, new, gates = _inputs(q, k, a, u, g, initial_state.dtype)
    (M, C, E, K), R = rows.shape, keys.shape[2]
    gram = weighted_products(rows, keys, gates)
    _mask_own_writes(gram)
    inverse = _inverse(gram)
    growth, to_end = edge_decays(gates)
    carry = growth[:, -1].view(-1, B * HV, gates.shape[2], 1)
    reading, written = (rows * growth[:, :, None]).flatten(1, 2), (keys * to_end[:, :, None]).flatten(1, 2)
    new = new.flatten(1, 2)

    reads = new.new_empty(M, C, E, V)
    states = new.new_empty(len(carry) + 1, B * HV, K, V)
    states[0] = initial_state.flatten(0, 1)
    for n in range(len(carry)):
        chunk = slice(n * B * HV, (n + 1) * B * HV)
        torch.bmm(reading[chunk], states[n], out=reads[chunk].flatten(1, 2))
        if a is not None:
            left = new[chunk].unflatten(1, (C, R)) - reads[chunk, :, 1:]
            torch.bmm(inverse[chunk], left.flatten(1, 2), out=new[chunk])
        torch.mul(states[n], carry[n], out=states[n + 1]).baddbmm_(written[chunk].mT, new[chunk])
    o = torch.baddbmm(reads[:, :, 0], gram[:, :, 0].flatten(2), new, beta=scale, alpha=scale)
    final_state = states[-1].view(B, HV, K, V).clone()
    return _joined(o, u[:, :, 0]).to(u.dtype), final_state, gram, inverse, new, states


def _gradients_through_states(reading, written, carry, inverse, dreads, dnew, dfinal) -> tuple[Tensor, Tensor]:
    """Go backwards through the chunks: complete the gradient of what was read, in place, and return that of u and that
    of the state after each chunk [N + 1, B HV, K, V]."""
    N, heads = carry.shape[:2]
    M, C, E, V = dreads.shape
    dstates = dreads.new_empty(N + 1, heads, written.shape[2], V)
    dstates[N] = dfinal.flatten(0, 1)
    du = torch.empty_like(dnew) if len(inverse) else dnew
    for n in reversed(range(N)):
        chunk = slice(n * heads, (n + 1) * heads)
        dnew[chunk].baddbmm_(written[chunk], dstates[n + 1])
        if len(inverse):
            torch.bmm(inverse[chunk].mT, dnew[chunk], out=du[chunk])
            torch.neg(du[chunk].unflatten(1, (C, -1)), out=dreads[chunk, :, 1:])
        torch.mul(dstates[n + 1], carry[n], out=dstates[n])
        dstates[n].baddbmm_(reading[chunk].mT, dreads[chunk].flatten(1, 2))
    return du, dstates


def chunked_backward(
    q, k, a, u, g, gram, inverse, new, states, do, dfinal, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, a (nothing, [0], without), u, g and the initial state, in the dtype of the
    states."""
    B, _, _, HV, V = u.shape
    rows, keys, _, gates = _inputs(q, k, a, u, g, states.dtype)
    (M, C, E, K), R = rows.shape, keys.shape[2]
    growth, to_end = (x[:, :, None] for x in edge_decays(gates))
    carry = growth[:, -1, 0].view(-1, B * HV, gates.shape[2], 1)

    dreads = new.new_empty(M, C, E, V)
    of_queries = _by_chunks(do, C, HV)
    dreads[:, :, 0].unflatten(0, of_queries.shape[:4]).copy_(of_queries).mul_(scale)
    dnew = gram[:, :, 0].flatten(2).mT @ dreads[:, :, 0]
    du, dstates = _gradients_through_states(
        (rows * growth).flatten(1, 2), (keys * to_end).flatten(1, 2), carry, inverse, dreads, dnew, dfinal
    )
    before, dafter = states[:-1].flatten(0, 1), dstates[1:].flatten(0, 1)

    dreads = dreads.flatten(1, 2)
    drows = (dreads @ before.mT).view(rows.shape).mul_(growth)
    dkeys = (new @ dafter.mT).view(keys.shape).mul_(to_end)
    over = (2, 3) if gates.shape[2] == 1 else (2,)
    from_start, to_last = ((x * dx).sum(over).view(gates.shape) for x, dx in ((rows, drows), (keys, dkeys)))
    whole = (before * dafter).sum(-1).mul_(growth[:, -1, 0])
    from_start[:, -1] += whole.sum(-1, keepdim=True) if gates.shape[2] == 1 else whole
    dgram = (dreads @ new.mT).view(gram.shape)
    _mask_own_writes(dgram)
    dgates = weighted_products_backward(dgram, gram, rows, keys, gates, drows, dkeys, from_start, to_last)

    dq, dk = _joined(drows[:, :, 0], q), _joined(dkeys, k.transpose(2, 3)).transpose(2, 3).contiguous()
    du, dg = _joined(du.unflatten(1, (C, R)), u.transpose(2, 3)).transpose(2, 3).contiguous(), _joined(dgates, g)
    da = new.new_empty(0)
    if a is not None:
        da = _joined(drows[:, :, 1:], a.transpose(2, 3)).transpose(2, 3).contiguous()
    return dq, dk, da, du, dg, dstates[0].view(B, HV, K, V).clone()


@torch.library.custom_op("archipelago::delta_rule_chunked", mutates_args=())
def forward(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q):
        return chunked_forward(q, k, a, u, g, initial_state, scale)


@torch.library.custom_op("archipelago::delta_rule_chunked_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, gram: Tensor, inverse: Tensor, new: Tensor,
    states: Tensor, do: Tensor, dfinal: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    with without_autocast(q):
        return chunked_backward(q, k, a, u, g, gram, inverse, new, states, do, dfinal, scale)


@forward.register_fake
def _(q, k, a, u, g, initial_state, scale):
    (B, T, R, HV, V), K = u.shape, q.shape[3]
    C, E = chunk_for(T, R), 1 if a is None else 1 + R
    N = -(-T // C)
    M = N * B * HV
    shapes = (M, C, E, C, R), (0 if a is None else M, C * R, C * R), (M, C * R, V), (N + 1, B * HV, K, V)
    return u.new_empty(B, T, HV, V), torch.empty_like(initial_state), *(initial_state.new_empty(s) for s in shapes)


@backward.register_fake
def _(q, k, a, u, g, gram, inverse, new, states, do, dfinal, scale):
    shapes = q.shape, k.shape, (0,) if a is None else a.shape, u.shape, g.shape, dfinal.shape
    return tuple(states.new_empty(shape) for shape in shapes)


def _save(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # zeros for all that is kept for the backward pass
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx, do, dfinal, *unused):
    *inputs, initial_state = ctx.saved_tensors[:6]
    _, _, _, u, _ = inputs
    do = torch.zeros_like(u[:, :, 0]) if do is None else do
    dfinal = torch.zeros_like(initial_state) if dfinal is None else dfinal
    gradients = backward(*inputs, *ctx.saved_tensors[6:], do, dfinal, ctx.scale)
    given = zip(gradients, (*inputs, initial_state), strict=True)
    return *(None if x is None else d.to(x.dtype) for d, x in given), None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.delta_rule_chunked)
def _(q_shape, k_shape, a_shape, u_shape, g_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, R, HV, V = u_shape
    K, D = q_shape[3], g_shape[3]
    return B * delta_rule_flops(T, HV, K, V, writes=R, erases=a_shape is not None, per_channel=D > 1)


def delta_rule_chunked(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and the final state, shapes as in `delta_rule_reference`; computes in the dtype of the initial state."""
    o, final_state, *_ = forward(q, k, a, u, g, initial_state, scale)
    return o, final_state


def delta_rule_flops(
    T: int, value_heads: int, K: int, V: int, *, writes: int = 1, erases: bool = True, per_channel: bool = False
) -> int:
    """Return the forward FLOPs of one sequence of T tokens.

    Matrix products count 2mnk; the triangular system of n rows counts n^2 for each column of v', however it is solved.
    Key heads are repeated to value heads before the products, so they count once for every value head. With one gate
    per head products between tokens are whole matrices, with one per channel the half that is not 0. One token alone
    takes a step of the recurrence.
    """
    reads = writes if erases else 0
    if T == 1:
        return value_heads * 2 * (reads + 1) * K * V
    C = chunk_for(T, writes)
    chunks = -(-T // C)
    pairs = C * (C + 1) // 2 if per_channel else C * C
    inside = 2 * (1 + reads) * writes * pairs * K + 2 * C * C * writes * V + (C * reads) ** 2 * V
    state = 2 * C * (1 + reads + writes) * K * V
    return value_heads * chunks * (inside + state)
