"""The state space dual form in chunks of L tokens, forward and backward, in Triton.

Sequences lie packed one after the other; a chunk belongs to one of them. With sums those of g within a chunk, last
the last of them, u = dt x, S the state [P, N] before the chunk and decays_ij = e^{sums_i - sums_j} for i >= j,

    M = C B^T * decays    y = e^sums C S^T + M u    S_next = e^last S + u^T (e^{last - sums} B)

Every chunk is a program of its own, but for `pass_kernel`, which hands states from chunk to chunk, element by
element. Products are of TF32 numbers, of float32 inputs in three parts that together keep float32's precision; sums
of g are float64. Nothing is added atomically, so two runs are equal bit for bit.

Shape letters, beside the matrices B and C: L tokens of a chunk (T of a sequence in decoding), H heads of P channels,
G groups of heads, N numbers of a state per channel. BLOCK_P and BLOCK_N are what a product takes of a state.
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


@triton.jit
def steps_of(dt, rows, inside, H, h):
    return tl.load(dt + rows.to(tl.int64) * H + h, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["H", "G"])
def outer_kernel(
    a, b, dt, g, states, begins, ends, H, G, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, L: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a^T b, weighted by token, of each chunk [chunks, H, P, N]: what the chunk writes, (dt e^{last - sums}
    x)^T B; or with READ the gradient that its outputs give to the state before it, (e^sums dy)^T C."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, L)
    inside = rows < tl.load(ends + chunk)
    sums = gate_sums(g, rows, inside, H, h)
    if READ:
        weight = tl.exp(sums.to(tl.float32))
    else:
        weight = tl.exp((last_of(sums, L) - sums).to(tl.float32)) * steps_of(dt, rows, inside, H, h)
    for p in range(0, P, BLOCK_P):
        a_LP = tile(a, rows, inside, H, h, P, BLOCK_P, p) * weight[:, None]
        for n in range(0, N, BLOCK_N):
            b_LN = tile(b, rows, inside, G, h // (H // G), N, BLOCK_N, n)
            at, exist = state_at(states, chunk, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
            tl.store(at, product(tl.trans(a_LP), b_LN, PRECISION), mask=exist)


@triton.jit(do_not_specialize=["H"])
def pass_kernel(
    g, states, first, final, begins, ends, firsts, H, SIZE: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Turn what each chunk writes into the state before it, in place; `first` is the state before the sequence and
    `final` that after it. With REVERSE from the last chunk to the first: into the gradient of the state after
    each."""
    at, h, sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.program_id(2)
    exist = at < SIZE
    own = (sequence.to(tl.int64) * H + h) * SIZE + at
    state = tl.load(first + own, mask=exist, other=0.0).to(tl.float32)
    begin = tl.load(firsts + sequence)
    end = tl.load(firsts + sequence + 1)
    for i in range(begin, end):
        chunk = (begin + end - 1 - i) if REVERSE else i
        rows = tl.load(begins + chunk) + tl.arange(0, L)
        kept = tl.exp(last_of(gate_sums(g, rows, rows < tl.load(ends + chunk), H, h), L).to(tl.float32))
        here = states + (tl.full((), 0, tl.int64) + chunk) * H * SIZE + h * SIZE + at
        written = tl.load(here, mask=exist, other=0.0)
        tl.store(here, state, mask=exist)
        state = state * kept + written
    tl.store(final + own, state, mask=exist)


@triton.jit
def scores(
    B, C, rows, inside, G, group, N: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr
):
    """Return C B^T [L, L]."""
    total = tl.zeros((L, L), dtype=tl.float32)
    for n in range(0, N, BLOCK_N):
        b_LN = tile(B, rows, inside, G, group, N, BLOCK_N, n)
        total += product(tile(C, rows, inside, G, group, N, BLOCK_N, n), tl.trans(b_LN), PRECISION)
    return total


