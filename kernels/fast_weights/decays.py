"""Decays between the tokens of a chunk, and products weighted by them, for gates of any strength.

Between tokens j < i lies e^{g_{j+1} + .. + g_i}. As a difference of two sums from the start of the chunk it would be
lost behind a strong gate, and nothing at all behind one of -inf. So a chunk is halved, its halves are halved, and so
on: for any two tokens there is one block with j in its first half and i in its second, and with

    until_j = g_{j+1} + .. up to the end of the first half        since_i = g_i + .. down to the start of the second

the decay is e^{since_i} e^{until_j}. Sums are never subtracted; where no gate is positive no exponent is; and what
belongs to token i knows no gate of a later one. The gradient of the gates goes down the same halves, so that nothing
has to cancel there either.

Shape letters: M chunks x sequences x heads, C tokens of a chunk (a power of two); D gates of a token and head, K (one
per key channel) or 1; E rows that read per token, R rows that write per token; P blocks of 2 S tokens in a chunk, S
tokens of a half.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.common.gates import vanishing_decay

SLAB = 1 << 18  # numbers of a [M, C, K] that the products of gates per channel take at once: they stay in the cache


def halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Turn [M, C, ...] into the first and the second halves of blocks, [M, P, S, ...] each, for S = size."""
    first, second = x.unflatten(1, (-1, 2, size)).unbind(2)
    return first, second


