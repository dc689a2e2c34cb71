"""The state space dual form in chunks of L tokens in Triton, forward and backward.

With sums those of g = dt A within a chunk, last the last of them, u = dt x, S the state [P, N] before the chunk and
decays_ij = e^{sums_i - sums_j} for i >= j,

    M = C B^T * decays    y = e^sums C S^T + M u    S_next = e^last S + u^T (e^{last - sums} B)

`gates_kernel` makes the steps and the sums of every chunk; `states_kernel` goes from chunk to chunk with a part of S
in registers and keeps S before each, in x's dtype, in which products read it; `outputs_kernel` takes every chunk of
some heads of a group by itself and makes C B^T once for them. The states could also stay in registers up to the
outputs, in one program per sequence, head and part of P, which would move 0.14 GB where this moves 0.35 GB (T 8192, 64
heads of 64, state 128, bfloat16). But those are 128 programs for 132 multiprocessors, each with 128 times four products
that wait for one another and a C B^T of its own, half of all arithmetic; here one product waits for the one before.

Operands of products are in x's dtype, of float32 in three parts of TF32 that together keep its precision; sums are
float32, those of g float64, since float32 loses the small differences of strong gates: what it loses of each sum is
kept beside it, and used where products are in float32. Exponents are masked before the exponential. Nothing is added
atomically, so two runs are equal bit for bit.

Shape letters, beside the matrices B and C: L tokens of a chunk (T of a sequence in decoding), H heads of P channels,
G groups of heads, N numbers of a state per channel. BLOCK_P and BLOCK_N are what a product takes of a state, PER the
heads that a program takes, ROW_ how far tokens lie apart. See kernels/common/slots.py for slots of chunks. gates:
[slots, H, 3, L] float32, step, sum and what float32 loses of the sum.
"""

import triton
import triton.language as tl

from kernels.common.slots import chunk_at, sequence_at
from kernels.common.tiles import put_tokens, softplus, state_at, tokens

# No decay is taken as stronger: e^-120 is 0 in float32, and larger sums, as of -inf, would lose what follows a reset.
LEAST = tl.constexpr(-120.0)
GATES = tl.constexpr(3)


@triton.jit
def gates_of(dt, A, bias, token, h, exist, H, least, most, SOFTPLUS: tl.constexpr, PER_TOKEN: tl.constexpr):
    """Return dt before softplus and limits, the time step and A of tokens and heads that exist, else 0."""
    at = token.to(tl.int64) * H + h
    if dt is None:
        raw = tl.where(exist, 1.0, tl.zeros(at.shape, tl.float32))
        step = raw
    else:
        raw = tl.load(dt + at, mask=exist, other=0.0).to(tl.float32)
        if bias is not None:
            raw += tl.load(bias + h, mask=h < H, other=0.0).to(tl.float32)
        step = softplus(raw) if SOFTPLUS else raw
        step = tl.where(exist, tl.minimum(tl.maximum(step, least), most), 0.0)
    if PER_TOKEN:
        a = tl.load(A + at, mask=exist, other=0.0).to(tl.float32)
    else:
        a = tl.load(A + h + tl.zeros_like(at), mask=exist, other=0.0).to(tl.float32)
    return raw, step, tl.maximum(a, -3e38)  # -inf times a step of 0 would be NaN


