"""The gated delta rule in chunks of C tokens, forward and backward, in Triton: two kernels forward, three backward.

With G the sum of g within a chunk, S the state before it, decays_ij = e^{G_i - G_j} for i >= j, k and q divided by
their norms where that is asked for, and inverse = (I + A)^-1 as in chunked.py, neither u nor w is needed:

    r = beta (v - e^G k S)    v' = inverse r    S_next = e^{G_last} S + (e^{G_last - G} k)^T v'
    o = scale (e^G q S + (q k^T * decays) v')

`inverses_kernel` makes the inverses from k, the sums of gates and the norms; `sequences_kernel` goes through the
chunks of a sequence with some columns of S in registers. Backward, it goes once more and keeps S before every chunk
and v', `state_gradients_kernel` goes from the last chunk to the first with the gradients of S and of r, and
`gradients_kernel` takes every chunk of a key head by itself, with the value heads that read it.

Norms and strengths are factors of rows, multiplied to sums in float32, so that q, k and v meet the products as they
are in memory; but for `gradients_kernel`, which divides q and k by their norms first. Operands of products are in v's
dtype, of float32 in three parts of TF32 that together keep its precision; sums are float32, those of g float64, since
float32 loses the small differences of strong gates. Nothing is added atomically, so two runs are equal bit for bit.

Chunks have slots as in kernels/common/slots.py. The functions that find them stand here once more, without its guard of
boundaries (the operators bend those beforehand) and of empty sequences: with it more registers spill.

Shape letters: C tokens of a chunk (T of a sequence in decoding), H key heads of K dimensions, HV value heads of V
dimensions. BLOCK_K and BLOCK_V are the dimensions that a program holds; ROW_Q, ROW_K and ROW_V the numbers from one
token to the next.
"""

import triton
import triton.language as tl

from kernels.common.tiles import (
    decay_between,
    inverse_of,
    numbers,
    product,
    put_state,
    put_tokens,
    softplus,
    state,
    through_ends,
    through_pairs,
    tokens,
)

# No gate is taken as less: none of its e^G would differ, and larger sums, as of -inf, would lose what follows a reset.
LEAST_GATE = tl.constexpr(-1e5)


@triton.jit
def sequence_at(n, cu_seqlens, length, C: tl.constexpr):
    """Return begin and end of the n-th sequence, and the slot of its first chunk."""
    if cu_seqlens is None:
        begin, end, slot = n * length, (n + 1) * length, n * tl.cdiv(length, C)
    else:
        begin, end = tl.load(cu_seqlens + n).to(tl.int32), tl.load(cu_seqlens + n + 1).to(tl.int32)
        slot = begin // C + n
    return begin, end, slot


