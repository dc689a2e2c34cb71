"""The delta rule in chunks of C writes, forward and backward, in Triton: two kernels forward, four backward.

The writes of all tokens stand one after the other, R of a token. Each is a row of a chunk: its token's gates act before
the first of them, the token's query reads after the last, so that a token may begin in one chunk and end in the next.

With S the state before a chunk, and for every key channel since the sum of gates from the start of the chunk through a
write and until the sum after it to the end,

    L_ij = sum of a_i k_j decay_ij over the channels, j < i      P_ij = that of q_i k_j, j <= i
    v' = (I + L)^-1 (u - (e^since a) S)      o = scale ((e^since q) S + P v')
    S_next = e^{since of the last} S + (e^until k)^T v'

decay_ij is made as in decays.py: the chunk is halved, and so on; between two writes of the two halves of a block lies
e^{since_i} e^{until_j}, the sums going from the middle of the block outwards. Nothing is subtracted, no exponent is
positive where no gate is, gates of -inf are exact, and no write knows a gate after its own.

`chunks_kernel` makes for every chunk P, (I + L)^-1 and the rows with their decays; `sequences_kernel` goes through the
chunks of a sequence with some columns of S in registers. Backward both run again, the second to keep S before every
chunk and v'; `state_gradients_kernel` goes from the last chunk to the first with the gradient of S; and
`gradients_kernel` takes every chunk by itself, BLOCK_K key channels at a time. Nothing but the inputs is kept for it.

Operands of products are in u's dtype, of float32 in three parts of TF32 that together keep its precision; sums are
float32. Nothing is added atomically, so two runs are equal bit for bit.

Chunks have slots as in kernels/common/slots.py.

Shape letters: C writes of a chunk, HV value heads of V dimensions, that read HQ, HK and HA heads of queries, write keys
and read keys of K dimensions; D gates of a token and head, K or 1. BLOCK_K and BLOCK_V are the dimensions that a
program holds at a time. T tokens of a sequence in decoding.
"""

import triton
import triton.language as tl

from kernels.common.slots import chunk_at, sequence_at
from kernels.common.tiles import inverse_of, product, put_state, put_tokens, state, state_at, tokens


