"""Triton functions that the chunked kernels share.

The tokens of a chunk are those from `at` on, before `end`, in memory ROW numbers apart; kernels/common/slots.py finds
them.

Shape letters: C tokens of a chunk, D dimensions of a head, of which a program holds BLOCK_D; HV heads with a gate.
"""

import triton
import triton.language as tl

PART = 16  # rows of the blocks on the diagonal that are inverted row by row


@triton.jit
def decay_between(sums, strict: tl.constexpr, C: tl.constexpr):
    """Return e^{sums_i - sums_j} [C, C] below the diagonal, and on it unless strict; 0 above. Strong gates sum to
    hundreds, of which float32 would lose the small differences: what it loses of each sum is taken along."""
    i = tl.arange(0, C)
    seen = (i[:, None] > i[None]) if strict else (i[:, None] >= i[None])
    high = sums.to(tl.float32)
    lost = (sums - high.to(tl.float64)).to(tl.float32)
    between = tl.where(seen, (high[:, None] - high[None]) + (lost[:, None] - lost[None]), 0.0)
    return tl.where(seen, tl.exp(between), 0.0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def inverse_of(a, PART: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + a)^-1 of a strictly lower triangular [C, C]. The blocks on the diagonal are found row by row, stable
    whatever the size of their entries; those below from the ones beside them, twice as large at every level."""
    P: tl.constexpr = C // PART
    p, i = tl.arange(0, P), tl.arange(0, PART)
    diagonal = (p[:, None] == p[None])[:, None, :, None]
    parts = tl.sum(tl.where(diagonal, tl.reshape(a, (P, PART, P, PART)), 0.0), 2)
    inverse = tl.where((i[:, None] == i[None])[None], 1.0, tl.zeros_like(parts))
    for row in range(1, PART):
        this = (i == row)[None, :, None]
        of_row = tl.sum(tl.where(this, parts, 0.0), 1)
        new = (i == row).to(tl.float32)[None] - tl.sum(of_row[:, :, None] * inverse, 1)
        inverse = tl.where(this, new[:, None, :], inverse)
    whole = tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), (C, C))
    i = tl.arange(0, C)
    for level in tl.static_range(4):
        if PART << level < C:
            block = i // (PART << level)
            below = (block[:, None] == block[None] + 1) & (block % 2 == 1)[:, None]
            whole += product(whole, product(tl.where(below, -a, 0.0), whole, PRECISION), PRECISION)
    return whole


@triton.jit
def softplus(x):
    """Return log(1 + e^x), also where e^x is lost beside 1."""
    small = tl.exp(-tl.abs(x))
    more = 1.0 + small
    return tl.maximum(x, 0.0) + tl.where(more == 1.0, small, tl.log(more) * (small / tl.maximum(more - 1.0, 1e-37)))


@triton.jit
def state_at(
    S,
    index,
    heads,
    head,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    row,
    column,
):
    """Return pointers [BLOCK_ROWS, BLOCK_COLUMNS] into states [n, heads, ROWS, COLUMNS] from a row and a column on,
    and a mask of those that exist."""
    i, j = row + tl.arange(0, BLOCK_ROWS), column + tl.arange(0, BLOCK_COLUMNS)
    exist = (i < ROWS)[:, None] & (j < COLUMNS)[None]
    index = tl.full((), 0, tl.int64) + index  # a plain int in the interpreter
    return S + ((index * heads + head) * ROWS + i[:, None]) * COLUMNS + j[None], exist


# Of the gradient of gate t of a chunk: what acts through e^{sums_i - sums_j} comes from the pairs j < t <= i, what
# acts through e^sums from the tokens from t on, and what acts through e^{last - sums} from those before t. Summed
# like this nothing has to cancel.


@triton.jit
def through_pairs(pairs, C: tl.constexpr):
    """Return [C], of every gate the sum of `pairs` [C, C] that span it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None]
    return tl.sum(tl.where(j < i, tl.cumsum(pairs, 0, reverse=True), 0.0), 1)


@triton.jit
def through_ends(from_start, to_last, C: tl.constexpr):
    """Return [C], of every gate the sum of from_start [C] from it on and of to_last [C] before it."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None]
    return tl.sum(tl.where(i >= j, from_start[:, None], to_last[:, None]), 0)


@triton.jit
def columns_at(pointer, at, end, ROW, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first, C: tl.constexpr):
    """Return pointers [C, BLOCK_D] to the tokens from `at` on, from column `first` of a head, and a mask of those that
    exist."""
    i, j = tl.arange(0, C), first + tl.arange(0, BLOCK_D)
    exist = (at + i < end)[:, None]
    if D % BLOCK_D:
        exist &= (j < D)[None]
    # One large offset and many small ones: the small ones stay the same from chunk to chunk.
    at = tl.full((), 0, tl.int64) + at  # a plain int in the interpreter
    return pointer + (at * ROW + head * D) + (i[:, None] * ROW + j[None]), exist


@triton.jit
def tokens(pointer, at, end, ROW, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first, C: tl.constexpr):
    """Return what lies at `columns_at`, 0 where nothing exists, as it is in memory."""
    where, exist = columns_at(pointer, at, end, ROW, head, D, BLOCK_D, first, C)
    return tl.load(where, mask=exist, other=0.0)


@triton.jit
def put_tokens(x, pointer, at, end, ROW, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first, C: tl.constexpr):
    """Store x [C, BLOCK_D] at `columns_at`."""
    where, exist = columns_at(pointer, at, end, ROW, head, D, BLOCK_D, first, C)
    tl.store(where, x.to(pointer.dtype.element_ty), mask=exist)


@triton.jit
def state(pointer, n, HV, hv, K, V, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, first):
    """Return columns from `first` on of the n-th state of a head, [BLOCK_K, BLOCK_V], 0 where nothing exists."""
    where, exist = state_at(pointer, n, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
    return tl.load(where, mask=exist, other=0.0)


@triton.jit
def put_state(x, pointer, n, HV, hv, K, V, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, first):
    """Store x where `state` reads it."""
    where, exist = state_at(pointer, n, HV, hv, K, V, BLOCK_K, BLOCK_V, 0, first)
    tl.store(where, x.to(pointer.dtype.element_ty), mask=exist)


@triton.jit
def numbers(pointer, at, end, heads, head, C: tl.constexpr):
    """Return [C], a number per token of a head from [tokens, heads] in float32, 0 where there is none; all 1 for no
    pointer."""
    i = at + tl.arange(0, C)
    if pointer is None:
        found = tl.full((C,), 1.0, tl.float32)
    else:
        found = tl.load(pointer + i.to(tl.int64) * heads + head, mask=i < end, other=0.0).to(tl.float32)
    return found
