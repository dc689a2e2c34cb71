"""The loss of the lightning indexer in blocks of queries, made again in the backward pass: no more in memory than what
one block makes.

A query t reads N keys: those of its range, or those picked for it. With I its index scores on them, q their softmax
and p the mean over heads of what attention gives them, the loss is sum p (log p - log q), and its gradient for I is
q - p, since p sums to one.

Shape letters: B rows of the batch, T queries, S keys, H index heads of D dimensions, A attention heads of E dimensions
on G heads of keys, R on each; C queries of a block, N keys that each of them reads.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.arguments import at_least_float32, without_autocast
from kernels.indexer.blocks import PRODUCTS, blocks_of, keys_of
from kernels.indexer.ranges import pair_count, visible_ranges
from kernels.indexer.reference import visible_pairs
from kernels.sparse.masked import named_range, times_named
from kernels.sparse.ways import names_most


class Block(NamedTuple):
    """The parts of a block of queries.

    Attributes:
        rows: its queries.
        k: the keys of the indexer, [B, N, D], or [B, C, N, D] where each query has its own.
        at: places of k in a row of the batch: a slice, or [B, C, N] int64.
        q: [B, C, H, D]; weights: [B, C, H].
        match: relu(q . k), [B, C, H, N].
        read: True [C, N] or [B, C, N] at the keys that count.
        log_q, p: [B, C, N], log q and p, where they are read; 0 elsewhere.
    """

    rows: slice
    k: Tensor
    at: slice | Tensor
    q: Tensor
    weights: Tensor
    match: Tensor
    read: Tensor
    log_q: Tensor
    p: Tensor


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """Return [B, C, N, ...] of x [B, S, ...]."""
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    return x[batch, at]


def _masks(indices: Tensor | None, k: Tensor) -> bool:
    """Return whether a block of queries takes all keys from the first to the last that one of them picked, under a
    mask, and not each query its own."""
    return indices is not None and names_most(indices, k.shape[1])


def _block(q, k, weights, query, key, indices, scale: float, block: range, keys: slice, begins, ends) -> Block:
    """Return what the queries of a block make; shapes as in `lightning_indexer_loss`."""
    dtype, exact = at_least_float32(q), at_least_float32(query)
    rows, G = slice(block.start, block.stop), key.shape[2]
    q_BCHD, w_BCH = q[:, rows].to(dtype), weights[:, rows].to(dtype)
    a_BCGRE = (query[:, rows].to(exact) * scale).unflatten(2, (G, -1))
    if indices is None or _masks(indices, k):
        at, k_N, key_N = keys, k[:, keys].to(dtype), key[:, keys].to(exact)
        if indices is None:
            read = visible_pairs(begins[rows] - keys.start, ends[rows] - keys.start, keys.stop - keys.start)
        else:
            read = times_named(indices[:, rows], keys.start, keys.stop) > 0
        match = (q_BCHD.flatten(1, 2) @ k_N.mT).unflatten(1, q_BCHD.shape[1:3])
        logits = a_BCGRE.permute(0, 2, 1, 3, 4).flatten(2, 3) @ key_N.permute(0, 2, 3, 1)
        logits = logits.unflatten(2, (len(block), -1)).movedim(2, 1)
    else:
        read, at = indices[:, rows] >= 0, indices[:, rows].clamp(min=0).long()
        k_N, key_N = _gathered(k, at).to(dtype), _gathered(key, at).to(exact)
        match = q_BCHD @ k_N.mT
        logits = a_BCGRE @ key_N.permute(0, 1, 3, 4, 2)
    match = match.relu_()
    unread = ~read
    scores = (w_BCH[:, :, None] @ match).squeeze(2).masked_fill_(unread, -torch.inf)
    of_heads = unread[..., None, None, :]
    p = logits.masked_fill_(of_heads, -torch.inf).softmax(-1).mean((2, 3)).to(dtype)
    log_q, p = (x.masked_fill_(unread, 0.0) for x in (scores.log_softmax(-1), p))
    return Block(rows, k_N, at, q_BCHD, w_BCH, match, read, log_q, p)


def _blocks(q, k, weights, query, key, indices, cu_seqlens, scale: float, causal: bool):
    """Yield what each block of queries makes."""
    (B, T, H, D), S, (A, E), G = q.shape, k.shape[1], query.shape[2:], key.shape[2]
    begins, ends = visible_ranges(T, S, causal, cu_seqlens, q)
    per_query = B * (indices.shape[2] * (H + A + D + G * E) if indices is not None else S * (H + A))
    if _masks(indices, k):
        begins_BT, ends = named_range(indices, S)
        ends = ends.amax(0)
        begins, per_query = torch.minimum(begins_BT.amin(0), ends), B * S * (H + A)
    for block in blocks_of(T, per_query, PRODUCTS):
        keys = keys_of(block, S, T, causal, begins, ends)
        yield _block(q, k, weights, query, key, indices, scale, block, keys, begins, ends)


@torch.library.custom_op("archipelago::lightning_indexer_loss", mutates_args=())
def forward(
    q: Tensor, k: Tensor, weights: Tensor, query: Tensor, key: Tensor, indices: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """Return the divergences [B, T]; shapes as in `lightning_indexer_loss`."""
    out = torch.empty(q.shape[:2], dtype=at_least_float32(q), device=q.device)
    with without_autocast(q):
        for block in _blocks(q, k, weights, query, key, indices, cu_seqlens, scale, causal):
            out[:, block.rows] = (torch.xlogy(block.p, block.p) - block.p * block.log_q).sum(-1)
    return out


@forward.register_fake
def _(q, k, weights, query, key, indices, cu_seqlens, scale, causal):
    return q.new_empty(q.shape[:2], dtype=at_least_float32(q))


@torch.library.custom_op("archipelago::lightning_indexer_loss_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, weights: Tensor, query: Tensor, key: Tensor, indices: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, causal: bool, gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and weights, in float32 or more, for that of the divergences [B, T]."""
    dtype = at_least_float32(q)
    dq, dweights = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q, weights))
    dk = torch.zeros(k.shape, dtype=dtype, device=k.device)
    with without_autocast(q):
        for block in _blocks(q, k, weights, query, key, indices, cu_seqlens, scale, causal):
            of_scores = (block.log_q.exp() - block.p) * gradient[:, block.rows, None]
            of_scores = of_scores.masked_fill_(~block.read, 0.0)
            dweights[:, block.rows] = (block.match @ of_scores[..., None]).squeeze(-1)
            of_match = (of_scores[:, :, None] * block.weights[..., None]).masked_fill_(block.match <= 0, 0.0)
            if isinstance(block.at, slice):
                dq[:, block.rows] = (of_match.flatten(1, 2) @ block.k).view_as(block.q)
                for head, q_BCD in enumerate(block.q.unbind(2)):  # one by one: a sum over all rounds twice as much
                    dk[:, block.at] += of_match[:, :, head].mT @ q_BCD
            else:
                dq[:, block.rows] = of_match @ block.k
                _add_at(dk, block.at, of_match.mT @ block.q)
    return dq, dk, dweights