@triton.jit
def of_tokens(
    pointer, at, end, heads, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first, R: tl.constexpr,
    WRITE: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Return pointers [C, BLOCK_D] into [tokens, heads, D] for the writes from `at` on, and a mask of those that exist
    and are their token's write number WRITE."""
    i, j = tl.arange(0, C), first + tl.arange(0, BLOCK_D)
    exist = ((at + i < end) & ((at + i) % R == WRITE))[:, None] & (j < D)[None]
    token = tl.full((), 0, tl.int64) + at // R  # a plain int in the interpreter
    return pointer + (token * heads + head) * D + ((at % R + i) // R * (heads * D))[:, None] + j[None], exist


@triton.jit
def queries(q, at, end, heads, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first, R: tl.constexpr, C: tl.constexpr):
    """Return what belongs to a token's last write [C, BLOCK_D], as it is in memory, and zeros for the other writes."""
    where, exist = of_tokens(q, at, end, heads, head, D, BLOCK_D, first, R, R - 1, C)
    return tl.load(where, mask=exist, other=0.0)


@triton.jit
def put_queries(
    x, q, at, end, heads, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first, R: tl.constexpr, C: tl.constexpr
):
    """Store x [C, BLOCK_D] where `queries` reads it."""
    where, exist = of_tokens(q, at, end, heads, head, D, BLOCK_D, first, R, R - 1, C)
    tl.store(where, x.to(q.dtype.element_ty), mask=exist)


@triton.jit
def gates(g, at, end, HV, hv, D: tl.constexpr, BLOCK_K: tl.constexpr, first, R: tl.constexpr, C: tl.constexpr):
    """Return the logarithms of the decays before the writes from `at` on, [C, BLOCK_K]: 0 where a write is not the
    first of its token."""
    if D == 1:
        where, exist = of_tokens(g, at, end, HV, hv, 1, 1, 0, R, 0, C)
    else:
        where, exist = of_tokens(g, at, end, HV, hv, D, BLOCK_K, first, R, 0, C)
    return tl.broadcast_to(tl.load(where, mask=exist, other=0.0).to(tl.float32), (C, BLOCK_K))


@triton.jit
def is_second(level, C: tl.constexpr):
    """Return [C, 1], which writes are in the second half of their block of two halves of 2^level writes."""
    return (tl.arange(0, C)[:, None] >> level) % 2 == 1


@triton.jit
def other_half(x, level, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return x [C, BLOCK_K] with the halves of every block exchanged."""
    partner = tl.arange(0, C)[:, None] ^ (1 << level)
    return tl.gather(x, tl.broadcast_to(partner, (C, BLOCK_K)), 0)


@triton.jit
def joined(since, until, whole, level, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the sums of gates since the start of a block, until its end and of the whole block [C, BLOCK_K] from those
    of its halves."""
    other = other_half(whole, level, C, BLOCK_K)
    second = is_second(level, C)
    return since + tl.where(second, other, 0.0), until + tl.where(second, 0.0, other), whole + other


@triton.jit
def across_middle(pairs, level, C: tl.constexpr):
    """Return those of the pairs [C, C] whose row is in the second half of a block and whose column is in its first, 0
    for the others."""
    i, j = tl.arange(0, C)[:, None] >> level, tl.arange(0, C)[None] >> level
    return tl.where((i == j + 1) & (i % 2 == 1), pairs, 0.0)


@triton.jit(do_not_specialize=["HV", "HQ", "HK", "HA", "length", "sequences", "scale"])
def chunks_kernel(
    q, k, a, g, cu_seqlens, q_since, k_until, a_since, carries, scores, inverses, HV, HQ, HK, HA, length, sequences,
    scale, K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store for a chunk of a value head scale e^since q, e^until k and e^since a [writes, HV, K], the decays of the
    whole chunk [slots, HV, K], scale P and (I + L)^-1 [writes, HV, C]. The ones on the diagonal of the inverse are left
    out: what they are multiplied with need not be rounded. Without a there is neither e^since a nor an inverse."""
    slot, hv = tl.program_id(0), tl.program_id(1)
    n, begin, end, at = chunk_at(slot, cu_seqlens, length, sequences, C)
    if at >= end:
        return
    dtype = scores.dtype.element_ty
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None]
    P = tl.zeros((C, C), dtype=tl.float32)
    L = tl.zeros((C, C), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        q_CK = queries(q, at, end, HQ, hv // (HV // HQ), K, BLOCK_K, first, R, C).to(tl.float32)
        k_CK = tokens(k, at, end, HK * K, hv // (HV // HK), K, BLOCK_K, first, C).to(tl.float32)
        P += tl.where(i == j, tl.sum(q_CK * k_CK, 1)[:, None], 0.0)
        a_CK = tl.zeros_like(k_CK)
        if a is not None:
            a_CK = tokens(a, at, end, HA * K, hv // (HV // HA), K, BLOCK_K, first, C).to(tl.float32)
        since = gates(g, at, end, HV, hv, D, BLOCK_K, first, R, C)
        until, whole = tl.zeros_like(since), since
        for level in range(LEVELS):
            decay = tl.exp(tl.where(is_second(level, C), since, until))
            written = tl.trans((k_CK * decay).to(dtype))
            P += across_middle(product((q_CK * decay).to(dtype), written, PRECISION), level, C)
            if a is not None:
                L += across_middle(product((a_CK * decay).to(dtype), written, PRECISION), level, C)
            since, until, whole = joined(since, until, whole, level, C, BLOCK_K)
        growth = tl.exp(since)
        put_tokens(q_CK * (growth * scale), q_since, at, end, HV * K, hv, K, BLOCK_K, first, C)
        put_tokens(k_CK * tl.exp(until), k_until, at, end, HV * K, hv, K, BLOCK_K, first, C)
        if a is not None:
            put_tokens(a_CK * growth, a_since, at, end, HV * K, hv, K, BLOCK_K, first, C)
        channel = first + tl.arange(0, BLOCK_K)
        carry = tl.exp(tl.max(whole, 0))  # the same in all rows
        tl.store(carries + (slot.to(tl.int64) * HV + hv) * K + channel, carry, mask=channel < K)
    put_tokens(P * scale, scores, at, end, HV * C, hv, C, C, 0, C)
    if a is not None:
        inverse = tl.where(i == j, 0.0, inverse_of(L, PART, C, PRECISION))
        put_tokens(inverse, inverses, at, end, HV * C, hv, C, C, 0, C)


@triton.jit
def decays_of_chunk(carries, slot, HV, hv, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the decays of a whole chunk [BLOCK_K, 1]."""
    where, exist = state_at(carries, slot, HV, hv, K, 1, BLOCK_K, 1, 0, 0)
    return tl.load(where, mask=exist, other=0.0)


@triton.jit(do_not_specialize=["HV", "length", "sequences"])
def sequences_kernel(
    q_since, k_until, a_since, u, carries, scores, inverses, initial, cu_seqlens, o, new, states, final, HV, length,
    sequences, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, ALL_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through the chunks of a sequence. Store the outputs and the final state, or, where o is None, the state before
    every chunk, [slots, HV, K, V], and v' (without a it is u), in u's dtype."""
    first, hv, n = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    dtype = u.dtype.element_ty
    S = tl.zeros((ALL_K, BLOCK_V), dtype=tl.float32)
    if initial is not None:
        S += state(initial, n, HV, hv, K, V, ALL_K, BLOCK_V, first).to(tl.float32)
    begin, end, slot = sequence_at(n, cu_seqlens, length, sequences, C)
    for at in range(begin, end, C):
        this = slot + (at - begin) // C
        low = S.to(dtype)
        new_low = tokens(u, at, end, HV * V, hv, V, BLOCK_V, first, C)
        if a_since is not None:
            a_CK = tokens(a_since, at, end, HV * K, hv, K, ALL_K, 0, C)
            inverse = tokens(inverses, at, end, HV * C, hv, C, C, 0, C)
            r_CV = new_low.to(tl.float32) - product(a_CK, low, PRECISION)
            new_low = (r_CV + product(inverse, r_CV.to(dtype), PRECISION)).to(dtype)
        if o is None:
            put_state(low, states, this, HV, hv, K, V, ALL_K, BLOCK_V, first)
            if new is not None:
                put_tokens(new_low, new, at, end, HV * V, hv, V, BLOCK_V, first, C)
        else:
            q_CK = tokens(q_since, at, end, HV * K, hv, K, ALL_K, 0, C)
            P = tokens(scores, at, end, HV * C, hv, C, C, 0, C)
            o_CV = product(q_CK, low, PRECISION) + product(P, new_low, PRECISION)
            put_queries(o_CV, o, at, end, HV, hv, V, BLOCK_V, first, R, C)
        k_CK = tokens(k_until, at, end, HV * K, hv, K, ALL_K, 0, C)
        S *= decays_of_chunk(carries, this, HV, hv, K, ALL_K)
        S += product(tl.trans(k_CK), new_low, PRECISION)
    if final is not None:
        put_state(S, final, n, HV, hv, K, V, ALL_K, BLOCK_V, first)


@triton.jit(do_not_specialize=["HV", "length", "sequences"])
def state_gradients_kernel(
    q_since, k_until, a_since, carries, scores, inverses, do, dfinal, cu_seqlens, du, dstates, dinitial, HV, length,
    sequences, K: tl.constexpr, V: tl.constexpr, R: tl.constexpr, ALL_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go backwards through the chunks of a sequence: store the gradient of the state after each, [slots, HV, K, V],
    and that of u, both in u's dtype."""
    first, hv, n = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    dtype = scores.dtype.element_ty
    dS = tl.zeros((ALL_K, BLOCK_V), dtype=tl.float32)
    if dfinal is not None:
        dS += state(dfinal, n, HV, hv, K, V, ALL_K, BLOCK_V, first).to(tl.float32)
    begin, end, slot = sequence_at(n, cu_seqlens, length, sequences, C)
    last = tl.cdiv(end - begin, C) - 1
    for back in range(0, last + 1):
        at, this = begin + (last - back) * C, slot + last - back
        low = dS.to(dtype)
        put_state(low, dstates, this, HV, hv, K, V, ALL_K, BLOCK_V, first)
        do_CV = queries(do, at, end, HV, hv, V, BLOCK_V, first, R, C)
        P = tokens(scores, at, end, HV * C, hv, C, C, 0, C)
        k_CK = tokens(k_until, at, end, HV * K, hv, K, ALL_K, 0, C)
        du_CV = product(k_CK, low, PRECISION) + product(tl.trans(P), do_CV, PRECISION)
        q_CK = tokens(q_since, at, end, HV * K, hv, K, ALL_K, 0, C)
        dS *= decays_of_chunk(carries, this, HV, hv, K, ALL_K)
        dS += product(tl.trans(q_CK), do_CV, PRECISION)
        if a_since is not None:
            inverse = tokens(inverses, at, end, HV * C, hv, C, C, 0, C)
            du_CV += product(tl.trans(inverse), du_CV.to(dtype), PRECISION)
            a_CK = tokens(a_since, at, end, HV * K, hv, K, ALL_K, 0, C)
            dS -= product(tl.trans(a_CK), du_CV.to(dtype), PRECISION)
        put_tokens(du_CV, du, at, end, HV * V, hv, V, BLOCK_V, first, C)
    if dinitial is not None:
        put_state(dS, dinitial, n, HV, hv, K, V, ALL_K, BLOCK_V, first)


@triton.jit(do_not_specialize=["HV", "HQ", "HK", "HA", "length", "sequences", "scale"])
def gradients_kernel(
    q, k, a, g, new, du, states, dstates, do, cu_seqlens, dq, dk, da, dg, HV, HQ, HK, HA, length, sequences, scale,
    K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of queries, keys and gates of a chunk of a value head, each [., HV, .]."""
    slot, hv = tl.program_id(0), tl.program_id(1)
    n, begin, end, at = chunk_at(slot, cu_seqlens, length, sequences, C)
    if at >= end:
        return
    dtype = new.dtype.element_ty
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None]
    dP = tl.zeros((C, C), dtype=tl.float32)
    dL = tl.zeros((C, C), dtype=tl.float32)
    for first in range(0, V, BLOCK_V):
        new_CV = tokens(new, at, end, HV * V, hv, V, BLOCK_V, first, C)
        do_CV = queries(do, at, end, HV, hv, V, BLOCK_V, first, R, C)
        dP += product(do_CV, tl.trans(new_CV), PRECISION)
        if a is not None:
            du_CV = tokens(du, at, end, HV * V, hv, V, BLOCK_V, first, C)
            dL -= product(du_CV, tl.trans(new_CV), PRECISION)
    dP *= scale
    own = tl.sum(tl.where(i == j, dP, 0.0), 1)[:, None]
    dg_C = tl.zeros((C,), dtype=tl.float32)
    for channel in range(0, K, BLOCK_K):
        dq_CK = tl.zeros((C, BLOCK_K), dtype=tl.float32)
        dk_CK = tl.zeros((C, BLOCK_K), dtype=tl.float32)
        da_CK = tl.zeros((C, BLOCK_K), dtype=tl.float32)
        kept = tl.zeros((BLOCK_K,), dtype=tl.float32)  # <S, dS_next>
        for first in range(0, V, BLOCK_V):
            where, exist = state_at(states, slot, HV, hv, K, V, BLOCK_K, BLOCK_V, channel, first)
            S = tl.load(where, mask=exist, other=0.0)
            where, exist = state_at(dstates, slot, HV, hv, K, V, BLOCK_K, BLOCK_V, channel, first)
            dS = tl.load(where, mask=exist, other=0.0)
            kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
            do_CV = queries(do, at, end, HV, hv, V, BLOCK_V, first, R, C)
            dq_CK += product(do_CV, tl.trans(S), PRECISION)
            new_CV = tokens(new, at, end, HV * V, hv, V, BLOCK_V, first, C)
            dk_CK += product(new_CV, tl.trans(dS), PRECISION)
            if a is not None:
                du_CV = tokens(du, at, end, HV * V, hv, V, BLOCK_V, first, C)
                da_CK -= product(du_CV, tl.trans(S), PRECISION)
        q_CK = queries(q, at, end, HQ, hv // (HV // HQ), K, BLOCK_K, channel, R, C).to(tl.float32)
        k_CK = tokens(k, at, end, HK * K, hv // (HV // HK), K, BLOCK_K, channel, C).to(tl.float32)
        g_CK = gates(g, at, end, HV, hv, D, BLOCK_K, channel, R, C)
        since, until, whole = g_CK, tl.zeros_like(g_CK), g_CK
        for level in range(LEVELS):
            since, until, whole = joined(since, until, whole, level, C, BLOCK_K)
        growth = tl.exp(since)
        dq_CK *= growth * scale
        dk_CK *= tl.exp(until)
        # What counts for the gates of a block up to its own write, after it, and for all of them. Going to the halves
        # of a block, what the second has of the first kind and the first of the second count for all of the other.
        up_to, after = q_CK * dq_CK, k_CK * dk_CK
        a_CK = tl.zeros_like(k_CK)
        if a is not None:
            a_CK = tokens(a, at, end, HA * K, hv // (HV // HA), K, BLOCK_K, channel, C).to(tl.float32)
            da_CK *= growth
            up_to += a_CK * da_CK
        for_all = tl.where(i == 0, tl.exp(whole) * kept[None], 0.0)
        dq_CK += own * k_CK
        dk_CK += own * q_CK
        for back in range(LEVELS):
            half = LEVELS - 1 - back
            since, until, whole = g_CK, tl.zeros_like(g_CK), g_CK
            for level in range(half):
                since, until, whole = joined(since, until, whole, level, C, BLOCK_K)
            second = is_second(half, C)
            for_all += other_half(for_all + tl.where(second, up_to, after), half, C, BLOCK_K)
            decay = tl.exp(tl.where(second, since, until))
            written = (k_CK * decay).to(dtype)
            weights = across_middle(dP, half, C).to(dtype)
            dread = product(weights, written, PRECISION) * decay
            dwritten = product(tl.trans(weights), (q_CK * decay).to(dtype), PRECISION)
            up_to += q_CK * dread
            dq_CK += dread
            if a is not None:
                weights = across_middle(dL, half, C).to(dtype)
                dread = product(weights, written, PRECISION) * decay
                dwritten += product(tl.trans(weights), (a_CK * decay).to(dtype), PRECISION)
                up_to += a_CK * dread
                da_CK += dread
            dwritten *= decay
            after += k_CK * dwritten
            dk_CK += dwritten
        dg_CK = up_to + for_all
        put_queries(dq_CK, dq, at, end, HV, hv, K, BLOCK_K, channel, R, C)
        put_tokens(dk_CK, dk, at, end, HV * K, hv, K, BLOCK_K, channel, C)
        if a is not None:
            put_tokens(da_CK, da, at, end, HV * K, hv, K, BLOCK_K, channel, C)
        if D == 1:
            dg_C += tl.sum(dg_CK, 1)
        else:
            where, exist = of_tokens(dg, at, end, HV, hv, D, BLOCK_K, channel, R, 0, C)
            tl.store(where, dg_CK, mask=exist)
    if D == 1:
        where, exist = of_tokens(dg, at, end, HV, hv, 1, 1, 0, R, 0, C)
        tl.store(where, dg_C[:, None], mask=exist)


@triton.jit(do_not_specialize=["T", "HV", "HQ", "HK", "HA", "scale"])
def steps_kernel(
    q, k, a, u, g, initial, o, final, T, HV, HQ, HK, HA, scale, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr, ALL_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Run the recurrence token by token, for decoding: T tokens of each sequence; a state is read once and written
    once."""
    first, hv, sequence = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    S = tl.zeros((ALL_K, BLOCK_V), dtype=tl.float32)
    if initial is not None:
        S += state(initial, sequence, HV, hv, K, V, ALL_K, BLOCK_V, first).to(tl.float32)
    i, columns = tl.arange(0, ALL_K), first + tl.arange(0, BLOCK_V)
    for t in range(T):
        token = sequence.to(tl.int64) * T + t
        if D == 1:
            S *= tl.exp(tl.load(g + token * HV + hv).to(tl.float32))
        else:
            S *= tl.exp(tl.load(g + (token * HV + hv) * K + i, mask=i < K, other=0.0).to(tl.float32))[:, None]
        for r in range(R):
            write = token * R + r
            new_V = tl.load(u + (write * HV + hv) * V + columns, mask=columns < V, other=0.0).to(tl.float32)
            if a is not None:
                a_K = tl.load(a + (write * HA + hv // (HV // HA)) * K + i, mask=i < K, other=0.0).to(tl.float32)
                new_V -= tl.sum(S * a_K[:, None], 0)
            k_K = tl.load(k + (write * HK + hv // (HV // HK)) * K + i, mask=i < K, other=0.0).to(tl.float32)
            S += k_K[:, None] * new_V[None]
        q_K = tl.load(q + (token * HQ + hv // (HV // HQ)) * K + i, mask=i < K, other=0.0).to(tl.float32)
        o_V = tl.sum(S * q_K[:, None], 0) * scale
        tl.store(o + (token * HV + hv) * V + columns, o_V.to(o.dtype.element_ty), mask=columns < V)
    put_state(S, final, sequence, HV, hv, K, V, ALL_K, BLOCK_V, first)
