"""The gated delta rule in chunks of C tokens, forward and backward, in Triton.

Sequences lie packed one after the other; a chunk belongs to one of them. With G the sum of g within a chunk, S the
state before it, decays_ij = e^{G_i - G_j} for i >= j and inverse = (I + A)^-1 as in chunked.py,

    u = inverse (beta v)    w = inverse (beta e^G k)    v' = u - w S
    o = scale (e^G q S + (q k^T * decays) v')    S_next = e^{G_last} S + (e^{G_last - G} k)^T v'

Only the two `states` kernels go through the chunks of a sequence one by one; in all others every chunk is a program
of its own. Products are of TF32 numbers, of float32 inputs in three parts that together keep float32's precision;
sums of g are float64, since float32 loses the small differences of strong gates. Nothing is added atomically, so two
runs are equal bit for bit.

Shape letters: C tokens of a chunk (T of a sequence in decoding), H key heads of K dimensions, HV value heads of V
dimensions. BLOCK_K and BLOCK_V are the dimensions that a program holds.
"""

import triton
import triton.language as tl

from kernels.common.tiles import (
    decay_between,
    gate_sums,
    last_of,
    product,
    put,
    state_at,
    through_ends,
    through_pairs,
    tile,
)

PART = 16  # rows of the blocks on the diagonal that are inverted row by row


