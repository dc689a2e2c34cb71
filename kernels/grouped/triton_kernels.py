"""The grouped product and the sums of its matrices' gradients, in Triton.

A program finds its rows by itself: it reads the counts of all experts, of which each has as many blocks of rows as it
fills. Rows that no expert has are a segment of their own behind the last, where y is zero. Products are of the numbers
as they are, of float32 inputs in three TF32 parts that together keep float32's precision, summed in float32. Each sum
is taken by one program from the first row to the last, so two runs are equal bit for bit.

Shape letters: N rows, D numbers of a row, E experts, F numbers of a row of the output. BLOCK_E is a power of two of at
least E + 1.
"""

import triton
import triton.language as tl


@triton.jit
def segments_of(counts, N, E, BLOCK_E: tl.constexpr):
    """Return [BLOCK_E] the number of rows of each segment, those without an expert behind the last, and their ends."""
    expert = tl.arange(0, BLOCK_E)
    sizes = tl.load(counts + expert, mask=expert < E, other=0).to(tl.int32)
    sizes = tl.where(expert == E, N - tl.sum(sizes, 0), sizes)
    return sizes, tl.cumsum(sizes, 0)


@triton.jit
def rows_of(counts, N, E, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the expert of this program's block of rows, its first row, and the end of the segment; beyond the last
    block expert E and no row."""
    block, expert = tl.program_id(0), tl.arange(0, BLOCK_E)
    sizes, ends = segments_of(counts, N, E, BLOCK_E)
    blocks = (tl.maximum(sizes, 0) + BLOCK_N - 1) // BLOCK_N
    lasts = tl.cumsum(blocks, 0)
    mine = tl.sum((lasts <= block).to(tl.int32), 0)
    begin = tl.sum(tl.where(expert == mine, ends - sizes + (block - lasts + blocks) * BLOCK_N, 0), 0)
    end = tl.sum(tl.where(expert == mine, ends, 0), 0)
    return tl.minimum(mine, E), begin, tl.minimum(end, N)


@triton.jit(do_not_specialize=["N", "E"])
def products_kernel(
    x, weight, y, counts, N, E, D: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a block of y [N, F]: rows of x [N, D] times weight [E, D, F], or where TRANSPOSED [E, F, D]."""
    expert, begin, end = rows_of(counts, N, E, BLOCK_E, BLOCK_N)
    rows, columns = begin + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside, exist = rows < end, columns < F
    rows = rows.to(tl.int64)
    matrix = weight + tl.minimum(expert, E - 1).to(tl.int64) * D * F
    total = tl.zeros((BLOCK_N, BLOCK_F), dtype=tl.float32)
    # Rows of no expert take no step.
    for first in range(0, tl.where(expert < E, D, 0), BLOCK_D):
        inner = first + tl.arange(0, BLOCK_D)
        a = tl.load(x + rows[:, None] * D + inner[None], mask=inside[:, None] & (inner < D)[None], other=0.0)
        at = columns[None] * D + inner[:, None] if TRANSPOSED else inner[:, None] * F + columns[None]
        b = tl.load(matrix + at, mask=(inner < D)[:, None] & exist[None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(y + rows[:, None] * F + columns[None], total.to(y.dtype.element_ty), mask=inside[:, None] & exist[None])


@triton.jit(do_not_specialize=["N", "E"])
def outer_products_kernel(
    x, y, sums, counts, N, E, D: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store a block of sums [E, D, F]: x^T y over the rows of an expert, of x [N, D] and y [N, F]."""
    expert, number = tl.program_id(2), tl.arange(0, BLOCK_E)
    sizes, ends = segments_of(counts, N, E, BLOCK_E)
    begin = tl.sum(tl.where(number == expert, ends - sizes, 0), 0)
    end = tl.minimum(tl.sum(tl.where(number == expert, ends, 0), 0), N)
    i, j = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    total = tl.zeros((BLOCK_D, BLOCK_F), dtype=tl.float32)
    for first in range(begin, end, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        inside, rows = rows < end, rows.to(tl.int64)
        a = tl.load(x + rows[None] * D + i[:, None], mask=inside[None] & (i < D)[:, None], other=0.0)
        b = tl.load(y + rows[:, None] * F + j[None], mask=inside[:, None] & (j < F)[None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = sums + expert.to(tl.int64) * D * F + i[:, None] * F + j[None]
    tl.store(at, total.to(sums.dtype.element_ty), mask=(i < D)[:, None] & (j < F)[None])
