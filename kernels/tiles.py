"""Triton functions that the chunked kernels share. Sequences lie packed one after the other; a program has the tokens `rows`
of a chunk, of which those `inside` exist."""

import triton
import triton.language as tl


@triton.jit
def tile(pointer, rows, inside, heads, head, D: tl.constexpr, BD: tl.constexpr, first):
    """Rows [C, BD] from column `first` of a head, 0 outside, as float32. pointer: [tokens, heads, D]."""
    columns = first + tl.arange(0, BD)
    at = (rows.to(tl.int64)[:, None] * heads + head) * D + columns[None]
    return tl.load(pointer + at, mask=inside[:, None] & (columns < D)[None], other=0.0).to(tl.float32)


@triton.jit
def put(pointer, x, rows, inside, heads, head, D: tl.constexpr, BD: tl.constexpr, first):
    columns = first + tl.arange(0, BD)
    at = (rows.to(tl.int64)[:, None] * heads + head) * D + columns[None]
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=inside[:, None] & (columns < D)[None])


@triton.jit
def gate_sums(g, rows, inside, HV, hv):
    """G [C] in float64; after the last token it stays."""
    return tl.cumsum(tl.load(g + rows.to(tl.int64) * HV + hv, mask=inside, other=0.0).to(tl.float64), 0)


@triton.jit
def last_of(G, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, G, 0.0), 0)


@triton.jit
def decay_between(G, strict: tl.constexpr, C: tl.constexpr):
    """e^{G_i - G_j} [C, C] below the diagonal, and on it unless strict; 0 above. Strong gates sum to hundreds, of which float32
    would lose the small differences: what it loses of each sum is taken along."""
    i = tl.arange(0, C)
    seen = (i[:, None] > i[None]) if strict else (i[:, None] >= i[None])
    high = G.to(tl.float32)
    lost = (G - high.to(tl.float64)).to(tl.float32)
    between = tl.where(seen, (high[:, None] - high[None]) + (lost[:, None] - lost[None]), 0.0)
    return tl.where(seen, tl.exp(between), 0.0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def state_at(
    S, index, heads, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, row, column
):
    """Pointers [BR, BC] into states [n, heads, ROWS, COLUMNS] from a row and a column on, and which of them exist."""
    i, j = row + tl.arange(0, BR), column + tl.arange(0, BC)
    exist = (i < ROWS)[:, None] & (j < COLUMNS)[None]
    index = tl.full((), 0, tl.int64) + index  # a plain int in the interpreter
    return S + ((index * heads + head) * ROWS + i[:, None]) * COLUMNS + j[None], exist


# Of the gradient of gate t of a chunk: what acts through e^{G_i - G_j} comes from the pairs j < t <= i, what acts through e^G
# from the tokens from t on, and what acts through e^{G_last - G} from those before t. Summed like this nothing has to cancel.


@triton.jit
def through_pairs(pairs, C: tl.constexpr):
    """[C, C] -> [C]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None]
    return tl.sum(tl.where(j < i, tl.cumsum(pairs, 0, reverse=True), 0.0), 1)


@triton.jit
def through_ends(from_start, to_last, C: tl.constexpr):
    """[C], [C] -> [C]."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None]
    return tl.sum(tl.where(i >= j, from_start[:, None], to_last[:, None]), 0)
