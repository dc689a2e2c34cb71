"""The short convolution in Triton, forward and backward.

A program goes through the tokens of a chunk, some at a time, with the last W in registers: every token is loaded once,
but for the W - 1 beside a chunk. Backward it makes again what comes before the activation, of its own tokens and of the
W - 1 behind, whose gradients reach back. Before a sequence lie the W - 1 tokens of its initial state. Sums are in
float32; what a chunk adds to the gradients of the taps and the bias is added up in a fixed order afterwards.

Shape letters: C channels, W taps, n sequences. BLOCK_T and BLOCK_C are the tokens of a chunk and the channels that a
program takes, AT_ONCE the tokens that it loads before it computes, ROW how far tokens of x lie apart. See
kernels/common/slots.py for slots of chunks.
"""

import triton
import triton.language as tl

from kernels.common.slots import chunk_at


@triton.jit
def row_of(pointer, row, ROW, columns, wanted):
    """Return channels of a row in float32; 0 where they are not wanted."""
    return tl.load(pointer + row.to(tl.int64) * ROW + columns, mask=wanted, other=0.0).to(tl.float32)


@triton.jit
def set_row(pointer, row, ROW, columns, values, wanted):
    """Store channels of a row, where they are wanted."""
    tl.store(pointer + row.to(tl.int64) * ROW + columns, values.to(pointer.dtype.element_ty), mask=wanted)


@triton.jit
def taps_of(weight, bias, columns, exist, W: tl.constexpr):
    """Return the taps, a tuple of W, and the bias."""
    taps, offset = (), tl.zeros(columns.shape, tl.float32)
    if bias is not None:
        offset += tl.load(bias + columns, mask=exist, other=0.0).to(tl.float32)
    for w in tl.static_range(W):
        taps = taps + (tl.load(weight + columns * W + w, mask=exist, other=0.0).to(tl.float32),)
    return taps, offset


@triton.jit
def tokens_before(x, state, n, start, begin, ROW, C, columns, exist, W: tl.constexpr):
    """Return the W - 1 tokens before a chunk, a tuple: of its sequence, or of the state [n, W - 1, C] before that."""
    window = ()
    for k in tl.static_range(W - 1):
        at = begin - (W - 1) + k
        token = row_of(x, at, ROW, columns, exist & (at >= start))
        if state is not None:
            token += row_of(state, n * (W - 1) + at - start + W - 1, C, columns, exist & (at < start))
        window = window + (token,)
    return window


@triton.jit
def convolved(window, taps, offset, W: tl.constexpr):
    """Return the sum before the activation."""
    for w in tl.static_range(W):
        offset += window[w] * taps[w]
    return offset


@triton.jit(do_not_specialize=["T", "sequences", "C"])
def forward_kernel(
    x, state, weight, bias, y, final, cu_seqlens, T, sequences, C, ROW: tl.constexpr, W: tl.constexpr,
    SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store y of a chunk, and what of it and of the tokens before a sequence is among that sequence's last W - 1."""
    slot, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, BLOCK_T)
    exist = columns < C
    taps, offset = taps_of(weight, bias, columns, exist, W)
    window = tokens_before(x, state, n, start, begin, ROW, C, columns, exist, W)
    for k in tl.static_range(W - 1):
        kept = k - (end - start)
        set_row(final, n * (W - 1) + kept, C, columns, window[k], exist & (begin == start) & (kept >= 0))
    for first in range(0, tl.minimum(BLOCK_T, end - begin), AT_ONCE):
        loaded = ()
        for r in tl.static_range(AT_ONCE):
            at = begin + first + r
            loaded = loaded + (row_of(x, at, ROW, columns, exist & (at < end)),)
        for r in tl.static_range(AT_ONCE):
            at = begin + first + r
            window = window + (loaded[r],)
            z = convolved(window, taps, offset, W)
            if SILU:
                z *= tl.sigmoid(z)
            set_row(y, at, C, columns, z, exist & (at < end))
            kept = at - end + W - 1
            set_row(final, n * (W - 1) + kept, C, columns, loaded[r], exist & (kept >= 0) & (at < end))
            window = window[1:]


@triton.jit(do_not_specialize=["T", "sequences", "C"])
def backward_kernel(
    x, state, weight, bias, dy, dfinal, dx, dstate, parts, cu_seqlens, T, sequences, C, ROW: tl.constexpr,
    W: tl.constexpr, SILU: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Store dx of a chunk, at the begin of a sequence the gradient of its initial state, and what the chunk adds to the
    gradients of the taps and the bias [slots, W + 1, C]."""
    slot, columns = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, start, end, begin = chunk_at(slot, cu_seqlens, T, sequences, BLOCK_T)
    exist, behind = columns < C, begin + BLOCK_T
    taps, offset = taps_of(weight, bias, columns, exist, W)
    window = tokens_before(x, state, n, start, begin, ROW, C, columns, exist, W)
    gradients, sums, of_bias = (), (), tl.zeros((BLOCK_C,), tl.float32)
    for w in tl.static_range(W):
        sums = sums + (tl.zeros((BLOCK_C,), tl.float32),)
        if w > 0:
            gradients = gradients + (tl.zeros((BLOCK_C,), tl.float32),)
    for first in range(0, tl.maximum(tl.minimum(BLOCK_T, end - begin), 0) + W - 1, AT_ONCE):
        loaded, given = (), ()
        for r in tl.static_range(AT_ONCE):
            at = begin + first + r
            wanted = exist & (at < end) & (at < behind + W - 1)
            loaded = loaded + (row_of(x, at, ROW, columns, wanted),)
            given = given + (row_of(dy, at, C, columns, wanted),)
        for r in tl.static_range(AT_ONCE):
            at = begin + first + r
            window = window + (loaded[r],)
            d = given[r]
            if SILU:
                z = convolved(window, taps, offset, W)
                s = tl.sigmoid(z)
                d *= s * (1 + z * (1 - s))
            own = tl.where(at < behind, d, 0.0)
            of_bias += own
            added = ()
            for w in tl.static_range(W):
                added = added + (sums[w] + own * window[w],)
            sums, window = added, window[1:]
            gradients = gradients + (d,)
            token = at - (W - 1)  # the gradients are those of the outputs from it on
            total = gradients[W - 1] * taps[0]
            for w in tl.static_range(1, W):
                total += gradients[W - 1 - w] * taps[w]
            gradients = gradients[1:]
            if dfinal is not None:
                kept = token - end + W - 1
                total += row_of(dfinal, n * (W - 1) + kept, C, columns, exist & (kept >= 0) & (token < end))
            set_row(dx, token, C, columns, total, exist & (token >= begin) & (token < end) & (token < behind))
            if dstate is not None:
                row = n * (W - 1) + token - start + W - 1
                set_row(dstate, row, C, columns, total, exist & (token < start) & (begin == start))
    for w in tl.static_range(W):
        set_row(parts, slot * (W + 1) + w, C, columns, sums[w], exist)
    set_row(parts, slot * (W + 1) + W, C, columns, of_bias, exist)