def _add_at(total: Tensor, at: Tensor, x: Tensor) -> None:
    """Add x [B, C, N, D] to total [B, S, D] at the places [B, C, N], in a fixed order on any device: on a GPU index_put
    sorts, where index_add would add as it comes; on a CPU it is the other way round."""
    B, S, _ = total.shape
    flat = (at + S * torch.arange(B, device=at.device)[:, None, None]).flatten()
    if total.is_cuda:
        total.flatten(0, 1).index_put_((flat,), x.flatten(0, 2), accumulate=True)
    else:
        total.flatten(0, 1).index_add_(0, flat, x.flatten(0, 2))


@backward.register_fake
def _(q, k, weights, query, key, indices, cu_seqlens, scale, causal, gradient):
    return tuple(x.new_empty(x.shape, dtype=at_least_float32(q)) for x in (q, k, weights))


def _save(ctx, inputs, output):
    q, k, weights, query, key, indices, cu_seqlens, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, weights, query, key, indices, cu_seqlens)


def _differentiate(ctx, gradient):
    inputs = ctx.saved_tensors
    gradients = backward(*inputs, ctx.scale, ctx.causal, gradient)
    return *(d.to(x.dtype) for d, x in zip(gradients, inputs[:3], strict=True)), *(None,) * 6


forward.register_autograd(_differentiate, setup_context=_save)


def lightning_indexer_loss_flops(
    T: int, S: int, heads: int, head_dim: int, attention_heads: int, attention_dim: int, *,
    topk: int | None = None, causal: bool = True,
) -> int:  # fmt: skip
    """Return the forward FLOPs of one sequence: the products of both kinds of queries and keys, over the visible pairs
    of one document or, with topk, over as many as are picked."""
    pairs = pair_count(T, S, causal) if topk is None else T * topk
    return 2 * pairs * (heads * head_dim + attention_heads * attention_dim)


def _counted(q_shape, k_shape, query_shape, indices_shape, causal: bool, passes: int) -> int:
    """Return the FLOPs of the products of the attention, once, and those of the indexer, `passes` times."""
    (B, T, H, D), S, (A, E) = q_shape, k_shape[1], query_shape[2:]
    topk = None if indices_shape is None else indices_shape[2]
    return B * lightning_indexer_loss_flops(T, S, H * passes, D, A, E, topk=topk, causal=causal)


@register_flop_formula(torch.ops.archipelago.lightning_indexer_loss)
def _(
    q_shape, k_shape, weights_shape, query_shape, key_shape, indices_shape, cu_seqlens, scale, causal, *args, **kwargs
):
    return _counted(q_shape, k_shape, query_shape, indices_shape, causal, passes=1)


@register_flop_formula(torch.ops.archipelago.lightning_indexer_loss_backward)
def _(
    q_shape, k_shape, weights_shape, query_shape, key_shape, indices_shape, cu_seqlens, scale, causal, *args, **kwargs
):
    """Count the products again and those of the gradients of q and k."""
    return _counted(q_shape, k_shape, query_shape, indices_shape, causal, passes=3)