def sums_by_halves(g_MCD: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield the tokens of a half, 1, 2, 4, .. C / 2, and since and until [M, P, S, D] of each half's own tokens.

    Last come C and both sums within the whole chunk [M, C, D]. The tensors change when the next are asked for.
    """
    since, until = g_MCD.clone(), torch.zeros_like(g_MCD)
    size = 1
    while size < g_MCD.shape[1]:
        (first, second), (before, _) = halves(since, size), halves(until, size)
        yield size, second, before
        before += second[:, :, -1:]
        second += first[:, :, -1:]
        size *= 2
    yield size, since, until


def edge_decays(g_MCD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decays from the start of the chunk through each token and from each to the end, [M, C, D] both."""
    *_, (_, since, until) = sums_by_halves(g_MCD)
    return vanishing_decay(since), vanishing_decay(until)


def decays_between(g_MC1: Tensor) -> Tensor:
    """Return the decays from token j to token i [M, C, C], 1 on the diagonal and 0 above it, of one gate per head."""
    M, C, _ = g_MC1.shape
    decays = torch.eye(C, dtype=g_MC1.dtype, device=g_MC1.device).repeat(M, 1, 1)
    for size, since, until in sums_by_halves(g_MC1):
        if size < C:
            rows, columns = vanishing_decay(since), vanishing_decay(until)
            torch.mul(rows, columns.mT, out=block(decays[:, :, None, :, None], size)[:, :, :, 0, :, 0])
    return decays


def block(gram_MCECR: Tensor, size: int) -> Tensor:
    """Return the part of a weighted product [M, C, E, C, R] in which rows of a second half meet columns of its first:
    [M, P, S, E, S, R]."""
    blocks = gram_MCECR.unflatten(3, (-1, 2, size)).unflatten(1, (-1, 2, size))
    return blocks[:, :, 1, :, :, :, 0].diagonal(dim1=1, dim2=4).movedim(-1, 1)


def within_token(gram_MCECR: Tensor) -> Tensor:
    """Return the part of a weighted product in which a token meets itself, [M, C, E, R]."""
    return gram_MCECR.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def weighted_products(rows_MCEK: Tensor, keys_MCRK: Tensor, g_MCD: Tensor) -> Tensor:
    """Return the products of rows and keys over K, each channel weighted by its decay between their tokens:
    [M, C, E, C, R], 0 where the key is of a later token than the row."""
    M, C, E, K = rows_MCEK.shape
    R = keys_MCRK.shape[2]
    if g_MCD.shape[2] == 1:
        gram = (rows_MCEK.flatten(1, 2) @ keys_MCRK.flatten(1, 2).mT).view(M, C, E, C, R)
        return gram.mul_(decays_between(g_MCD)[:, :, None, :, None])
    gram = rows_MCEK.new_zeros(M, C, E, C, R)
    slab = max(1, SLAB // (C * K))
    for out, rows, keys, g in zip(*(x.split(slab) for x in (gram, rows_MCEK, keys_MCRK, g_MCD)), strict=True):
        within_token(out).copy_(rows @ keys.mT)
        for size, since, until in sums_by_halves(g):
            if size < C:
                _, reading = halves(rows, size)
                written, _ = halves(keys, size)
                reading = (reading * vanishing_decay(since)[..., None, :]).flatten(2, 3)
                written = (written * vanishing_decay(until)[..., None, :]).flatten(2, 3)
                block(out, size).copy_((reading @ written.mT).unflatten(2, (size, E)).unflatten(4, (size, R)))
    return gram


def weighted_products_backward(
    dgram: Tensor, gram: Tensor, rows: Tensor, keys: Tensor, g: Tensor, drows: Tensor, dkeys: Tensor,
    from_start: Tensor, to_end: Tensor,
) -> Tensor:  # fmt: skip
    """Add the gradients of rows and keys to `drows` and `dkeys`, and return that of the gates [M, C, D].

    Args:
        dgram: the gradient of the products, of any value where a key is of a later token; used up.
        gram: the products.
        rows, keys, g: the arguments of `weighted_products`.
        drows, dkeys: shaped as rows and keys.
        from_start, to_end: [M, C, D], what each token hands to the gates of the chunk up to its own and to those
            after its own; used up.
    """
    if g.shape[2] == 1:
        pairs = (dgram * gram).sum((2, 4))
        for size in _sizes_downwards(g.shape[1]):
            between = block(pairs[:, :, None, :, None], size)[:, :, :, 0, :, 0]
            _hand_down(from_start, to_end, size, between.sum(3)[..., None], between.sum(2)[..., None])
        weighted = dgram.mul_(decays_between(g)[:, :, None, :, None]).flatten(3).flatten(1, 2)
        drows.flatten(1, 2).baddbmm_(weighted, keys.flatten(1, 2))
        dkeys.flatten(1, 2).baddbmm_(weighted.mT, rows.flatten(1, 2))
        return from_start
    slab = max(1, SLAB // (g.shape[1] * g.shape[2]))
    for part in zip(*(x.split(slab) for x in (dgram, rows, keys, g, drows, dkeys, from_start, to_end)), strict=True):
        _per_channel_backward(*part)
    return from_start


def _per_channel_backward(dgram, rows, keys, g, drows, dkeys, from_start, to_end) -> None:
    (_, C, E, _), R = rows.shape, keys.shape[2]
    same = within_token(dgram)
    for r in range(R):  # a product of matrices this small is slower
        drows.addcmul_(same[..., r, None], keys[:, :, r, None])
        dkeys[:, :, r] += (same[..., r, None] * rows).sum(2)
    decays = {
        size: (vanishing_decay(since), vanishing_decay(until)) for size, since, until in sums_by_halves(g) if size < C
    }
    for size in _sizes_downwards(C):
        since, until = (x[..., None, :] for x in decays.pop(size))
        reading, written = halves(rows, size)[1] * since, halves(keys, size)[0] * until
        weights = block(dgram, size).flatten(4).flatten(2, 3)
        dreading = (weights @ written.flatten(2, 3)).unflatten(2, (size, E))
        dwritten = (weights.mT @ reading.flatten(2, 3)).unflatten(2, (size, R))
        halves(drows, size)[1].addcmul_(dreading, since)
        halves(dkeys, size)[0].addcmul_(dwritten, until)
        _hand_down(from_start, to_end, size, _sum(reading.mul_(dreading)), _sum(written.mul_(dwritten)))


def _sum(x: Tensor) -> Tensor:
    """Sum [M, P, S, E, D] over E, for which one addition after the other is faster."""
    first, *others = x.unbind(3)
    for other in others:
        first += other
    return first


def _sizes_downwards(C: int) -> Iterator[int]:
    while C > 1:
        C //= 2
        yield C


def _hand_down(from_start: Tensor, to_end: Tensor, size: int, since: Tensor, until: Tensor) -> None:
    """Go from blocks to their halves.

    A token's `from_start` counts for all gates of its block up to its own, its `to_end` for those after its own. What
    counts for the whole of another half is handed to the last token of that half, which counts for all of it; then
    come the shares of the pairs across the halves, `since` and `until` [M, P, S, D].
    """
    (first, second), (before, _) = halves(from_start, size), halves(to_end, size)
    first[:, :, -1] += second.sum(2)
    second[:, :, -1] += before.sum(2)
    second += since
    before += until