@triton.jit(do_not_specialize=["HV", "H"])
def scores_kernel(
    k, g, beta, A, begins, ends, HV, H, K: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):
    """Store A = beta_i decays_ij k_i.k_j below the diagonal, [chunks, HV, C, C]."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0)
    b_C = tl.load(beta + rows.to(tl.int64) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    decay = decay_between(gate_sums(g, rows, inside, HV, hv), True, C)
    a = product(k_CK, tl.trans(k_CK), PRECISION) * decay * b_C[:, None]
    i = tl.arange(0, C)
    tl.store(A + (chunk.to(tl.int64) * HV + hv) * C * C + i[:, None] * C + i[None], a)


@triton.jit
def part_at(A, r: tl.constexpr, c: tl.constexpr, PART: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, PART)
    return A + (r * PART + i[:, None]) * C + c * PART + i[None]


@triton.jit
def inverse_of_part(a, PART: tl.constexpr):
    """Return (I + a)^-1 of a strictly lower triangular [PART, PART], row by row: stable whatever the size of its
    entries."""
    i = tl.arange(0, PART)
    inverse = tl.where(i[:, None] == i[None], 1.0, 0.0)
    for row in range(1, PART):
        a_row = tl.sum(tl.where((i == row)[:, None], a, 0.0), 0)
        new = (i == row).to(tl.float32) - tl.sum(a_row[:, None] * inverse, 0)
        inverse = tl.where((i == row)[:, None], new[None], inverse)
    return inverse


@triton.jit(do_not_specialize=["HV"])
def invert_kernel(A, HV, PART: tl.constexpr, C: tl.constexpr):
    """Turn A into (I + A)^-1 in place: the blocks on the diagonal by substitution, those below from the ones done
    before."""
    base = A + (tl.program_id(0).to(tl.int64) * HV + tl.program_id(1)) * C * C
    for r in tl.static_range(C // PART):
        own = inverse_of_part(tl.load(part_at(base, r, r, PART, C)), PART)
        for c in tl.static_range(r):
            # (I + A)^-1 [r, c] = -own sum_m A[r, m] (I + A)^-1 [m, c]: of row r no block from c on is overwritten yet.
            total = tl.zeros((PART, PART), dtype=tl.float32)
            for m in tl.static_range(c, r):
                total += product(tl.load(part_at(base, r, m, PART, C)), tl.load(part_at(base, m, c, PART, C)), "ieee")
            tl.debug_barrier()
            tl.store(part_at(base, r, c, PART, C), -product(own, total, "ieee"))
        tl.debug_barrier()
        tl.store(part_at(base, r, r, PART, C), own)
        tl.debug_barrier()


@triton.jit
def inverse_of(A, chunk, hv, HV, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(A + (chunk.to(tl.int64) * HV + hv) * C * C + i[:, None] * C + i[None])


@triton.jit(do_not_specialize=["HV", "H"])
def writes_kernel(
    k, v, g, beta, A, u, w, begins, ends, HV, H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store u = inverse (beta v) and w = inverse (beta e^G k)."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    G = gate_sums(g, rows, inside, HV, hv)
    b_C = tl.load(beta + rows.to(tl.int64) * HV + hv, mask=inside, other=0.0).to(tl.float32)
    inverse = inverse_of(A, chunk, hv, HV, C)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0) * (b_C * tl.exp(G.to(tl.float32)))[:, None]
    put(w, product(inverse, k_CK, PRECISION), rows, inside, HV, hv, K, BLOCK_K, 0)
    for first in range(0, V, BLOCK_V):
        v_CV = tile(v, rows, inside, HV, hv, V, BLOCK_V, first) * b_C[:, None]
        put(u, product(inverse, v_CV, PRECISION), rows, inside, HV, hv, V, BLOCK_V, first)


@triton.jit(do_not_specialize=["HV", "H"])
def states_kernel(
    k, g, u, w, states, initial, final, begins, ends, firsts, HV, H, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through the chunks of a sequence: store the state before each, and turn u into v' in place."""
    first, hv, sequence = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    at, exist = state_at(initial, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
    S = tl.load(at, mask=exist, other=0.0).to(tl.float32)
    for chunk in range(tl.load(firsts + sequence), tl.load(firsts + sequence + 1)):
        at, exist = state_at(states, chunk, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
        tl.store(at, S, mask=exist)
        rows = tl.load(begins + chunk) + tl.arange(0, C)
        inside = rows < tl.load(ends + chunk)
        G = gate_sums(g, rows, inside, HV, hv)
        G_last = last_of(G, C)
        w_CK = tile(w, rows, inside, HV, hv, K, BLOCK_K, 0)
        new = tile(u, rows, inside, HV, hv, V, BLOCK_V, first) - product(w_CK, S, PRECISION)
        put(u, new, rows, inside, HV, hv, V, BLOCK_V, first)
        k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0) * tl.exp((G_last - G).to(tl.float32))[:, None]
        S = S * tl.exp(G_last.to(tl.float32)) + product(tl.trans(k_CK), new, PRECISION)
    at, exist = state_at(final, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
    tl.store(at, S, mask=exist)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def outputs_kernel(
    q, k, g, new, states, o, begins, ends, scale, HV, H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store o = scale (e^G q S + (q k^T * decays) v')."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    G = gate_sums(g, rows, inside, HV, hv)
    q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0) * scale
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0)
    scores = product(q_CK, tl.trans(k_CK), PRECISION) * decay_between(G, False, C)
    q_CK *= tl.exp(G.to(tl.float32))[:, None]
    for first in range(0, V, BLOCK_V):
        at, exist = state_at(states, chunk, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
        S = tl.load(at, mask=exist, other=0.0)
        o_CV = product(q_CK, S, PRECISION)
        o_CV += product(scores, tile(new, rows, inside, HV, hv, V, BLOCK_V, first), PRECISION)
        put(o, o_CV, rows, inside, HV, hv, V, BLOCK_V, first)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def inside_gradients_kernel(
    q, k, g, do, dnew, begins, ends, scale, HV, H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the gradient that the outputs of a chunk give to its own v': scale (q k^T * decays)^T do."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0) * scale
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0)
    scores = product(q_CK, tl.trans(k_CK), PRECISION) * decay_between(gate_sums(g, rows, inside, HV, hv), False, C)
    for first in range(0, V, BLOCK_V):
        do_CV = tile(do, rows, inside, HV, hv, V, BLOCK_V, first)
        put(dnew, product(tl.trans(scores), do_CV, PRECISION), rows, inside, HV, hv, V, BLOCK_V, first)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def state_gradients_kernel(
    q, k, g, w, do, dnew, dstates, dinitial, dfinal, begins, ends, firsts, scale, HV, H, K: tl.constexpr,
    V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go backwards through the chunks: store the gradient of the state after each, and complete that of v' in place."""
    first, hv, sequence = tl.program_id(0) * BLOCK_V, tl.program_id(1), tl.program_id(2)
    at, exist = state_at(dfinal, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
    dS = tl.load(at, mask=exist, other=0.0).to(tl.float32)
    begin = tl.load(firsts + sequence)
    end = tl.load(firsts + sequence + 1)
    for back in range(begin, end):
        chunk = begin + end - 1 - back
        at, exist = state_at(dstates, chunk, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
        tl.store(at, dS, mask=exist)
        rows = tl.load(begins + chunk) + tl.arange(0, C)
        inside = rows < tl.load(ends + chunk)
        G = gate_sums(g, rows, inside, HV, hv)
        G_last = last_of(G, C)
        k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0) * tl.exp((G_last - G).to(tl.float32))[:, None]
        dnew_CV = tile(dnew, rows, inside, HV, hv, V, BLOCK_V, first) + product(k_CK, dS, PRECISION)
        put(dnew, dnew_CV, rows, inside, HV, hv, V, BLOCK_V, first)
        q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0) * (tl.exp(G.to(tl.float32)) * scale)[:, None]
        do_CV = tile(do, rows, inside, HV, hv, V, BLOCK_V, first)
        w_CK = tile(w, rows, inside, HV, hv, K, BLOCK_K, 0)
        dS = dS * tl.exp(G_last.to(tl.float32)) + product(tl.trans(q_CK), do_CV, PRECISION)
        dS -= product(tl.trans(w_CK), dnew_CV, PRECISION)
    at, exist = state_at(dinitial, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
    tl.store(at, dS, mask=exist)


@triton.jit(do_not_specialize=["HV", "H", "scale"])
def output_gradients_kernel(
    q, k, g, new, states, dstates, do, dnew, dq, dk, dw, dg, begins, ends, scale, HV, H, K: tl.constexpr,
    V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store what comes from the outputs and the hand-over of the state: dq, dk and dw of each value head, and their
    part of dg [tokens, HV]."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    G = gate_sums(g, rows, inside, HV, hv)
    G_last = last_of(G, C)
    dscores = tl.zeros((C, C), dtype=tl.float32)
    dq_CK = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    dk_CK = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    dw_CK = tl.zeros((C, BLOCK_K), dtype=tl.float32)
    kept = 0.0  # <S, dS_next>
    for first in range(0, V, BLOCK_V):
        at, exist = state_at(states, chunk, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
        S = tl.load(at, mask=exist, other=0.0)
        at, exist = state_at(dstates, chunk, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
        dS = tl.load(at, mask=exist, other=0.0)
        do_CV = tile(do, rows, inside, HV, hv, V, BLOCK_V, first)
        new_CV = tile(new, rows, inside, HV, hv, V, BLOCK_V, first)
        dscores += product(do_CV, tl.trans(new_CV), PRECISION)
        dq_CK += product(do_CV, tl.trans(S), PRECISION)
        dk_CK += product(new_CV, tl.trans(dS), PRECISION)
        dw_CK -= product(tile(dnew, rows, inside, HV, hv, V, BLOCK_V, first), tl.trans(S), PRECISION)
        kept += tl.sum(S * dS)
    put(dw, dw_CK, rows, inside, HV, hv, K, BLOCK_K, 0)
    q_CK = tile(q, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0)
    dscores *= decay_between(G, False, C) * scale
    dq_CK *= (tl.exp(G.to(tl.float32)) * scale)[:, None]
    dk_CK *= tl.exp((G_last - G).to(tl.float32))[:, None]
    dg_C = through_pairs(dscores * product(q_CK, tl.trans(k_CK), PRECISION), C)
    dg_C += through_ends(tl.sum(q_CK * dq_CK, 1), tl.sum(k_CK * dk_CK, 1), C) + kept * tl.exp(G_last.to(tl.float32))
    tl.store(dg + rows.to(tl.int64) * HV + hv, dg_C, mask=inside)
    put(dq, dq_CK + product(dscores, k_CK, PRECISION), rows, inside, HV, hv, K, BLOCK_K, 0)
    put(dk, dk_CK + product(tl.trans(dscores), q_CK, PRECISION), rows, inside, HV, hv, K, BLOCK_K, 0)


@triton.jit(do_not_specialize=["HV", "H"])
def write_gradients_kernel(
    k, v, g, beta, A, w, dw, dnew, dk, dv, dg, dbeta, begins, ends, HV, H, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store what comes through u, w and the inverse: dv, dbeta, the rest of dk and of dg."""
    chunk, hv = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, C)
    inside = rows < tl.load(ends + chunk)
    gate = rows.to(tl.int64) * HV + hv
    G = gate_sums(g, rows, inside, HV, hv)
    b_C = tl.load(beta + gate, mask=inside, other=0.0).to(tl.float32)
    inverse = inverse_of(A, chunk, hv, HV, C)
    k_CK = tile(k, rows, inside, H, hv // (HV // H), K, BLOCK_K, 0)
    growth = tl.exp(G.to(tl.float32))
    dX_CK = product(tl.trans(inverse), tile(dw, rows, inside, HV, hv, K, BLOCK_K, 0), PRECISION)
    dA = product(dX_CK, tl.trans(tile(w, rows, inside, HV, hv, K, BLOCK_K, 0)), PRECISION)
    through_w = tl.sum(k_CK * dX_CK, 1) * growth
    dk_CK = tile(dk, rows, inside, HV, hv, K, BLOCK_K, 0) + dX_CK * (b_C * growth)[:, None]
    db_C = through_w
    dg_C = tl.load(dg + gate, mask=inside, other=0.0) + through_ends(b_C * through_w, tl.zeros_like(through_w), C)
    for first in range(0, V, BLOCK_V):
        v_CV = tile(v, rows, inside, HV, hv, V, BLOCK_V, first)
        dX_CV = product(tl.trans(inverse), tile(dnew, rows, inside, HV, hv, V, BLOCK_V, first), PRECISION)
        u_CV = product(inverse, v_CV * b_C[:, None], PRECISION)
        dA += product(dX_CV, tl.trans(u_CV), PRECISION)
        db_C += tl.sum(v_CV * dX_CV, 1)
        put(dv, dX_CV * b_C[:, None], rows, inside, HV, hv, V, BLOCK_V, first)
    # d(inverse) = -inverse dA inverse: the gradient of A is -(inverse^T du (beta v)^T inverse^T + ...) = -(dX u^T +
    # dX w^T).
    kk = product(k_CK, tl.trans(k_CK), PRECISION)
    Z = -dA * decay_between(G, True, C)
    db_C += tl.sum(Z * kk, 1)
    Z *= b_C[:, None]
    dg_C += through_pairs(Z * kk, C)
    dk_CK += product(Z, k_CK, PRECISION) + product(tl.trans(Z), k_CK, PRECISION)
    put(dk, dk_CK, rows, inside, HV, hv, K, BLOCK_K, 0)
    tl.store(dbeta + gate, db_C.to(dbeta.dtype.element_ty), mask=inside)
    tl.store(dg + gate, dg_C, mask=inside)


@triton.jit(do_not_specialize=["T", "HV", "H", "scale"])
def steps_kernel(
    q, k, v, g, beta, initial, o, final, T, HV, H, scale, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Run the recurrence token by token, for decoding: T tokens of each sequence; a state is read once and written
    once."""
    columns, hv, sequence = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V), tl.program_id(1), tl.program_id(2)
    at, exist = state_at(initial, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, tl.program_id(0) * BLOCK_V)
    S = tl.load(at, mask=exist, other=0.0)
    i = tl.arange(0, BLOCK_K)
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
    at, exist = state_at(final, sequence, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, tl.program_id(0) * BLOCK_V)
    tl.store(at, S, mask=exist)