@triton.jit(do_not_specialize=["H", "G"])
def outputs_kernel(
    x, dt, g, B, C, states, y, begins, ends, H, G, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store y = e^sums C S^T + M u."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, L)
    inside = rows < tl.load(ends + chunk)
    sums = gate_sums(g, rows, inside, H, h)
    group = h // (H // G)
    M = scores(B, C, rows, inside, G, group, N, BLOCK_N, L, PRECISION) * decay_between(sums, False, L)
    growth = tl.exp(sums.to(tl.float32))
    step = steps_of(dt, rows, inside, H, h)
    for p in range(0, P, BLOCK_P):
        y_LP = tl.zeros((L, BLOCK_P), dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            at, exist = state_at(states, chunk, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
            S = tl.load(at, mask=exist, other=0.0)
            y_LP += product(tile(C, rows, inside, G, group, N, BLOCK_N, n), tl.trans(S), PRECISION)
        u_LP = tile(x, rows, inside, H, h, P, BLOCK_P, p) * step[:, None]
        put(y, y_LP * growth[:, None] + product(M, u_LP, PRECISION), rows, inside, H, h, P, BLOCK_P, p)


@triton.jit(do_not_specialize=["H", "G"])
def values_gradient_kernel(
    x, dt, g, B, C, dstates, dy, dx, ddt, begins, ends, H, G, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store what comes through du = e^{last - sums} B dS_next^T + M^T dy: dx and the direct part of ddt [tokens, H]."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, L)
    inside = rows < tl.load(ends + chunk)
    sums = gate_sums(g, rows, inside, H, h)
    group = h // (H // G)
    M = scores(B, C, rows, inside, G, group, N, BLOCK_N, L, PRECISION) * decay_between(sums, False, L)
    to_end = tl.exp((last_of(sums, L) - sums).to(tl.float32))
    step = steps_of(dt, rows, inside, H, h)
    ddt_L = tl.zeros((L,), dtype=tl.float32)
    for p in range(0, P, BLOCK_P):
        du_LP = tl.zeros((L, BLOCK_P), dtype=tl.float32)
        for n in range(0, N, BLOCK_N):
            at, exist = state_at(dstates, chunk, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
            dS = tl.load(at, mask=exist, other=0.0)
            du_LP += product(tile(B, rows, inside, G, group, N, BLOCK_N, n), tl.trans(dS), PRECISION)
        dy_LP = tile(dy, rows, inside, H, h, P, BLOCK_P, p)
        du_LP = du_LP * to_end[:, None] + product(tl.trans(M), dy_LP, PRECISION)
        ddt_L += tl.sum(tile(x, rows, inside, H, h, P, BLOCK_P, p) * du_LP, 1)
        put(dx, du_LP * step[:, None], rows, inside, H, h, P, BLOCK_P, p)
    tl.store(ddt + rows.to(tl.int64) * H + h, ddt_L, mask=inside)


@triton.jit(do_not_specialize=["H", "G"])
def keys_gradient_kernel(
    x, dt, g, B, C, states, dstates, dy, dg, dB, dC, begins, ends, H, G, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dB and dC of each head [tokens, H, N], and dg [tokens, H]."""
    chunk, h = tl.program_id(0), tl.program_id(1)
    rows = tl.load(begins + chunk) + tl.arange(0, L)
    inside = rows < tl.load(ends + chunk)
    sums = gate_sums(g, rows, inside, H, h)
    step = steps_of(dt, rows, inside, H, h)
    group = h // (H // G)
    dM = tl.zeros((L, L), dtype=tl.float32)
    for p in range(0, P, BLOCK_P):
        u_LP = tile(x, rows, inside, H, h, P, BLOCK_P, p) * step[:, None]
        dM += product(tile(dy, rows, inside, H, h, P, BLOCK_P, p), tl.trans(u_LP), PRECISION)
    dM *= decay_between(sums, False, L)
    pairs = dM * scores(B, C, rows, inside, G, group, N, BLOCK_N, L, PRECISION)
    dg_L = through_pairs(pairs, L)  # here, so that the pairs need not be kept

    last = last_of(sums, L)
    growth = tl.exp(sums.to(tl.float32))
    to_end = tl.exp((last - sums).to(tl.float32))
    from_start = tl.zeros((L,), dtype=tl.float32)
    to_last = tl.zeros((L,), dtype=tl.float32)
    whole = 0.0  # <S, dS_next>
    for n in range(0, N, BLOCK_N):
        dB_LN = tl.zeros((L, BLOCK_N), dtype=tl.float32)
        dC_LN = tl.zeros((L, BLOCK_N), dtype=tl.float32)
        for p in range(0, P, BLOCK_P):
            at, exist = state_at(states, chunk, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
            S = tl.load(at, mask=exist, other=0.0)
            at, exist = state_at(dstates, chunk, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
            dS = tl.load(at, mask=exist, other=0.0)
            whole += tl.sum(S * dS)
            dC_LN += product(tile(dy, rows, inside, H, h, P, BLOCK_P, p), S, PRECISION)
            dB_LN += product(tile(x, rows, inside, H, h, P, BLOCK_P, p) * step[:, None], dS, PRECISION)
        b_LN = tile(B, rows, inside, G, group, N, BLOCK_N, n)
        c_LN = tile(C, rows, inside, G, group, N, BLOCK_N, n)
        dC_LN *= growth[:, None]
        from_start += tl.sum(c_LN * dC_LN, 1)
        put(dC, dC_LN + product(dM, b_LN, PRECISION), rows, inside, H, h, N, BLOCK_N, n)
        dB_LN *= to_end[:, None]
        to_last += tl.sum(b_LN * dB_LN, 1)
        put(dB, dB_LN + product(tl.trans(dM), c_LN, PRECISION), rows, inside, H, h, N, BLOCK_N, n)
    dg_L += through_ends(from_start, to_last, L) + whole * tl.exp(last.to(tl.float32))
    tl.store(dg + rows.to(tl.int64) * H + h, dg_L, mask=inside)


@triton.jit(do_not_specialize=["T", "H", "G"])
def steps_kernel(
    x, dt, g, B, C, initial, y, final, T, H, G, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the recurrence token by token, for decoding: T tokens of each sequence; a state is read once and written
    once."""
    channels, h, sequence = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1), tl.program_id(2)
    at, exist = state_at(initial, sequence, H, h, P, N, BLOCK_P, BLOCK_N, tl.program_id(0) * BLOCK_P, 0)
    S = tl.load(at, mask=exist, other=0.0)
    n = tl.arange(0, BLOCK_N)
    for t in range(T):
        token = sequence.to(tl.int64) * T + t
        shared = (token * G + h // (H // G)) * N + n
        value = (token * H + h) * P + channels
        B_N = tl.load(B + shared, mask=n < N, other=0.0).to(tl.float32)
        u_P = tl.load(x + value, mask=channels < P, other=0.0).to(tl.float32) * tl.load(dt + token * H + h)
        S = S * tl.exp(tl.load(g + token * H + h)) + u_P[:, None] * B_N[None]
        C_N = tl.load(C + shared, mask=n < N, other=0.0).to(tl.float32)
        tl.store(y + value, tl.sum(S * C_N[None], 1).to(y.dtype.element_ty), mask=channels < P)
    at, exist = state_at(final, sequence, H, h, P, N, BLOCK_P, BLOCK_N, tl.program_id(0) * BLOCK_P, 0)
    tl.store(at, S, mask=exist)
