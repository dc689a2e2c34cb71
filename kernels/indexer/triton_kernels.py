"""The lightning indexer in Triton: scores of a block of queries, the picks by them, and rows in fp8.

The scores of R queries per sequence lie in a buffer [B, R, S] of float32, which the next block overwrites. A program of
`scores_kernel` holds a tile of keys and goes through some queries; one of `select_kernel` finds the least score picked
of one query by its bits, eight at a time from the highest (radix select), and then writes the places in rising order.

Shape letters: B rows of the batch, T queries, R of them in a block, S keys, H heads of D dimensions, K picks.
"""

import triton
import triton.language as tl


@triton.jit
def range_of(begins, ends, t, T, S, CAUSAL: tl.constexpr, PACKED: tl.constexpr):
    """Return the first key that query t may read and the one behind its last."""
    if PACKED:
        return tl.load(begins + t), tl.load(ends + t)
    else:
        return t * 0, (S - T + t + 1 if CAUSAL else S + t * 0)


@triton.jit(do_not_specialize=["first", "R", "T", "S", "of_sequence"])
def scores_kernel(
    q, k, weights, scales, scores, begins, ends, first, R, T, S, of_sequence, H: tl.constexpr, D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store scores [B, R, S] of the queries from `first` on, times the scales [B, S] of the keys where there are some;
    a tile that none of its queries may read is left as it is. of_sequence: rows between two sequences of keys, and of
    their scales."""
    key = tl.program_id(0) * BLOCK_S
    start, row = tl.program_id(1) * BLOCK_R, tl.program_id(2).to(tl.int64)
    stop = tl.minimum(start + BLOCK_R, R)
    begin, _ = range_of(begins, ends, first + start, T, S, CAUSAL, PACKED)
    _, end = range_of(begins, ends, first + stop - 1, T, S, CAUSAL, PACKED)
    if (key < end) & (key + BLOCK_S > begin):  # ranges begin and end no earlier than those before
        keys, heads, columns = key + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        at = k + (row * of_sequence + keys)[:, None] * D + columns[None]
        k_first = tl.load(at, mask=(keys < S)[:, None] & (columns < D)[None], other=0.0)
        of_keys = keys if scales is None else tl.load(scales + row * of_sequence + keys, mask=keys < S, other=0.0)
        for r in range(start, stop):
            query = row * T + first + r
            rows = q + (query * H + heads)[None] * D + columns[:, None]
            w = tl.load(weights + query * H + heads, mask=heads < H, other=0.0).to(tl.float32)
            q_first = tl.load(rows, mask=(heads < H)[None] & (columns < D)[:, None], other=0.0)
            match = tl.dot(k_first, q_first, input_precision=PRECISION)
            for d in range(BLOCK_D, D, BLOCK_D):
                k_part = tl.load(at + d, mask=(keys < S)[:, None] & (columns + d < D)[None], other=0.0)
                q_part = tl.load(rows + d, mask=(heads < H)[None] & (columns + d < D)[:, None], other=0.0)
                match = tl.dot(k_part, q_part, match, input_precision=PRECISION)
            score = tl.maximum(match, 0.0, propagate_nan=tl.PropagateNan.ALL) * w[None]
            if BLOCK_H > H:  # infinite keys times the zeros of heads that there are not
                score = tl.where((heads < H)[None], score, 0.0)
            total = tl.sum(score, 1)
            if scales is not None:
                total *= of_keys
            tl.store(scores + (row * R + r) * S + keys, total, mask=keys < S)


@triton.jit(do_not_specialize=["N"])
def quantise_kernel(
    x, weights, numbers, scales, N, LEAST: tl.constexpr, LARGEST: tl.constexpr, MANTISSA: tl.constexpr,
    EXPONENT: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the rows of x [N, D] as bits of fp8, and their scales [N], times weights [N] where there are some. By bits,
    since few GPUs cast to fp8 and the interpreter does it wrong."""
    rows, columns = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at, inside = rows[:, None] * D + columns[None], (rows < N)[:, None] & (columns < D)[None]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)  # or NaN
    ratio = tl.maximum(largest, LEAST, propagate_nan=tl.PropagateNan.ALL) * (1 / LARGEST)
    scale = ((ratio.to(tl.int32, bitcast=True) + MANTISSA) & EXPONENT).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(values, scale[:, None])
    size = tl.minimum(tl.abs(quotient), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    # Both to the nearest, ties to even: of 23 bits 3 stay, and below 2^-6 multiples of 2^-9.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512 + 8388608.0) - 8388608.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal) | ((quotient.to(tl.int32, bitcast=True) >> 24) & 0x80)
    tl.store(numbers + at, tl.where(quotient == quotient, code, 0x7F).to(tl.uint8), mask=inside)
    if weights is not None:
        scale *= tl.load(weights + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(scales + rows, scale, mask=rows < N)


@triton.jit
def ordered(scores, at, inside):
    """Return uint32 in the order of the scores there: NaN as -inf, -0 as 0."""
    x = tl.load(scores + at, mask=inside, other=0.0)
    x = tl.where(x == x, tl.where(x == 0.0, 0.0, x), float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit(do_not_specialize=["first", "R", "T", "S"])
def select_kernel(
    scores, indices, begins, ends, first, R, T, S, K, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Store indices [B, T, K] of the queries from `first` on."""
    r, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    begin, end = range_of(begins, ends, first + r, T, S, CAUSAL, PACKED)
    scores += (row * R + r) * S
    indices += (row * T + first + r) * K
    place, bins = tl.arange(0, BLOCK_S), tl.arange(0, 256)

    # The least that is picked, from its highest bits on, and how many of those equal to it are.
    least, wanted, equal = tl.full((), 0, tl.uint32), K + 0 * end, K + 0 * end
    if end - begin > K:  # else all are picked
        for digit in tl.static_range(4):
            shift = 24 - 8 * digit
            counts = tl.zeros((256,), dtype=tl.int32)
            for s in range(begin, end, BLOCK_S):
                inside = s + place < end
                x = ordered(scores, s + place, inside)
                if digit > 0:
                    inside = inside & ((x >> (shift + 8)) == (least >> (shift + 8)))
                counts += tl.histogram(((x >> shift) & 255).to(tl.int32), 256, mask=inside)
            at_least = tl.cumsum(counts, 0, reverse=True)
            found = tl.max(tl.where(at_least >= wanted, bins, 0), 0)
            wanted -= tl.sum(tl.where(bins > found, counts, 0), 0)
            equal = tl.sum(tl.where(bins == found, counts, 0), 0)
            least = least | (found.to(tl.uint32) << shift)

    written, passed = 0, wanted - equal  # of those equal, so many have yet to be passed by as it is below 0
    for s in range(begin, end, BLOCK_S):
        inside = s + place < end
        x = ordered(scores, s + place, inside)
        level = (inside & (x == least)).to(tl.int32)
        behind = passed + tl.cumsum(level, 0)
        picked = inside & ((x > least) | ((level > 0) & (behind > 0)))
        slot = written + tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(indices + slot, s + place, mask=picked)
        written += tl.sum(picked.to(tl.int32), 0)
        passed += tl.sum(level, 0)
    slots = tl.arange(0, BLOCK_K)
    for s in range(0, K, BLOCK_K):
        tl.store(indices + s + slots, tl.full((BLOCK_K,), -1, tl.int32), mask=(s + slots >= written) & (s + slots < K))