@triton.jit(do_not_specialize=["T", "sequences", "H", "least", "most"])
def gates_kernel(
    A, dt, bias, gates, cu_seqlens, T, sequences, H, least, most, SOFTPLUS: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK_H: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Store the gates of a chunk; after its last token the steps are 0 and the sums stay."""
    slot, h = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None]
    sequence, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, L)
    i = tl.arange(0, L)[:, None]
    exist = (begin + i < end) & (h < H)
    _, step, a = gates_of(dt, A, bias, begin + i, h, exist, H, least, most, SOFTPLUS, PER_TOKEN)
    sums = tl.cumsum(tl.maximum(step.to(tl.float64) * a.to(tl.float64), LEAST), 0)
    high = sums.to(tl.float32)
    at = gates + (slot.to(tl.int64) * H + h) * (GATES * L) + i
    stored = (h < H) & (i < L)
    tl.store(at, step, mask=stored)
    tl.store(at + L, high, mask=stored)
    tl.store(at + 2 * L, (sums - high.to(tl.float64)).to(tl.float32), mask=stored)


@triton.jit
def gates_at(gates, slot, H, h, L: tl.constexpr):
    """Return step, sums and what float32 loses of them [L], each sum's difference to the last, and the last."""
    at = gates + (slot.to(tl.int64) * H + h) * (GATES * L)
    i = tl.arange(0, L)
    step, sums, lost = tl.load(at + i), tl.load(at + L + i), tl.load(at + 2 * L + i)
    last = tl.load(at + 2 * L - 1)
    to_last = (last - sums) + (tl.load(at + 3 * L - 1) - lost)
    return step, sums, lost, to_last, last


@triton.jit
def product(a, b, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return a b in float32, of operands in dtype."""
    return tl.dot(a.to(dtype), b.to(dtype), input_precision=PRECISION)


@triton.jit
def decays_between(reader, writer, lost_reader, lost_writer, seen, dtype: tl.constexpr):
    """Return e^{reader - writer} [L, L] of the sums [L, 1] and [1, L], or the other way round, of tokens of a chunk
    where `seen`; elsewhere 1. What float32 loses of the sums counts where products are in float32."""
    between = reader - writer
    if dtype == tl.float32:
        between += lost_reader - lost_writer
    return tl.exp(tl.where(seen, between, 0.0))


@triton.jit
def heads_of(program, H, G, PER: tl.constexpr):
    """Return a program's group of heads, which part of the group it has, and its first head and the one after its
    last."""
    R = H // G
    parts = tl.cdiv(R, PER)
    group, part = program // parts, program % parts
    first = group * R + part * PER
    return group, part, first, tl.minimum(first + PER, (group + 1) * R)


@triton.jit(do_not_specialize=["T", "sequences", "H", "G"])
def states_kernel(
    a, b, gates, states, initial, final, cu_seqlens, T, sequences, H, G, ROW_A: tl.constexpr, ROW_B: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the state before each chunk [slots, H, P, N] and after the last, of a = x and b = B. With REVERSE the
    gradient of the state after each chunk and before the first, of a = dy and b = C, from the last chunk to the first.
    `initial` is the state (or gradient) to begin with; None are zeros. `final` may be None."""
    BLOCKS_N: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    sequence, h, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    p, n = block // BLOCKS_N * BLOCK_P, block % BLOCKS_N * BLOCK_N
    group = h // (H // G)
    dtype: tl.constexpr = a.dtype.element_ty
    start, end, slot = sequence_at(sequence, cu_seqlens, T, sequences, L)
    at, exist = state_at(states, 0, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
    own = sequence.to(tl.int64) * H * P * N
    state = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if initial is not None:
        begins, _ = state_at(initial, 0, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
        state += tl.load(begins + own, mask=exist, other=0.0).to(tl.float32)
    chunks = tl.cdiv(end - start, L)
    for step in range(0, chunks):
        i = chunks - 1 - step if REVERSE else step
        begin = start + i * L
        tl.store(at + (slot + i).to(tl.int64) * H * P * N, state.to(states.dtype.element_ty), mask=exist)
        steps, sums, lost, to_last, last = gates_at(gates, slot + i, H, h, L)
        weight = tl.exp(sums) if REVERSE else steps * tl.exp(to_last)
        a_LP = tokens(a, begin, end, ROW_A, h, P, BLOCK_P, p, L).to(tl.float32) * weight[:, None]
        b_LN = tokens(b, begin, end, ROW_B, group, N, BLOCK_N, n, L)
        state = state * tl.exp(last) + product(tl.trans(a_LP), b_LN, dtype, PRECISION)
    if final is not None:
        ends, _ = state_at(final, 0, H, h, P, N, BLOCK_P, BLOCK_N, p, n)
        tl.store(ends + own, state, mask=exist)


@triton.jit(do_not_specialize=["T", "sequences", "H", "G"])
def outputs_kernel(
    x, B, C, D, z, gates, states, y, dy, dgated, cu_seqlens, T, sequences, H, G, ROW_X: tl.constexpr,
    ROW_B: tl.constexpr, ROW_C: tl.constexpr, ROW_Z: tl.constexpr, PER: tl.constexpr, P: tl.constexpr,
    N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store y = (e^sums C S^T + M u + D x) silu(z) of a chunk, for some heads of a group. With its gradient dy, store
    instead of y the gradient of z, and in `dgated` that of what z gates."""
    slot = tl.program_id(0)
    group, part, first, behind = heads_of(tl.program_id(1), H, G, PER)
    sequence, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, L)
    dtype: tl.constexpr = x.dtype.element_ty
    c_LN = tokens(C, begin, end, ROW_C, group, N, BLOCK_N, 0, L).to(dtype)
    b_LN = tokens(B, begin, end, ROW_B, group, N, BLOCK_N, 0, L)
    i = tl.arange(0, L)
    seen = i[:, None] >= i[None]
    scores = tl.where(seen, product(c_LN, tl.trans(b_LN), dtype, PRECISION), 0.0)
    for h in range(first, behind):
        step, sums, lost, to_last, last = gates_at(gates, slot, H, h, L)
        M = scores * decays_between(sums[:, None], sums[None], lost[:, None], lost[None], seen, dtype) * step[None]
        for p in range(0, P, BLOCK_P):
            at, exist = state_at(states, slot, H, h, P, N, BLOCK_P, BLOCK_N, p, 0)
            S = tl.load(at, mask=exist, other=0.0)
            x_LP = tokens(x, begin, end, ROW_X, h, P, BLOCK_P, p, L)
            y_LP = product(M, x_LP, dtype, PRECISION)
            y_LP += product(c_LN, tl.trans(S), dtype, PRECISION) * tl.exp(sums)[:, None]
            if D is not None:
                y_LP += tl.load(D + h).to(tl.float32) * x_LP.to(tl.float32)
            if z is not None:
                z_LP = tokens(z, begin, end, ROW_Z, h, P, BLOCK_P, p, L).to(tl.float32)
                s = tl.sigmoid(z_LP)
                if dy is None:
                    y_LP *= z_LP * s
                else:
                    dy_LP = tokens(dy, begin, end, H * P, h, P, BLOCK_P, p, L).to(tl.float32)
                    put_tokens(dy_LP * z_LP * s, dgated, begin, end, H * P, h, P, BLOCK_P, p, L)
                    y_LP *= dy_LP * s * (1 + z_LP * (1 - s))
            put_tokens(y_LP, y, begin, end, H * P, h, P, BLOCK_P, p, L)


@triton.jit(do_not_specialize=["T", "H", "G", "least", "most"])
def steps_kernel(
    x, dt, A, B, C, D, z, bias, initial, y, final, T, H, G, least, most, SOFTPLUS: tl.constexpr,
    PER_TOKEN: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the recurrence token by token, for decoding: T tokens of each sequence; a state is read once and written
    once."""
    channels, h, sequence = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(1), tl.program_id(2)
    S = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    if initial is not None:
        at, exist = state_at(initial, sequence, H, h, P, N, BLOCK_P, BLOCK_N, tl.program_id(0) * BLOCK_P, 0)
        S += tl.load(at, mask=exist, other=0.0).to(tl.float32)
    n = tl.arange(0, BLOCK_N)
    for t in range(T):
        token = sequence.to(tl.int64) * T + t
        one = tl.arange(0, 1)  # of one token
        _, step, a = gates_of(dt, A, bias, token + one, h + one, one == 0, H, least, most, SOFTPLUS, PER_TOKEN)
        shared = (token * G + h // (H // G)) * N + n
        value = (token * H + h) * P + channels
        B_N = tl.load(B + shared, mask=n < N, other=0.0).to(tl.float32)
        C_N = tl.load(C + shared, mask=n < N, other=0.0).to(tl.float32)
        x_P = tl.load(x + value, mask=channels < P, other=0.0).to(tl.float32)
        S = S * tl.exp(step * a)[:, None] + (x_P * step)[:, None] * B_N[None]
        y_P = tl.sum(S * C_N[None], 1)
        if D is not None:
            y_P += tl.load(D + h).to(tl.float32) * x_P
        if z is not None:
            z_P = tl.load(z + value, mask=channels < P, other=0.0).to(tl.float32)
            y_P *= z_P * tl.sigmoid(z_P)
        tl.store(y + value, y_P.to(y.dtype.element_ty), mask=channels < P)
    at, exist = state_at(final, sequence, H, h, P, N, BLOCK_P, BLOCK_N, tl.program_id(0) * BLOCK_P, 0)
    tl.store(at, S, mask=exist)


# Backward, everything of a chunk lies transposed, [j, i] for the token j that writes and the token i that reads: as
# the left operands of products, which are read from registers. With dS the gradient of the state after the chunk,
#
#     du = e^{last - sums} B dS^T + M^T dy    dM^T = u dy^T * decays^T
#     dB = e^{last - sums} u dS + dM^T C      dC = e^sums dy S + dM B
#
# Of the gradient of gate t of a chunk, what acts through e^{sums_i - sums_j} comes from the pairs j < t <= i, what acts
# through e^sums from the tokens from t on, and what acts through e^{last - sums} from those before t. Summed like this
# nothing has to cancel. parts: [slots, H, 4, L] float32 per token: the gradient of its step as a factor of x, what acts
# on its gate through e^{last - sums}, through pairs, and through e^sums; where that of the last token has what goes
# through the whole chunk, which counts for all gates up to there.
PARTS = tl.constexpr(4)


@triton.jit(do_not_specialize=["T", "sequences", "H", "G"])
def values_gradient_kernel(
    x, B, C, D, gates, dstates, dy, dx, dD, parts, cu_seqlens, T, sequences, H, G, ROW_X: tl.constexpr,
    ROW_B: tl.constexpr, ROW_C: tl.constexpr, PER: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dx, what the chunk adds to dD [slots, H], and the first three parts of the gradients of the gates."""
    slot = tl.program_id(0)
    group, part, first, behind = heads_of(tl.program_id(1), H, G, PER)
    sequence, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, L)
    dtype: tl.constexpr = x.dtype.element_ty
    b_LN = tokens(B, begin, end, ROW_B, group, N, BLOCK_N, 0, L).to(dtype)
    c_LN = tokens(C, begin, end, ROW_C, group, N, BLOCK_N, 0, L).to(dtype)
    own = tl.arange(0, L)
    j, i = own[:, None], own[None]
    scores = tl.where(j <= i, product(b_LN, tl.trans(c_LN), dtype, PRECISION), 0.0)
    before = (i < j).to(tl.float32)
    for h in range(first, behind):
        step, sums, lost, to_last, last = gates_at(gates, slot, H, h, L)
        M = scores * decays_between(sums[None], sums[:, None], lost[None], lost[:, None], j <= i, dtype)
        dM = tl.zeros((L, L), dtype=tl.float32)
        dstep, to_end, dweight = step * 0.0, step * 0.0, 0.0
        for p in range(0, P, BLOCK_P):
            x_LP = tokens(x, begin, end, ROW_X, h, P, BLOCK_P, p, L)
            x_wide = x_LP.to(tl.float32)
            dy_LP = tokens(dy, begin, end, H * P, h, P, BLOCK_P, p, L)
            at, exist = state_at(dstates, slot, H, h, P, N, BLOCK_P, BLOCK_N, p, 0)
            dS = tl.load(at, mask=exist, other=0.0)
            du = product(b_LN, tl.trans(dS), dtype, PRECISION) * tl.exp(to_last)[:, None]
            to_end += tl.sum(x_wide * du, 1)
            du += product(M, dy_LP, dtype, PRECISION)
            dM += product(x_LP, tl.trans(dy_LP), dtype, PRECISION)
            dstep += tl.sum(x_wide * du, 1)
            dx_LP = du * step[:, None]
            if D is not None:
                dx_LP += tl.load(D + h).to(tl.float32) * dy_LP.to(tl.float32)
                dweight += tl.sum(x_wide * dy_LP.to(tl.float32))
            put_tokens(dx_LP, dx, begin, end, H * P, h, P, BLOCK_P, p, L)
        # Of every gate t and reader i the sum of the pairs j < t, then of those the readers from t on; the pairs
        # would overflow in float16.
        pairs = tl.where(j < i, dM * M * step[:, None], 0.0)
        spanning = tl.where(
            i >= j, product(before, pairs, tl.float32 if dtype == tl.float16 else dtype, PRECISION), 0.0
        )
        at = parts + (slot.to(tl.int64) * H + h) * (PARTS * L) + own
        tl.store(at, dstep)
        tl.store(at + L, to_end * step)
        tl.store(at + 2 * L, tl.sum(spanning, 1))
        if D is not None:
            tl.store(dD + slot.to(tl.int64) * H + h, dweight)


@triton.jit(do_not_specialize=["T", "sequences", "H", "G"])
def keys_gradient_kernel(
    x, B, C, gates, states, dstates, dy, dB, dC, parts, cu_seqlens, T, sequences, H, G, ROW_X: tl.constexpr,
    ROW_B: tl.constexpr, ROW_C: tl.constexpr, PER: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store what some heads of a group add to dB and dC [parts of the group, tokens, G, N], and the last part of the
    gradients of the gates."""
    slot = tl.program_id(0)
    group, part, first, behind = heads_of(tl.program_id(1), H, G, PER)
    sequence, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, L)
    dtype: tl.constexpr = x.dtype.element_ty
    b_LN = tokens(B, begin, end, ROW_B, group, N, BLOCK_N, 0, L).to(dtype)
    c_LN = tokens(C, begin, end, ROW_C, group, N, BLOCK_N, 0, L).to(dtype)
    j, i = tl.arange(0, L)[:, None], tl.arange(0, L)[None]
    dscores = tl.zeros((L, L), dtype=tl.float32)
    dB_LN = tl.zeros((L, BLOCK_N), dtype=tl.float32)
    dC_LN = tl.zeros((L, BLOCK_N), dtype=tl.float32)
    for h in range(first, behind):
        step, sums, lost, to_last, last = gates_at(gates, slot, H, h, L)
        dM = tl.zeros((L, L), dtype=tl.float32)
        from_start, whole = step * 0.0, 0.0  # <S, dS>
        for p in range(0, P, BLOCK_P):
            at, exist = state_at(states, slot, H, h, P, N, BLOCK_P, BLOCK_N, p, 0)
            S = tl.load(at, mask=exist, other=0.0)
            at, exist = state_at(dstates, slot, H, h, P, N, BLOCK_P, BLOCK_N, p, 0)
            dS = tl.load(at, mask=exist, other=0.0)
            whole += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            x_LP = tokens(x, begin, end, ROW_X, h, P, BLOCK_P, p, L)
            dy_LP = tokens(dy, begin, end, H * P, h, P, BLOCK_P, p, L)
            dM += product(x_LP, tl.trans(dy_LP), dtype, PRECISION)
            dy_LP = dy_LP.to(tl.float32) * tl.exp(sums)[:, None]
            from_start += tl.sum(dy_LP * product(c_LN, tl.trans(S), dtype, PRECISION), 1)
            dB_LN += product(x_LP.to(tl.float32) * (step * tl.exp(to_last))[:, None], dS, dtype, PRECISION)
            dC_LN += product(dy_LP, S, dtype, PRECISION)
        dscores += (
            dM * decays_between(sums[None], sums[:, None], lost[None], lost[:, None], j <= i, dtype) * step[:, None]
        )
        at = parts + (slot.to(tl.int64) * H + h) * (PARTS * L) + 3 * L + tl.arange(0, L)
        tl.store(at, from_start + tl.where(tl.arange(0, L) == L - 1, whole * tl.exp(last), 0.0))
    dscores = tl.where(j <= i, dscores, 0.0)
    dB_LN += product(dscores, c_LN, dtype, PRECISION)
    dC_LN += product(tl.trans(dscores), b_LN, dtype, PRECISION)
    all_tokens = T if cu_seqlens is not None else T * sequences
    skipped = part.to(tl.int64) * all_tokens * G * N
    put_tokens(dB_LN, dB + skipped, begin, end, G * N, group, N, BLOCK_N, 0, L)
    put_tokens(dC_LN, dC + skipped, begin, end, G * N, group, N, BLOCK_N, 0, L)


@triton.jit(do_not_specialize=["T", "sequences", "H", "least", "most"])
def gates_gradient_kernel(
    A, dt, bias, parts, ddt, dA, dbias, cu_seqlens, T, sequences, H, least, most, SOFTPLUS: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK_H: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Store ddt and, per token, dA; or what the chunk adds to dA [slots, H], and to that of the bias [slots, H]."""
    slot, h = tl.program_id(0), tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    sequence, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, L)
    i = tl.arange(0, L)[None]
    exist = (begin + i < end) & (h < H)
    raw, step, a = gates_of(dt, A, bias, begin + i, h, exist, H, least, most, SOFTPLUS, PER_TOKEN)
    at = parts + (slot.to(tl.int64) * H + h) * (PARTS * L) + i
    dstep = tl.load(at, mask=exist, other=0.0)
    dg = tl.load(at + 2 * L, mask=exist, other=0.0)
    dg += tl.cumsum(tl.load(at + 3 * L, mask=h < H, other=0.0), 1, reverse=True)
    dg += tl.cumsum(tl.load(at + L - 1, mask=exist & (i > 0), other=0.0), 1)
    dg = tl.where(exist & (step * a > LEAST), dg, 0.0)
    token = (begin + i).to(tl.int64) * H + h
    stored = h < H
    if PER_TOKEN:
        tl.store(dA + token, (dg * step).to(dA.dtype.element_ty), mask=exist)
    else:
        tl.store(dA + slot.to(tl.int64) * H + h, tl.sum(dg * step, 1)[:, None], mask=stored)
    if ddt is not None:
        draw = dstep + dg * a
        free = softplus(raw) if SOFTPLUS else raw
        draw = tl.where((free >= least) & (free <= most), draw, 0.0)
        if SOFTPLUS:
            draw *= tl.sigmoid(raw)
        tl.store(ddt + token, draw.to(ddt.dtype.element_ty), mask=exist)
        if bias is not None:
            draw = tl.where(exist, draw, 0.0)
            tl.store(dbias + slot.to(tl.int64) * H + h, tl.sum(draw, 1)[:, None], mask=stored)


@triton.jit
def add_kernel(parts_of_B, parts_of_C, dB, dC, parts, SIZE, BLOCK: tl.constexpr):
    """Store the sums of the parts [parts, SIZE] of dB and dC."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exist = at < SIZE
    total_B, total_C = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        total_B += tl.load(parts_of_B + part * SIZE + at, mask=exist, other=0.0)
        total_C += tl.load(parts_of_C + part * SIZE + at, mask=exist, other=0.0)
    tl.store(dB + at, total_B.to(dB.dtype.element_ty), mask=exist)
    tl.store(dC + at, total_C.to(dC.dtype.element_ty), mask=exist)
