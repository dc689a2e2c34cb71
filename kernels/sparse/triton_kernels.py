"""Sparse attention in Triton. A program has a query and the heads of one group, as rows of its matrix products; it
gathers the keys of the query once for all of them. Sums are in float32.

The gradients of keys and values are summed without atomics, in one of two ways. Where queries name few of the keys, a
pair of a query and a key first gets a row of its own, summed over the heads of the group; then a program per key adds
up the rows of its pairs, which have been sorted by key. Where they name many (`ways.names_many`), a program
holds a tile of keys and goes through the queries, with how often each names each: more products, and no row of a pair.

A key has three parts of A, B and C numbers, whose blocks are powers of two. Where values are the beginning of their
keys (SHARED) they are the first part, or with the second one: of larger accumulators ptxas spills registers.

Shape letters: H heads, G key-value heads, D and V dimensions of keys and values, A, B and C of the parts of a key, S
keys of a sequence, T queries of one, K indices of a query; M heads and N keys of a block; W of a row of the gradients.
"""

import triton
import triton.language as tl

from kernels.common.tiles import product

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def heads_of(query, H, G, BLOCK_M: tl.constexpr):
    """Return the rows of the heads [M] that program (query, group, block) has among all [queries H], and a mask of
    those that exist."""
    group = H // G
    head = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    return query.to(tl.int64) * H + tl.program_id(1) * group + head, head < group


