"""The short convolution in Triton, forward and backward, on sequences packed one after the other.

Before a sequence lie the W - 1 tokens of its initial state; a token is found in one or the other by its place. Sums
are in float32; those over tokens are partial sums of a chunk, added up in a fixed order afterwards.

Shape letters: C channels, W taps, T tokens that a program holds; n sequences.
"""

import triton
import triton.language as tl


@triton.jit
def inputs_at(x, state, at, wanted, sequence, start, C, columns, BEFORE: tl.constexpr):
    """Return the tokens [T, C] at places `at`, which lie in x [tokens, C] from `start` on and before it in state [n,
    W - 1, C]."""
    mask = wanted[:, None] & (columns < C)[None]
    in_x = at >= start
    from_x = tl.load(x + at.to(tl.int64)[:, None] * C + columns[None], mask=mask & in_x[:, None], other=0.0)
    row = (sequence.to(tl.int64) * BEFORE + BEFORE + at - start)[:, None]
    from_state = tl.load(state + row * C + columns[None], mask=mask & (at < start)[:, None], other=0.0)
    return from_x.to(tl.float32) + from_state.to(tl.float32)


@triton.jit
def convolved(x, state, weight, bias, rows, inside, sequence, start, C, columns, W: tl.constexpr, BIAS: tl.constexpr):
    """Return the sum before the activation, [T, C]."""
    exist = columns < C
    total = tl.zeros((rows.shape[0], columns.shape[0]), dtype=tl.float32)
    if BIAS:
        total += tl.load(bias + columns, mask=exist, other=0.0).to(tl.float32)[None]
    for w in tl.static_range(W):
        tap = tl.load(weight + columns * W + w, mask=exist, other=0.0).to(tl.float32)
        total += tap[None] * inputs_at(x, state, rows - (W - 1) + w, inside, sequence, start, C, columns, W - 1)
    return total


@triton.jit(do_not_specialize=["C"])
def forward_kernel(
    x, state, weight, bias, y, begins, ends, sequences, cu_seqlens, C, W: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence = tl.load(sequences + chunk)
    rows = tl.load(begins + chunk) + tl.arange(0, BLOCK_T)
    inside = rows < tl.load(ends + chunk)
    z = convolved(x, state, weight, bias, rows, inside, sequence, tl.load(cu_seqlens + sequence), C, columns, W, BIAS)
    if SILU:
        z *= tl.sigmoid(z)
    at = y + rows.to(tl.int64)[:, None] * C + columns[None]
    tl.store(at, z.to(y.dtype.element_ty), mask=inside[:, None] & (columns < C)[None])


@triton.jit(do_not_specialize=["C"])
def final_kernel(x, state, final, cu_seqlens, C, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Store the last W - 1 tokens of each sequence."""
    sequence, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_W)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    last = inputs_at(x, state, end - (W - 1) + row, row < W - 1, sequence, start, C, columns, W - 1)
    at = final + (sequence.to(tl.int64) * (W - 1) + row)[:, None] * C + columns[None]
    tl.store(at, last.to(final.dtype.element_ty), mask=(row < W - 1)[:, None] & (columns < C)[None])


@triton.jit(do_not_specialize=["C"])
def sums_kernel(
    x, state, weight, bias, dy, dz, dweight, dbias, begins, ends, sequences, cu_seqlens, C, W: tl.constexpr,
    BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Store dz [tokens, C], the gradient before the activation, and what each chunk adds to the gradients of the taps
    [chunks, W, C] and the bias [chunks, C]."""
    chunk, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence = tl.load(sequences + chunk)
    start = tl.load(cu_seqlens + sequence)
    rows = tl.load(begins + chunk) + tl.arange(0, BLOCK_T)
    inside = rows < tl.load(ends + chunk)
    mask, exist = inside[:, None] & (columns < C)[None], columns < C
    at = rows.to(tl.int64)[:, None] * C + columns[None]
    d = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        z = convolved(x, state, weight, bias, rows, inside, sequence, start, C, columns, W, BIAS)
        s = tl.sigmoid(z)
        d *= s * (1 + z * (1 - s))
    tl.store(dz + at, d, mask=mask)
    tl.store(dbias + chunk.to(tl.int64) * C + columns, tl.sum(d, 0), mask=exist)
    for w in tl.static_range(W):
        seen = inputs_at(x, state, rows - (W - 1) + w, inside, sequence, start, C, columns, W - 1)
        tl.store(dweight + (chunk.to(tl.int64) * W + w) * C + columns, tl.sum(d * seen, 0), mask=exist)


@triton.jit
def gradient_at(dz, dfinal, weight, at, sequence, start, end, C, columns, W: tl.constexpr):
    """Return the gradient [T, C] of the tokens at these places: through the outputs that they are in, and the final
    state."""
    exist = columns < C
    total = tl.zeros((at.shape[0], columns.shape[0]), dtype=tl.float32)
    for w in tl.static_range(W):
        out = at + (W - 1) - w
        mask = ((out >= start) & (out < end))[:, None] & exist[None]
        tap = tl.load(weight + columns * W + w, mask=exist, other=0.0).to(tl.float32)
        total += tap[None] * tl.load(dz + out.to(tl.int64)[:, None] * C + columns[None], mask=mask, other=0.0)
    kept = at - end + W - 1
    mask = ((kept >= 0) & (kept < W - 1))[:, None] & exist[None]
    row = (sequence.to(tl.int64) * (W - 1) + kept)[:, None]
    return total + tl.load(dfinal + row * C + columns[None], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["C"])
def tokens_gradient_kernel(
    dz, dfinal, weight, dx, begins, ends, sequences, cu_seqlens, C, W: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    chunk, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sequence = tl.load(sequences + chunk)
    rows = tl.load(begins + chunk) + tl.arange(0, BLOCK_T)
    end = tl.load(ends + chunk)
    d = gradient_at(dz, dfinal, weight, rows, sequence, tl.load(cu_seqlens + sequence), end, C, columns, W)
    at = dx + rows.to(tl.int64)[:, None] * C + columns[None]
    tl.store(at, d.to(dx.dtype.element_ty), mask=(rows < end)[:, None] & (columns < C)[None])


@triton.jit(do_not_specialize=["C"])
def state_gradient_kernel(
    dz, dfinal, weight, dstate, cu_seqlens, C, W: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr
):
    sequence, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_W)
    start, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    d = gradient_at(dz, dfinal, weight, start - (W - 1) + row, sequence, start, end, C, columns, W)
    at = dstate + (sequence.to(tl.int64) * (W - 1) + row)[:, None] * C + columns[None]
    tl.store(at, d.to(dstate.dtype.element_ty), mask=(row < W - 1)[:, None] & (columns < C)[None])
