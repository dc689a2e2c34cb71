"""The lightning indexer in blocks of queries: no more of the scores in memory than those of one block.

Shape letters: B rows of the batch, T queries, S keys, H heads of D dimensions; C queries of a block.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.arguments import at_least_float32, without_autocast
from kernels.indexer.ranges import pair_count, visible_ranges

SCORES = 1 << 23  # of a block of queries on a GPU, in float32: 32 MiB, which the cache of a large one holds
PRODUCTS = 1 << 20  # numbers that a block of queries makes with all heads and keys: what caches hold


def lightning_indexer_flops(T: int, S: int, heads: int, head_dim: int, causal: bool = True) -> int:
    """Return the FLOPs of one sequence: the products of queries and keys over the visible pairs of one document."""
    return 2 * heads * head_dim * pair_count(T, S, causal)


def blocks_of(T: int, per_query: int, most: int) -> list[range]:
    """Return the queries in blocks, each of which makes about `most` numbers of `per_query` per query."""
    size = max(1, most // max(per_query, 1))
    return [range(first, min(first + size, T)) for first in range(0, T, size)]


def queries_at_once(B: int, T: int, S: int, multiple: int) -> int:
    """Return how many queries of each sequence have their scores in memory: whole tiles of queries, at least one."""
    return min(T, max(1, SCORES // (B * S * multiple)) * multiple)


def keys_of(block: range, S: int, T: int, causal: bool, begins: Tensor, ends: Tensor) -> slice:
    """Return the keys that some query of a block reads; on a GPU, that is not waited for, perhaps some more."""
    if begins.is_cpu:
        rows = slice(block.start, block.stop)
        return slice(int(begins[rows].min()), int(ends[rows].max()))
    return slice(0, S - T + block.stop if causal else S)


def select(scores: Tensor, begins: Tensor, ends: Tensor, first: int, topk: int) -> Tensor:
    """Return the picks [B, C, topk] int32 by scores [B, C, S'] of the keys from `first` on; begins, ends: [C]."""
    place = torch.arange(first, first + scores.shape[-1], device=scores.device)
    visible = (place >= begins[:, None]) & (place < ends[:, None])
    scores = scores.nan_to_num(-torch.inf, torch.inf, -torch.inf).masked_fill_(~visible, -torch.inf)
    if topk < len(place):
        least = scores.topk(topk, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        above, level = scores > least, (scores == least) & visible
        room = topk - above.sum(-1, keepdim=True)
        later = level.sum(-1, keepdim=True) - level.cumsum(-1)  # of equal scores, those behind
        picked = above | (level & (later < room))
    else:
        picked = visible.expand_as(scores)
    slots = torch.where(picked, picked.cumsum(-1) - 1, topk)
    out = torch.full((*scores.shape[:-1], topk + 1), -1, dtype=torch.int32, device=scores.device)
    return out.scatter_(-1, slots, place.int().expand_as(slots))[..., :topk]


@torch.library.custom_op("archipelago::lightning_indexer_blocks", mutates_args=())
def lightning_indexer_blocks(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool
) -> Tensor:
    """Return the picks [B, T, topk], shapes as in `lightning_indexer`."""
    (B, T, H, _), S, dtype = q.shape, k.shape[1], at_least_float32(q)
    begins, ends = visible_ranges(T, S, causal, cu_seqlens, q)
    out = torch.empty(B, T, topk, dtype=torch.int32, device=q.device)
    with without_autocast(q):
        k_BDS, weights = k.to(dtype).mT, weights.to(dtype)
        for block in blocks_of(T, B * H * S, PRODUCTS):
            rows, keys = slice(block.start, block.stop), keys_of(block, S, T, causal, begins, ends)
            match = (q[:, rows].to(dtype).flatten(1, 2) @ k_BDS[..., keys]).relu_().unflatten(1, (-1, H))
            scores = (weights[:, rows, None] @ match).squeeze(2)
            out[:, rows] = select(scores, begins[rows], ends[rows], keys.start, topk)
    return out


@lightning_indexer_blocks.register_fake
def empty_picks(q, k, weights, cu_seqlens, topk, causal) -> Tensor:
    """Return memory for picks [B, T, topk] int32, for operators that are traced."""
    return q.new_empty(*q.shape[:2], topk, dtype=torch.int32)


def count_flops(q_shape, k_shape, weights_shape, cu_seqlens, topk, causal, *args, out_shape=None, **kwargs) -> int:
    """Count as if each row were one document."""
    B, T, H, D = q_shape
    return B * lightning_indexer_flops(T, k_shape[1], H, D, causal)


register_flop_formula(torch.ops.archipelago.lightning_indexer_blocks)(count_flops)