@triton.jit
def part(pointer, rows, exist, WIDTH: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return [rows, BLOCK], numbers FIRST to FIRST + SIZE of rows of WIDTH, 0 outside."""
    column = tl.arange(0, BLOCK)
    at = pointer + rows[:, None] * WIDTH + FIRST + column[None]
    return tl.load(at, mask=exist[:, None] & (column < SIZE)[None], other=0.0)


@triton.jit
def put_part(
    x, pointer, rows, exist, WIDTH: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Store x where `part` reads it."""
    column = tl.arange(0, BLOCK)
    at = pointer + rows[:, None] * WIDTH + FIRST + column[None]
    tl.store(at, x.to(pointer.dtype.element_ty), mask=exist[:, None] & (column < SIZE)[None])


@triton.jit
def last_index(indices, query, S, K, BLOCK_K: tl.constexpr):
    """Return the number of indices up to the last one that names a key."""
    j = tl.arange(0, BLOCK_K)
    index = tl.load(indices + query.to(tl.int64) * K + j, mask=j < K, other=-1)
    return tl.max(tl.where((index >= 0) & (index < S), j + 1, 0), 0)


@triton.jit
def keys_at(indices, query, start, T, S, of_sequence, of_token, of_head, K, BLOCK_N: tl.constexpr):
    """Return the rows of the keys [N] that a query names from index `start` on, and a mask of those that exist. So many
    rows lie between two sequences, tokens and heads."""
    j = start + tl.arange(0, BLOCK_N)
    index = tl.load(indices + query.to(tl.int64) * K + j, mask=j < K, other=-1)
    exist = (index >= 0) & (index < S)
    first = (query // T).to(tl.int64) * of_sequence + tl.program_id(1) * of_head
    return first + tl.where(exist, index, 0).to(tl.int64) * of_token, exist


@triton.jit(do_not_specialize=["T", "S", "of_sequence", "of_head"])
def forward_kernel(
    q, k, v, indices, out, lse, T, S, of_sequence, of_token, of_head, H, G, K, scale, SHARED: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0)
    heads, real = heads_of(query, H, G, BLOCK_M)
    qa = part(q, heads, real, D, 0, A, BLOCK_A)
    qb = part(q, heads, real, D, A, B, BLOCK_B) if B else qa
    qc = part(q, heads, real, D, A + B, C, BLOCK_C) if C else qa
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    found = tl.zeros((BLOCK_M, BLOCK_A if SHARED else BLOCK_V), tl.float32)
    more = tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
    for start in range(0, last_index(indices, query, S, K, BLOCK_K), BLOCK_N):
        rows, exist = keys_at(indices, query, start, T, S, of_sequence, of_token, of_head, K, BLOCK_N)
        ka = part(k, rows, exist, D, 0, A, BLOCK_A)
        kb = part(k, rows, exist, D, A, B, BLOCK_B) if B else ka
        scores = product(qa, tl.trans(ka), PRECISION)
        if B:
            scores += product(qb, tl.trans(kb), PRECISION)
        if C:
            scores += product(qc, tl.trans(part(k, rows, exist, D, A + B, C, BLOCK_C)), PRECISION)
        scores = tl.where(exist[None], scores * (scale * LOG2_E), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p, kept = tl.exp2(scores - base[:, None]), tl.exp2(highest - base)
        total = total * kept + tl.sum(p, 1)
        values = ka if SHARED else part(v, rows, exist, V, 0, V, BLOCK_V)
        found = found * kept[:, None] + product(p.to(values.dtype), values, PRECISION)
        if SHARED and B:
            more = more * kept[:, None] + product(p.to(kb.dtype), kb, PRECISION)
        highest = higher
    some = total > 0
    norm = tl.where(some, total, 1.0)
    if SHARED:
        put_part(found / norm[:, None], out, heads, real, V, 0, A, BLOCK_A)
        if B:
            put_part(more / norm[:, None], out, heads, real, V, A, B, BLOCK_B)
    else:
        put_part(found / norm[:, None], out, heads, real, V, 0, V, BLOCK_V)
    tl.store(lse + heads, tl.where(some, (highest + tl.log2(norm)) / LOG2_E, float("-inf")), mask=real)


@triton.jit
def row_dots(x, y):
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit(do_not_specialize=["T", "S", "of_sequence", "of_head", "first"])
def queries_gradient_kernel(
    q, k, v, indices, out, lse, dout, dlse, dq, deltas, weights, dscores, first, T, S, of_sequence, of_token, of_head,
    H, G, K, scale, SHARED: tl.constexpr, D: tl.constexpr, V: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store dq; and of the queries from `first` on, by pair, the weights and the gradients of the scores of q and k,
    both [queries, H, K], up to the last block of keys that a query names; without them deltas [B, T, H], what is taken
    from the gradient of each weight."""
    query = first + tl.program_id(0)
    heads, real = heads_of(query, H, G, BLOCK_M)
    base = tl.load(lse + heads, mask=real, other=0.0) * LOG2_E
    base = tl.where(base == float("-inf"), 0.0, base)
    dlse_of = tl.load(dlse + heads, mask=real, other=0.0)
    if SHARED:
        dfound = part(dout, heads, real, V, 0, A, BLOCK_A)
        delta = row_dots(part(out, heads, real, V, 0, A, BLOCK_A), dfound) - dlse_of
        dmore = part(dout, heads, real, V, A, B, BLOCK_B) if B else dfound
        if B:
            delta += row_dots(part(out, heads, real, V, A, B, BLOCK_B), dmore)
    else:
        dfound = part(dout, heads, real, V, 0, V, BLOCK_V)
        dmore, delta = dfound, row_dots(part(out, heads, real, V, 0, V, BLOCK_V), dfound) - dlse_of
    qa = part(q, heads, real, D, 0, A, BLOCK_A)
    qb = part(q, heads, real, D, A, B, BLOCK_B) if B else qa
    qc = part(q, heads, real, D, A + B, C, BLOCK_C) if C else qa
    dqa, dqb = tl.zeros((BLOCK_M, BLOCK_A), tl.float32), tl.zeros((BLOCK_M, BLOCK_B), tl.float32)
    dqc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    pairs, _ = heads_of(tl.program_id(0), H, G, BLOCK_M)
    for start in range(0, last_index(indices, query, S, K, BLOCK_K), BLOCK_N):
        rows, exist = keys_at(indices, query, start, T, S, of_sequence, of_token, of_head, K, BLOCK_N)
        ka = part(k, rows, exist, D, 0, A, BLOCK_A)
        kb = part(k, rows, exist, D, A, B, BLOCK_B) if B else ka
        kc = part(k, rows, exist, D, A + B, C, BLOCK_C) if C else ka
        scores = product(qa, tl.trans(ka), PRECISION)
        if B:
            scores += product(qb, tl.trans(kb), PRECISION)
        if C:
            scores += product(qc, tl.trans(kc), PRECISION)
        p = tl.where(exist[None], tl.exp2(scores * (scale * LOG2_E) - base[:, None]), 0.0)
        values = ka if SHARED else part(v, rows, exist, V, 0, V, BLOCK_V)
        dp = product(dfound, tl.trans(values), PRECISION)
        if SHARED and B:
            dp += product(dmore, tl.trans(kb), PRECISION)
        ds = (p * (dp - delta[:, None]) * scale).to(dq.dtype.element_ty)
        dqa += product(ds, ka, PRECISION)
        if B:
            dqb += product(ds, kb, PRECISION)
        if C:
            dqc += product(ds, kc, PRECISION)
        if weights is not None:
            j = start + tl.arange(0, BLOCK_N)
            at, mask = pairs[:, None] * K + j[None], real[:, None] & (j < K)[None]
            tl.store(weights + at, p.to(weights.dtype.element_ty), mask=mask)
            tl.store(dscores + at, ds, mask=mask)
    if weights is None:
        tl.store(deltas + heads, delta, mask=real)
    put_part(dqa, dq, heads, real, D, 0, A, BLOCK_A)
    if B:
        put_part(dqb, dq, heads, real, D, A, B, BLOCK_B)
    if C:
        put_part(dqc, dq, heads, real, D, A + B, C, BLOCK_C)


@triton.jit(do_not_specialize=["T", "S", "PART"])
def tiles_gradient_kernel(
    q, k, v, counts, lse, dout, deltas, sums, T, S, H, G, scale, PART, D: tl.constexpr, V: tl.constexpr,
    W: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store in sums [T / PART, B, S, G, W] what PART queries add to the gradients of a tile of keys and of its values;
    counts [B, T, S + 1]: how often a query names a key. Rows are the heads of a group of one query after the other."""
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sequence, group, heads = (tl.program_id(1) // G).to(tl.int64), tl.program_id(1) % G, H // G
    keys, exist = (sequence * S + key) * G + group, key < S
    ka, values = part(k, keys, exist, D, 0, A, BLOCK_A), part(v, keys, exist, V, 0, V, BLOCK_V)
    kb = part(k, keys, exist, D, A, B, BLOCK_B) if B else ka
    dka, dkb = tl.zeros((BLOCK_N, BLOCK_A), tl.float32), tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    begin, end = tl.program_id(2) * PART * heads, tl.minimum((tl.program_id(2) + 1) * PART, T) * heads
    for start in range(begin, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        real, query = place < end, sequence * T + place // heads
        at = counts + query[None] * (S + 1) + key[:, None]
        named = tl.load(at, mask=real[None] & exist[:, None], other=0)
        rows = query * H + group * heads + place % heads
        base = tl.load(lse + rows, mask=real, other=0.0) * LOG2_E
        base = tl.where(base == float("-inf"), 0.0, base)
        delta = tl.load(deltas + rows, mask=real, other=0.0)
        qa, dfound = part(q, rows, real, D, 0, A, BLOCK_A), part(dout, rows, real, V, 0, V, BLOCK_V)
        qb = part(q, rows, real, D, A, B, BLOCK_B) if B else qa
        scores = product(ka, tl.trans(qa), PRECISION)
        if B:
            scores += product(kb, tl.trans(qb), PRECISION)
        p = tl.where(named > 0, tl.exp2(scores * (scale * LOG2_E) - base[None]), 0.0) * named.to(tl.float32)
        dp = product(values, tl.trans(dfound), PRECISION)
        ds = tl.where(named > 0, p * (dp - delta[None]) * scale, 0.0).to(ka.dtype)
        dvalues += product(p.to(ka.dtype), dfound, PRECISION)
        dka += product(ds, qa, PRECISION)
        if B:
            dkb += product(ds, qb, PRECISION)
    sums += tl.program_id(2).to(tl.int64) * (tl.num_programs(1) // G) * S * G * W
    put_part(dka, sums, keys, exist, W, 0, A, BLOCK_A)
    if B:
        put_part(dkb, sums, keys, exist, W, A, B, BLOCK_B)
    put_part(dvalues, sums, keys, exist, W, D, V, BLOCK_V)


@triton.jit
def over_heads(
    total, by_pair, x, first, n, group, j, H, G, K, column, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return total [N, columns] plus the sums over the heads of a group of by_pair [queries, H, K] times x [queries, H,
    WIDTH], the latter of query first + n."""
    heads = H // G
    for start in range(0, heads, BLOCK_M):
        head = start + tl.arange(0, BLOCK_M)
        row, real = group * heads + head, (head < heads)[:, None]
        at = by_pair + (n.to(tl.int64) * H + row)[:, None] * K + j[None]
        weight = tl.load(at, mask=real & (j < K)[None], other=0.0)
        at = x + ((first + n).to(tl.int64) * H + row)[:, None] * WIDTH + column[None]
        total += product(tl.trans(weight), tl.load(at, mask=real & (column < WIDTH)[None], other=0.0), PRECISION)
    return total


@triton.jit(do_not_specialize=["first"])
def pairs_gradient_kernel(
    q, dout, weights, dscores, gradients, first, H, G, K, KEYS: tl.constexpr, VALUES: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store what each pair adds to the gradient of its key, of its value, or of both together, in [queries, G, K, W]:
    of the value alone in the last V numbers."""
    n, j = tl.program_id(0), tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    group, column = tl.program_id(1) % G, tl.program_id(1) // G * BLOCK_W + tl.arange(0, BLOCK_W)
    total = tl.zeros((BLOCK_N, BLOCK_W), tl.float32)
    if KEYS:
        total = over_heads(total, dscores, q, first, n, group, j, H, G, K, column, D, BLOCK_M, PRECISION)
    if VALUES:
        total = over_heads(total, weights, dout, first, n, group, j, H, G, K, column, V, BLOCK_M, PRECISION)
    at = gradients + ((n.to(tl.int64) * G + group) * K + j)[:, None] * W + (0 if KEYS else W - V) + column[None]
    tl.store(at, total.to(gradients.dtype.element_ty), mask=(j < K)[:, None] & (column < (D if KEYS else V))[None])


@triton.jit
def sums_kernel(gradients, order, begins, total, G, K, W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Add to total [keys, G, W] the gradients [queries, G, K, W] of the pairs of each key: `order` names them sorted by
    key, those of a key from begins [keys + 1] on."""
    key, group = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    begin, end = tl.load(begins + key), tl.load(begins + key + 1)
    if end > begin:
        at = total + (key.to(tl.int64) * G + group) * W + column
        added = tl.load(at, mask=column < W, other=0.0)
        for start in range(begin, end, BLOCK_N):
            place = start + tl.arange(0, BLOCK_N)
            pair = tl.load(order + place, mask=place < end, other=0)
            row = (pair // K * G + group) * K + pair % K
            mask = (place < end)[:, None] & (column < W)[None]
            x = tl.load(gradients + row[:, None] * W + column[None], mask=mask, other=0.0)
            added += tl.sum(x.to(tl.float32), 0)
        tl.store(at, added, mask=column < W)
