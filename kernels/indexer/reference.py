"""The lightning indexer and its loss with all pairs in memory: the definition.

Shape letters: B rows of the batch, T queries, S keys, H index heads, A attention heads, K picked keys.
"""

import torch
from torch import Tensor

from kernels.common.arguments import at_least_float32, without_autocast


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Return sum_h weights[t, h] relu(q[t, h] . k[s]), [B, T, S] in float32, or float64 for float64 inputs."""
    dtype = at_least_float32(q)
    with without_autocast(q):
        match_BTHS = torch.einsum("bthd,bsd->bths", q.to(dtype), k.to(dtype)).relu()
        return (match_BTHS * weights.to(dtype)[..., None]).sum(2)


def visible_pairs(begins: Tensor, ends: Tensor, S: int) -> Tensor:
    """Return True [T, S] at the pairs in the ranges [T]."""
    place = torch.arange(S, device=begins.device)
    return (place >= begins[:, None]) & (place < ends[:, None])


def lightning_indexer_reference(
    q: Tensor, k: Tensor, weights: Tensor, begins: Tensor, ends: Tensor, topk: int
) -> Tensor:
    """Return the picks [B, T, topk] as `lightning_indexer` does, by two stable sorts: latest first, then by score, then
    visible before not."""
    S = k.shape[1]
    scores = index_scores(q, k, weights).nan_to_num(-torch.inf, torch.inf, -torch.inf).flip(-1)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    visible = visible_pairs(begins, ends, S).flip(-1).expand_as(scores).gather(-1, order)
    order = order.gather(-1, visible.byte().sort(dim=-1, descending=True, stable=True).indices)[..., :topk]
    room = torch.arange(order.shape[-1], device=q.device) < visible.sum(-1, keepdim=True)
    picked = torch.where(room, S - 1 - order, S).sort(dim=-1).values
    picked = torch.where(picked == S, -1, picked).int()
    return torch.nn.functional.pad(picked, (0, topk - picked.shape[-1]), value=-1)


def lightning_indexer_loss_reference(
    q: Tensor, k: Tensor, weights: Tensor, query: Tensor, key: Tensor, scale: float, indices: Tensor | None,
    begins: Tensor, ends: Tensor,
) -> Tensor:  # fmt: skip
    """Return the divergences [B, T] as `lightning_indexer_loss` does."""
    scores_BTS = index_scores(q, k, weights)
    B, T, S = scores_BTS.shape
    read_BTS = visible_pairs(begins, ends, S).expand(B, T, S)
    if indices is not None:
        # What is picked counts once; -1 goes to a column behind the last.
        picked = torch.zeros(B, T, S + 1, dtype=torch.bool, device=q.device)
        read_BTS = picked.scatter_(2, torch.where(indices < 0, S, indices).long(), True)[..., :S]
    with torch.no_grad(), without_autocast(q):
        query, key = query.to(at_least_float32(query)), key.to(at_least_float32(key))
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        logits_BATS = torch.einsum("btad,bsad->bats", query * scale, key)
        p_BATS = logits_BATS.masked_fill(~read_BTS[:, None], -torch.inf).softmax(-1)
        p_BTS = p_BATS.mean(1).masked_fill(~read_BTS, 0.0).to(scores_BTS.dtype)
    log_q = scores_BTS.masked_fill(~read_BTS, -torch.inf).log_softmax(-1).masked_fill(~read_BTS, 0.0)
    return (torch.xlogy(p_BTS, p_BTS) - p_BTS * log_q).sum(-1)
