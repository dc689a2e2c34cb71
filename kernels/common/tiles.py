"""Triton functions that the chunked kernels share.

Sequences lie packed one after the other; a program has the tokens `rows` of a chunk, of which those `inside` exist.

Shape letters: C tokens of a chunk, D dimensions of a head, of which a program holds BLOCK_D; HV heads with a gate.
"""

import triton
import triton.language as tl


@triton.jit
def tile(pointer, rows, inside, heads, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first):
    """Return rows [C, BLOCK_D] from column `first` of a head, 0 outside, as float32. pointer: [tokens, heads, D]."""
    columns = first + tl.arange(0, BLOCK_D)
    at = (rows.to(tl.int64)[:, None] * heads + head) * D + columns[None]
    return tl.load(pointer + at, mask=inside[:, None] & (columns < D)[None], other=0.0).to(tl.float32)


@triton.jit
def put(pointer, x, rows, inside, heads, head, D: tl.constexpr, BLOCK_D: tl.constexpr, first):
    """Store x [C, BLOCK_D] where `tile` reads it."""
    columns = first + tl.arange(0, BLOCK_D)
    at = (rows.to(tl.int64)[:, None] * heads + head) * D + columns[None]
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=inside[:, None] & (columns < D)[None])


@triton.jit
def gate_sums(g, rows, inside, HV, hv):
    """Return the sums of g within the chunk, [C] in float64; after the last token they stay."""
    return tl.cumsum(tl.load(g + rows.to(tl.int64) * HV + hv, mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit
def last_of(sums, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, sums, 0.0), 0)


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