@triton.jit
def chunk_at(slot, cu_seqlens, length, sequences, C: tl.constexpr):
    """Return the first token of the chunk in a slot and the end of its sequence; an empty slot has no tokens before
    that end."""
    if cu_seqlens is None:
        n = slot // tl.cdiv(length, C)
    else:
        n = -1  # the last sequence whose first slot is not beyond this one
        for first in range(0, sequences, 256):
            i = first + tl.arange(0, 256)
            begins = tl.load(cu_seqlens + i, mask=i < sequences, other=0).to(tl.int32)
            n += tl.sum(((i < sequences) & (begins // C + i <= slot)).to(tl.int32), 0)
    begin, end, first_slot = sequence_at(n, cu_seqlens, length, C)
    return begin + (slot - first_slot) * C, end


@triton.jit
def gates_from(sums, at, end, HV, hv, C: tl.constexpr):
    """Return G [C] in float64, e^G and e^{G_last - G} [C], and e^{G_last}. After the last token G stays."""
    i = tl.minimum(at + tl.arange(0, C), end - 1)
    G = tl.load(sums + i.to(tl.int64) * HV + hv)
    last = tl.load(sums + (tl.minimum(at + C, end).to(tl.int64) - 1) * HV + hv)
    return G, tl.exp(G.to(tl.float32)), tl.exp((last - G).to(tl.float32)), tl.exp(last.to(tl.float32))


@triton.jit
def norm_factor(x):
    """Return 1 / sqrt(sum(x^2) + 1e-6) over the last axis of x in float32."""
    return 1.0 / tl.sqrt(tl.sum(x * x, 1) + 1e-6)


@triton.jit(do_not_specialize=["HV", "H", "length", "sequences"])
def inverses_kernel(
    q, k, g, beta, A_log, dt_bias, cu_seqlens, inverses, sums, q_norms, k_norms, HV, H, length, sequences,
    K: tl.constexpr, ROW_Q: tl.constexpr, ROW_K: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store for a chunk of a key head the inverses [tokens, HV, C] and sums of gates [tokens, HV] of its value heads,
    and, where q_norms is given, the factors [tokens, H] that divide q and k by their norms. The ones on the diagonal of
    an inverse are left out: what they are multiplied with need not be rounded."""
    h = tl.program_id(1)
    at, end = chunk_at(tl.program_id(0), cu_seqlens, length, sequences, C)
    if at >= end:
        return
    i = tl.arange(0, C)
    token = (at + i).to(tl.int64)
    inside = at + i < end
    k_CK = tokens(k, at, end, ROW_K, h, K, BLOCK_K, 0, C).to(inverses.dtype.element_ty)
    kk = product(k_CK, tl.trans(k_CK), PRECISION)
    if q_norms is not None:
        q_CK = tokens(q, at, end, ROW_Q, h, K, BLOCK_K, 0, C)
        tl.store(q_norms + token * H + h, norm_factor(q_CK.to(tl.float32)), mask=inside)
        factor = norm_factor(k_CK.to(tl.float32))
        tl.store(k_norms + token * H + h, factor, mask=inside)
        kk *= factor[:, None] * factor[None]
    for hv in range(h * (HV // H), (h + 1) * (HV // H)):
        gate = numbers(g, at, end, HV, hv, C)
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + hv).to(tl.float32))
            gate = -rate * softplus(gate + tl.load(dt_bias + hv).to(tl.float32))
            gate = tl.where(inside, gate, 0.0)
        G = tl.cumsum(tl.maximum(gate.to(tl.float64), LEAST_GATE), 0)
        tl.store(sums + token * HV + hv, G, mask=inside)
        b = numbers(beta, at, end, HV, hv, C)
        inverse = inverse_of(kk * decay_between(G, True, C) * b[:, None], PART, C, PRECISION)
        inverse = tl.where(i[:, None] == i[None], 0.0, inverse)
        put_tokens(inverse, inverses, at, end, HV * C, hv, C, C, 0, C)


@triton.jit(do_not_specialize=["HV", "H", "length", "scale"])
def sequences_kernel(
    q, k, v, beta, inverses, sums, q_norms, k_norms, initial, cu_seqlens, o, new, states, final, HV, H, length, scale,
    K: tl.constexpr, V: tl.constexpr, ROW_Q: tl.constexpr, ROW_K: tl.constexpr, ROW_V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through the chunks of a sequence. Store the outputs and the final state, or, where o is None, the state before
    every chunk, [slots, HV, K, V], and v', both in v's dtype."""
    first, hv, n = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    dtype = v.dtype.element_ty
    h = hv // (HV // H)
    S = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if initial is not None:
        S += state(initial, n, HV, hv, K, V, BLOCK_K, BLOCK_V, first).to(tl.float32)
    begin, end, slot = sequence_at(n, cu_seqlens, length, C)
    for at in range(begin, end, C):
        k_CK = tokens(k, at, end, ROW_K, h, K, BLOCK_K, 0, C).to(dtype)
        v_CV = tokens(v, at, end, ROW_V, hv, V, BLOCK_V, first, C)
        inverse = tokens(inverses, at, end, HV * C, hv, C, C, 0, C)
        b = numbers(beta, at, end, HV, hv, C)
        of_k = numbers(k_norms, at, end, H, h, C)
        G, growth, to_end, carry = gates_from(sums, at, end, HV, hv, C)
        low = S.to(dtype)
        r_CV = b[:, None] * (v_CV.to(tl.float32) - product(k_CK, low, PRECISION) * (growth * of_k)[:, None])
        new_CV = r_CV + product(inverse, r_CV.to(dtype), PRECISION)
        if o is None:
            put_state(low, states, slot + (at - begin) // C, HV, hv, K, V, BLOCK_K, BLOCK_V, first)
            put_tokens(new_CV, new, at, end, HV * V, hv, V, BLOCK_V, first, C)
        else:
            q_CK = tokens(q, at, end, ROW_Q, h, K, BLOCK_K, 0, C).to(dtype)
            of_q = numbers(q_norms, at, end, H, h, C) * scale
            scores = product(q_CK, tl.trans(k_CK), PRECISION) * decay_between(G, False, C)
            scores *= of_q[:, None] * of_k[None]
            o_CV = product(q_CK, low, PRECISION) * (growth * of_q)[:, None]
            o_CV += product(scores.to(dtype), new_CV.to(dtype), PRECISION)
            put_tokens(o_CV, o, at, end, HV * V, hv, V, BLOCK_V, first, C)
        S = S * carry + product(tl.trans(k_CK), (new_CV * (to_end * of_k)[:, None]).to(dtype), PRECISION)
    if final is not None:
        put_state(S, final, n, HV, hv, K, V, BLOCK_K, BLOCK_V, first)


@triton.jit(do_not_specialize=["HV", "H", "length", "scale"])
def state_gradients_kernel(
    q, k, beta, inverses, sums, q_norms, k_norms, do, dfinal, cu_seqlens, dr, dstates, dinitial, HV, H, length,
    scale, K: tl.constexpr, V: tl.constexpr, ROW_Q: tl.constexpr, ROW_K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go backwards through the chunks of a sequence: store the gradient of the state after each, [slots, HV, K, V],
    and that of r, both in v's dtype."""
    first, hv, n = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    dtype = inverses.dtype.element_ty
    h = hv // (HV // H)
    dS = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if dfinal is not None:
        dS += state(dfinal, n, HV, hv, K, V, BLOCK_K, BLOCK_V, first).to(tl.float32)
    begin, end, slot = sequence_at(n, cu_seqlens, length, C)
    last = tl.cdiv(end - begin, C) - 1
    for back in range(0, last + 1):
        at = begin + (last - back) * C
        q_CK = tokens(q, at, end, ROW_Q, h, K, BLOCK_K, 0, C).to(dtype)
        k_CK = tokens(k, at, end, ROW_K, h, K, BLOCK_K, 0, C).to(dtype)
        do_CV = tokens(do, at, end, HV * V, hv, V, BLOCK_V, first, C)
        inverse = tokens(inverses, at, end, HV * C, hv, C, C, 0, C)
        b = numbers(beta, at, end, HV, hv, C)
        of_q, of_k = numbers(q_norms, at, end, H, h, C) * scale, numbers(k_norms, at, end, H, h, C)
        G, growth, to_end, carry = gates_from(sums, at, end, HV, hv, C)
        scores = product(q_CK, tl.trans(k_CK), PRECISION) * decay_between(G, False, C)
        scores *= of_q[:, None] * of_k[None]
        low = dS.to(dtype)
        put_state(low, dstates, slot + last - back, HV, hv, K, V, BLOCK_K, BLOCK_V, first)
        dnew_CV = product(k_CK, low, PRECISION) * (to_end * of_k)[:, None]
        dnew_CV += product(tl.trans(scores.to(dtype)), do_CV, PRECISION)
        dr_CV = dnew_CV + product(tl.trans(inverse), dnew_CV.to(dtype), PRECISION)
        put_tokens(dr_CV, dr, at, end, HV * V, hv, V, BLOCK_V, first, C)
        dS = dS * carry
        dS += product(tl.trans(q_CK), (do_CV.to(tl.float32) * (growth * of_q)[:, None]).to(dtype), PRECISION)
        dS += product(tl.trans(k_CK), (dr_CV * -(b * growth * of_k)[:, None]).to(dtype), PRECISION)
    if dinitial is not None:
        put_state(dS, dinitial, n, HV, hv, K, V, BLOCK_K, BLOCK_V, first)


@triton.jit
def unit_tokens(x, norms, at, end, ROW: tl.constexpr, H, h, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr):
    """Return queries or keys [C, BLOCK_K] in float32, divided by their norms where there are some."""
    x_CK = tokens(x, at, end, ROW, h, K, BLOCK_K, 0, C).to(tl.float32)
    if norms is not None:
        x_CK *= numbers(norms, at, end, H, h, C)[:, None]
    return x_CK


@triton.jit
def put_unit_gradient(
    d_CK, x, norms, dx, at, end, ROW: tl.constexpr, H, h, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr
):
    """Store the gradient of x from that of its `unit_tokens`."""
    if norms is not None:
        x_CK = unit_tokens(x, norms, at, end, ROW, H, h, K, BLOCK_K, C)
        d_CK = (d_CK - x_CK * tl.sum(x_CK * d_CK, 1)[:, None]) * numbers(norms, at, end, H, h, C)[:, None]
    put_tokens(d_CK, dx, at, end, H * K, h, K, BLOCK_K, 0, C)


@triton.jit(do_not_specialize=["HV", "H", "length", "sequences", "scale"])
def gradients_kernel(
    q, k, v, g, beta, A_log, dt_bias, sums, q_norms, k_norms, new, dr, states, dstates, do, cu_seqlens, dq, dk, dv, dg,
    dbeta, dgates, HV, H, length, sequences, scale, K: tl.constexpr, V: tl.constexpr, ROW_Q: tl.constexpr,
    ROW_K: tl.constexpr, ROW_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradients of the tokens of a chunk, for a key head and the value heads that read it; of A_log and
    dt_bias what this chunk adds, [slots, 2, HV]. Columns of values are taken BLOCK_V at a time."""
    slot, h = tl.program_id(0), tl.program_id(1)
    dtype = v.dtype.element_ty
    at, end = chunk_at(slot, cu_seqlens, length, sequences, C)
    if at >= end:
        return
    i = tl.arange(0, C)
    inside = at + i < end
    gate_at = (at + i).to(tl.int64) * HV
    q_CK = unit_tokens(q, q_norms, at, end, ROW_Q, H, h, K, BLOCK_K, C).to(dtype)
    k_CK = unit_tokens(k, k_norms, at, end, ROW_K, H, h, K, BLOCK_K, C).to(dtype)
    # The gradients of queries and of keys one after the other: registers do not hold both. What is the same for all
    # heads is not kept in registers either.
    d_KC = tl.zeros((BLOCK_K, C), dtype=tl.float32)
    for hv in tl.range(h * (HV // H), (h + 1) * (HV // H), disable_licm=True):
        G, growth, to_end, carry = gates_from(sums, at, end, HV, hv, C)
        dscores = tl.zeros((C, C), dtype=tl.float32)
        q_dq = tl.zeros((C,), dtype=tl.float32)  # sums over K, made as sums over V
        for first in tl.range(0, V, BLOCK_V, disable_licm=True):
            S = state(states, slot, HV, hv, K, V, BLOCK_K, BLOCK_V, first)
            do_low = tokens(do, at, end, HV * V, hv, V, BLOCK_V, first, C)
            new_low = tokens(new, at, end, HV * V, hv, V, BLOCK_V, first, C)
            dscores += product(do_low, tl.trans(new_low), PRECISION)
            do_CV = do_low.to(tl.float32) * (growth * scale)[:, None]
            q_dq += tl.sum(do_CV * product(q_CK, S, PRECISION), 1)
            d_KC += product(S, tl.trans(do_CV.to(dtype)), PRECISION)
        dscores *= decay_between(G, False, C) * scale
        d_KC += product(tl.trans(k_CK), tl.trans(dscores.to(dtype)), PRECISION)
        dscores *= product(q_CK, tl.trans(k_CK), PRECISION)
        dgate = through_pairs(dscores, C) + tl.cumsum(q_dq, 0, reverse=True)
        tl.store(dg + gate_at + hv, dgate, mask=inside)
    put_unit_gradient(tl.trans(d_KC), q, q_norms, dq, at, end, ROW_Q, H, h, K, BLOCK_K, C)
    tl.debug_barrier()  # dg is read again

    d_KC = tl.zeros((BLOCK_K, C), dtype=tl.float32)
    for hv in tl.range(h * (HV // H), (h + 1) * (HV // H), disable_licm=True):
        b = numbers(beta, at, end, HV, hv, C)
        G, growth, to_end, carry = gates_from(sums, at, end, HV, hv, C)
        dscores = tl.zeros((C, C), dtype=tl.float32)
        dA = tl.zeros((C, C), dtype=tl.float32)
        k_dk = tl.zeros((C,), dtype=tl.float32)  # through the state after
        k_dkS = tl.zeros((C,), dtype=tl.float32)  # through k S
        db = tl.zeros((C,), dtype=tl.float32)
        kept = 0.0  # <S, dS_next>
        for first in tl.range(0, V, BLOCK_V, disable_licm=True):
            S = state(states, slot, HV, hv, K, V, BLOCK_K, BLOCK_V, first)
            dS = state(dstates, slot, HV, hv, K, V, BLOCK_K, BLOCK_V, first)
            kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            new_low = tokens(new, at, end, HV * V, hv, V, BLOCK_V, first, C)
            dr_low = tokens(dr, at, end, HV * V, hv, V, BLOCK_V, first, C)
            do_low = tokens(do, at, end, HV * V, hv, V, BLOCK_V, first, C)
            dscores += product(do_low, tl.trans(new_low), PRECISION)
            dA += product(dr_low, tl.trans(new_low), PRECISION)
            new_CV = new_low.to(tl.float32) * to_end[:, None]
            k_dk += tl.sum(new_CV * product(k_CK, dS, PRECISION), 1)
            d_KC += product(dS, tl.trans(new_CV.to(dtype)), PRECISION)
            dr_CV = dr_low.to(tl.float32)
            db += tl.sum(dr_CV * tokens(v, at, end, ROW_V, hv, V, BLOCK_V, first, C).to(tl.float32), 1)
            put_tokens(dr_CV * b[:, None], dv, at, end, HV * V, hv, V, BLOCK_V, first, C)
            dr_CV *= growth[:, None]
            k_dkS += tl.sum(dr_CV * product(k_CK, S, PRECISION), 1)
            d_KC += product(S, tl.trans((dr_CV * -b[:, None]).to(dtype)), PRECISION)
        decays = decay_between(G, False, C)
        dscores *= decays * scale
        d_KC += product(tl.trans(q_CK), dscores.to(dtype), PRECISION)
        # d(inverse) = -inverse dA inverse, so that the gradient of A is -dr v'^T.
        dA = tl.where(i[:, None] > i[None], -dA * decays, 0.0)
        d_KC += product(tl.trans(k_CK), tl.trans((dA * b[:, None]).to(dtype)), PRECISION)
        d_KC += product(tl.trans(k_CK), (dA * b[:, None]).to(dtype), PRECISION)
        dA *= product(k_CK, tl.trans(k_CK), PRECISION)
        db += tl.sum(dA, 1) - k_dkS
        dgate = through_pairs(dA * b[:, None], C) + through_ends(-k_dkS * b, k_dk, C)
        dgate += tl.load(dg + gate_at + hv, mask=inside, other=0.0) + kept * carry
        if A_log is not None:
            rate = tl.exp(tl.load(A_log + hv).to(tl.float32))
            x = numbers(g, at, end, HV, hv, C) + tl.load(dt_bias + hv).to(tl.float32)
            dgate = tl.where(inside, dgate, 0.0) * -rate
            tl.store(dgates + (slot.to(tl.int64) * 2) * HV + hv, tl.sum(dgate * softplus(x), 0))
            dgate *= tl.sigmoid(x)
            tl.store(dgates + (slot.to(tl.int64) * 2 + 1) * HV + hv, tl.sum(dgate, 0))
        tl.store(dg + gate_at + hv, dgate, mask=inside)
        tl.store(dbeta + gate_at + hv, db.to(dbeta.dtype.element_ty), mask=inside)
    put_unit_gradient(tl.trans(d_KC), k, k_norms, dk, at, end, ROW_K, H, h, K, BLOCK_K, C)


@triton.jit(do_not_specialize=["T", "HV", "H", "scale"])
def steps_kernel(
    q, k, v, g, beta, A_log, dt_bias, initial, o, final, T, HV, H, scale, K: tl.constexpr, V: tl.constexpr,
    ROW_Q: tl.constexpr, ROW_K: tl.constexpr, ROW_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    NORMALISED: tl.constexpr,
):  # fmt: skip
    """Run the recurrence token by token, for decoding: T tokens of each sequence; a state is read once and written
    once."""
    columns, hv, sequence = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.program_id(1), tl.program_id(2)
    h = hv // (HV // H)
    S = tl.zeros((BLOCK_K, BLOCK_V), dtype=tl.float32)
    if initial is not None:
        S += state(initial, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, tl.program_id(0) * BLOCK_V).to(tl.float32)
    i = tl.arange(0, BLOCK_K)
    for t in range(T):
        token = sequence.to(tl.int64) * T + t
        k_K = tl.load(k + token * ROW_K + h * K + i, mask=i < K, other=0.0).to(tl.float32)
        q_K = tl.load(q + token * ROW_Q + h * K + i, mask=i < K, other=0.0).to(tl.float32)
        if NORMALISED:
            k_K *= norm_factor(k_K[None])
            q_K *= norm_factor(q_K[None])
        gate = tl.load(g + token * HV + hv).to(tl.float32)
        if A_log is not None:
            x = gate + tl.load(dt_bias + hv).to(tl.float32)
            gate = -tl.exp(tl.load(A_log + hv).to(tl.float32)) * softplus(x)
        S *= tl.exp(gate)
        v_V = tl.load(v + token * ROW_V + hv * V + columns, mask=columns < V, other=0.0).to(tl.float32)
        strength = tl.load(beta + token * HV + hv).to(tl.float32)
        S += k_K[:, None] * (strength * (v_V - tl.sum(S * k_K[:, None], 0)))[None]
        o_V = tl.sum(S * q_K[:, None], 0) * scale
        tl.store(o + (token * HV + hv) * V + columns, o_V.to(o.dtype.element_ty), mask=columns < V)
    put_state(S, final, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, tl.program_id(0) * BLOCK_V)
