"""The gated delta rule in chunks of C tokens, forward and backward, in Triton.

Sequences lie packed one after the other; a chunk belongs to one of them. With G the sum of g within a chunk, S the state
before it, R = e^{G_last - G}, D_ij = e^{G_i - G_j} for i >= j and T = (I + A)^-1 as in torch.py,

    u = T (beta v)    w = T (beta e^G k)    v' = u - w S
    o = scale (e^G q S + (q k^T * D) v')    S_next = e^{G_last} S + (R k)^T v'

Only the two `states` kernels go through the chunks of a sequence one by one; in all others every chunk is a program of its
own. Products are of TF32 numbers, of float32 inputs in three parts that together keep float32's precision; sums of g are
float64, since float32 loses the small differences of strong gates. Nothing is added atomically, so two runs are equal bit
for bit.
"""

import triton
import triton.language as tl

from kernels.tiles import decay_between, gate_sums, last_of, product, put, state_at, through_ends, through_pairs, tile

PART = 16  # rows of the blocks on the diagonal that are inverted row by row


@triton.jit(do_not_specialize=["HV", "H"])
def scores_kernel(
    k, g, beta, A, begins, ends, HV, H, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """A = beta_i D_ij k_i.k_j below the diagonal, [chunks, HV, C, C]."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0)
    b_C = tl.load(beta + rows.to(tl.int64) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    decay = decay_between(gate_sums(g, rows, inside, HV, hv), True, C)
    a = product(k_CK, tl.trans(k_CK), PRECISION) * decay * b_C[:, None]
    i = tl.arange(0, C)
    tl.store(A + (chunk.to(tl.int64) * HV + hv) * C * C + i[:, None] * C + i[None], a)


@triton.jit
def part_at(A, r: tl.constexpr, c: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, P)
    return A + (r * P + i[:, None]) * C + c * P + i[None]


@triton.jit
def inverse_of_part(a, P: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular [P, P], row by row: stable whatever the size of its entries."""
    i = tl.arange(0, P)
    inverse = tl.where(i[:, None] == i[None], 1.0, 0.0)
    for row in range(1, P):
        a_row = tl.sum(tl.where((i == row)[:, None], a, 0.0), 0)
        new = (i == row).to(tl.float32) - tl.sum(a_row[:, None] * inverse, 0)
        inverse = tl.where((i == row)[:, None], new[None], inverse)
    return inverse


@triton.jit(do_not_specialize=["HV"])
def invert_kernel(A, HV, P: tl.constexpr, C: tl.constexpr):
    """A -> (I + A)^-1 in place: the blocks on the diagonal by substitution, those below from the ones done before."""
    base = A + (tl.program_id(0).to(tl.int64) * HV + tl.program_id(1)) * C * C
    for r in tl.static_range(C // P):
        own = inverse_of_part(tl.load(part_at(base, r, r, P, C)), P)
        for c in tl.static_range(r):
            # (I + A)^-1 [r, c] = -own sum_m A[r, m] (I + A)^-1 [m, c]: of row r no block from c on is overwritten yet.
            total = tl.zeros((P, P), dtype=tl.float32)
            for m in tl.static_range(c, r):
                total += product(tl.load(part_at(base, r, m, P, C)), tl.load(part_at(base, m, c, P, C)), "ieee")
            tl.debug_barrier()
            tl.store(part_at(base, r, c, P, C), -product(own, total, "ieee"))
        tl.debug_barrier()
        tl.store(part_at(base, r, r, P, C), own)
        tl.debug_barrier()


@triton.jit
def inverse_of(A, chunk, hv, HV, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(A + (chunk.to(tl.int64) * HV + hv) * C * C + i[:, None] * C + i[None])


@triton.jit(do_not_specialize=["HV", "H"])
def writes_kernel(
    k, v, g, beta, A, u, w, begins, ends, HV, H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """u = T (beta v) and w = T (beta e^G k)."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    G = gate_sums(g, rows, inside, HV, hv)
    b_C = tl.load(beta + rows.to(tl.int64) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    T = inverse_of(A, chunk, hv, HV, C)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0) * (b_C * tl.exp(G.to(tl.float32)))[:, None]
    put(w, product(T, k_CK, PRECISION), rows, inside, HV, hv, K, BK, 0)
    for first in range(0, V, BV):
        v_CV = tile(v, rows, inside, HV, hv, V, BV, first) * b_C[:, None]
        put(u, product(T, v_CV, PRECISION), rows, inside, HV, hv, V, BV, first)


@triton.jit(do_not_specialize=["HV", "H"])
def states_kernel(
    k, g, u, w, states, initial, final, begins, ends, firsts, HV, H, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk through a sequence: keeps the state before each, and turns u into v' in place."""
    first, hv, sequence = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    at, exist = state_at(initial, sequence, HV, hv, K, V, BK, BV, 0, first)
    S = tl.load(at, mask=exist, other=0.0).to(tl.float32)
    for chunk in range(tl.load(firsts + sequence), tl.load(firsts + sequence + 1)):
        at, exist = state_at(states, chunk, HV, hv, K, V, BK, BV, 0, first)
        tl.store(at, S, mask=exist)
        rows = tl.load(begins + chunk) + tl.arange(0, C)
        inside = rows < tl.load(ends + chunk)
        G = gate_sums(g, rows, inside, HV, hv)
        G_last = last_of(G, C)
        w_CK = tile(w, rows, inside, HV, hv, K, BK, 0)
        new = tile(u, rows, inside, HV, hv, V, BV, first) - product(w_CK, S, PRECISION)
        put(u, new, rows, inside, HV, hv, V, BV, first)
        k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0) * tl.exp((G_last - G).to(tl.float32))[:, None]
        S = S * tl.exp(G_last.to(tl.float32)) + product(tl.trans(k_CK), new, PRECISION)
    at, exist = state_at(final, sequence, HV, hv, K, V, BK, BV, 0, first)
    tl.store(at, S, mask=exist)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def outputs_kernel(
    q, k, g, new, states, o, begins, ends, scale, HV, H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o = scale (e^G q S + (q k^T * D) v')."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    G = gate_sums(g, rows, inside, HV, hv)
    q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BK, 0) * scale
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0)
    P = product(q_CK, tl.trans(k_CK), PRECISION) * decay_between(G, False, C)
    q_CK *= tl.exp(G.to(tl.float32))[:, None]
    for first in range(0, V, BV):
        at, exist = state_at(states, chunk, HV, hv, K, V, BK, BV, 0, first)
        S = tl.load(at, mask=exist, other=0.0)
        o_CV = product(q_CK, S, PRECISION) + product(P, tile(new, rows, inside, HV, hv, V, BV, first), PRECISION)
        put(o, o_CV, rows, inside, HV, hv, V, BV, first)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def inside_gradients_kernel(
    q, k, g, do, dnew, begins, ends, scale, HV, H, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the outputs of a chunk give to its own v': scale (q k^T * D)^T do."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BK, 0) * scale
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0)
    P = product(q_CK, tl.trans(k_CK), PRECISION) * decay_between(gate_sums(g, rows, inside, HV, hv), False, C)
    for first in range(0, V, BV):
        do_CV = tile(do, rows, inside, HV, hv, V, BV, first)
        put(dnew, product(tl.trans(P), do_CV, PRECISION), rows, inside, HV, hv, V, BV, first)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def state_gradients_kernel(
    q, k, g, w, do, dnew, dstates, dinitial, dfinal, begins, ends, firsts, scale, HV, H, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backwards through the chunks: keeps the gradient of the state after each, and completes that of v' in place."""
    first, hv, sequence = tl.program_id(0) * BV, tl.program_id(1), tl.program_id(2)
    at, exist = state_at(dfinal, sequence, HV, hv, K, V, BK, BV, 0, first)
    dS = tl.load(at, mask=exist, other=0.0).to(tl.float32)
    begin = tl.load(firsts + sequence)
    end = tl.load(firsts + sequence + 1)
    for back in range(begin, end):
        chunk = begin + end - 1 - back
        at, exist = state_at(dstates, chunk, HV, hv, K, V, BK, BV, 0, first)
        tl.store(at, dS, mask=exist)
        rows = tl.load(begins + chunk) + tl.arange(0, C)
        inside = rows < tl.load(ends + chunk)
        G = gate_sums(g, rows, inside, HV, hv)
        G_last = last_of(G, C)
        k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0) * tl.exp((G_last - G).to(tl.float32))[:, None]
        dnew_CV = tile(dnew, rows, inside, HV, hv, V, BV, first) + product(k_CK, dS, PRECISION)
        put(dnew, dnew_CV, rows, inside, HV, hv, V, BV, first)
        q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BK, 0) * (tl.exp(G.to(tl.float32)) * scale)[:, None]
        do_CV = tile(do, rows, inside, HV, hv, V, BV, first)
        w_CK = tile(w, rows, inside, HV, hv, K, BK, 0)
        dS = dS * tl.exp(G_last.to(tl.float32)) + product(tl.trans(q_CK), do_CV, PRECISION)
        dS -= product(tl.trans(w_CK), dnew_CV, PRECISION)
    at, exist = state_at(dinitial, sequence, HV, hv, K, V, BK, BV, 0, first)
    tl.store(at, dS, mask=exist)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def output_gradients_kernel(
    q, k, g, new, states, dstates, do, dnew, dq, dk, dw, dg, begins, ends, scale, HV, H, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the outputs and the hand-over of the state: dq, dk and dw of a value head, and their part of dg
    [tokens, HV]."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    G = gate_sums(g, rows, inside, HV, hv)
    G_last = last_of(G, C)
    dP = tl.zeros((C, C), dtype=tl.float32)
    dq_CK = tl.zeros((C, BK), dtype=tl.float32)
    dk_CK = tl.zeros((C, BK), dtype=tl.float32)
    dw_CK = tl.zeros((C, BK), dtype=tl.float32)
    kept = 0.0  # <S, dS_next>
    for first in range(0, V, BV):
        at, exist = state_at(states, chunk, HV, hv, K, V, BK, BV, 0, first)
        S = tl.load(at, mask=exist, other=0.0)
        at, exist = state_at(dstates, chunk, HV, hv, K, V, BK, BV, 0, first)
        dS = tl.load(at, mask=exist, other=0.0)
        do_CV = tile(do, rows, inside, HV, hv, V, BV, first)
        new_CV = tile(new, rows, inside, HV, hv, V, BV, first)
        dP += product(do_CV, tl.trans(new_CV), PRECISION)
        dq_CK += product(do_CV, tl.trans(S), PRECISION)
        dk_CK += product(new_CV, tl.trans(dS), PRECISION)
        dw_CK -= product(tile(dnew, rows, inside, HV, hv, V, BV, first), tl.trans(S), PRECISION)
        kept += tl.sum(S * dS)
    put(dw, dw_CK, rows, inside, HV, hv, K, BK, 0)
    q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BK, 0)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0)
    dP *= decay_between(G, False, C) * scale
    dq_CK *= (tl.exp(G.to(tl.float32)) * scale)[:, None]
    dk_CK *= tl.exp((G_last - G).to(tl.float32))[:, None]
    dg_C = through_pairs(dP * product(q_CK, tl.trans(k_CK), PRECISION), C)
    dg_C += through_ends(tl.sum(q_CK * dq_CK, 1), tl.sum(k_CK * dk_CK, 1), C) + kept * tl.exp(G_last.to(tl.float32))
    tl.store(dg + rows.to(tl.int64) * HV + hv, dg_C, mask=inside)
    put(dq, dq_CK + product(dP, k_CK, PRECISION), rows, inside, HV, hv, K, BK, 0)
    put(dk, dk_CK + product(tl.trans(dP), q_CK, PRECISION), rows, inside, HV, hv, K, BK, 0)


@triton.jit(do_not_specialize=["HV", "H"])
def write_gradients_kernel(
    k, v, g, beta, A, w, dw, dnew, dk, dv, dg, dbeta, begins, ends, HV, H, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Through u and w, and through T: dv, dbeta, the rest of dk and of dg."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    gate = rows.to(tl.int64) * HV + hv
    G = gate_sums(g, rows, inside, HV, hv)
    b_C = tl.load(beta + gate, mask=inside, other=0.0).to(tl.float32)
    T = inverse_of(A, chunk, hv, HV, C)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BK, 0)
    growth = tl.exp(G.to(tl.float32))
    dX_CK = product(tl.trans(T), tile(dw, rows, inside, HV, hv, K, BK, 0), PRECISION)
    dA = product(dX_CK, tl.trans(tile(w, rows, inside, HV, hv, K, BK, 0)), PRECISION)
    through_w = tl.sum(k_CK * dX_CK, 1) * growth
    dk_CK = tile(dk, rows, inside, HV, hv, K, BK, 0) + dX_CK * (b_C * growth)[:, None]
    db_C = through_w
    dg_C = tl.load(dg + gate, mask=inside, other=0.0) + through_ends(b_C * through_w, tl.zeros_like(through_w), C)
    for first in range(0, V, BV):
        v_CV = tile(v, rows, inside, HV, hv, V, BV, first)
        dX_CV = product(tl.trans(T), tile(dnew, rows, inside, HV, hv, V, BV, first), PRECISION)
        u_CV = product(T, v_CV * b_C[:, None], PRECISION)
        dA += product(dX_CV, tl.trans(u_CV), PRECISION)
        db_C += tl.sum(v_CV * dX_CV, 1)
        put(dv, dX_CV * b_C[:, None], rows, inside, HV, hv, V, BV, first)
    # d(T) = -T dA T, so that the gradient of A is -(T^T du (beta v)^T T^T ...) = -(dX u^T + dX w^T).
    kk = product(k_CK, tl.trans(k_CK), PRECISION)
    Z = -dA * decay_between(G, True, C)
    db_C += tl.sum(Z * kk, 1)
    Z *= b_C[:, None]
    dg_C += through_pairs(Z * kk, C)
    dk_CK += product(Z, k_CK, PRECISION) + product(tl.trans(Z), k_CK, PRECISION)
    put(dk, dk_CK, rows, inside, HV, hv, K, BK, 0)
    tl.store(dbeta + gate, db_C.to(dbeta.dtype.element_ty), mask=inside)
    tl.store(dg + gate, dg_C, mask=inside)


@triton.jit(do_not_specialize=["T", "HV", "H", "scale"])
def steps_kernel(
    q, k, v, g, beta, initial, o, final, T, HV, H, scale, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """The recurrence token by token, for decoding: T tokens of each sequence; the state is read once and written once."""
    columns, hv, sequence = tl.program_id(0) * BV + tl.arange(0, BV), tl.program_id(1), tl.program_id(2)
    at, exist = state_at(initial, sequence, HV, hv, K, V, BK, BV, 0, tl.program_id(0) * BV)
    S = tl.load(at, mask=exist, other=0.0)
    i = tl.arange(0, BK)
    for t in range(T):
        token = sequence.to(tl.int64) * T + t
        key = (token * H + hv // (HV // H)) * K + i
        k_K = tl.load(k + key, mask=i < K, other=0.0).to(tl.float32)
        q_K = tl.load(q + key, mask=i < K, other=0.0).to(tl.float32) * scale
        value = (token * HV + hv) * V + columns
        S *= tl.exp(tl.load(g + token * HV + hv).to(tl.float32))
        stored = tl.sum(S * k_K[:, None], 0)
        v_V = tl.load(v + value, mask=columns < V, other=0.0).to(tl.float32)
        S += k_K[:, None] * (tl.load(beta + token * HV + hv).to(tl.float32) * (v_V - stored))[None]
        tl.store(o + value, tl.sum(S * q_K[:, None], 0).to(o.dtype.element_ty), mask=columns < V)
    at, exist = state_at(final, sequence, HV, hv, K, V, BK, BV, 0, tl.program_id(0) * BV)
    tl.store(at, S, mask=exist)
