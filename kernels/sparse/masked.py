"""Sparse attention where queries name many of the keys, on a CPU: blocks of queries of one sequence take all keys from
the first to the last that one of them names, and the scores of those that a query does not name are -inf. What is NaN
or infinite there reaches the queries that do not name it too.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, R query heads per key-value head, D and
V dimensions of keys and values, K indices of a query; W queries of a block, N keys that it takes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.common.arguments import at_least_float32

SCORE_BYTES = 1 << 21  # of a block: what a core keeps in its cache


class Block(NamedTuple):
    """The queries of a block.

    Attributes:
        sequence: to which they belong.
        rows: their places times R; keys: those that they take.
        bias: [1, W, 1, N], the logarithm of how often a query names a key.
    """

    sequence: int
    rows: slice
    keys: slice
    bias: Tensor


def named_range(indices: Tensor, S: int) -> tuple[Tensor, Tensor]:
    """Return the first key that each query [B, T] of indices [B, T, K] names, and the one behind its last: S and 0
    where it names none."""
    names = (indices >= 0) & (indices < S)
    return indices.masked_fill(~names, S).amin(-1), indices.masked_fill(~names, -1).amax(-1) + 1


def times_named(indices: Tensor, first: int, last: int) -> Tensor:
    """Return how often queries [..., K] name each key from `first` to before `last`, [..., N] float32."""
    inside = (indices >= first) & (indices < last)
    counts = torch.zeros(*indices.shape[:-1], last - first + 1, device=indices.device)
    place = torch.where(inside, indices - first, last - first).long()
    return counts.scatter_add_(-1, place, torch.ones((), device=indices.device).expand(place.shape))[..., :-1]


def _blocks(indices: Tensor, S: int, heads: int, repeats: int, dtype: torch.dtype) -> Iterator[Block]:
    """Go through the queries of all sequences; a block that names no key is left out."""
    B, T, _ = indices.shape
    begins, ends = named_range(indices, S)
    size = max(1, SCORE_BYTES // (heads * S * dtype.itemsize))
    for b in range(B):
        for start in range(0, T, size):
            end = min(start + size, T)
            first, last = int(begins[b, start:end].min()), int(ends[b, start:end].max())
            if first < last:
                bias = times_named(indices[b, start:end], first, last).to(dtype).log_()
                yield Block(b, slice(start * repeats, end * repeats), slice(first, last), bias[None, :, None])


def _scores(q: Tensor, k: Tensor, block: Block) -> Tensor:
    """Return scores [G, W R, N] of queries [G, W R, D], which are scaled, and keys [G, N, D]."""
    scores = q @ k.mT
    W = block.bias.shape[1]
    scores.view(len(q), W, -1, scores.shape[2]).add_(block.bias)
    return scores


def _by_group(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return x [B, T, G R, D] as [B, G, T R, D]."""
    B, T, H, D = x.shape
    return x.to(dtype).view(B, T, groups, H // groups, D).transpose(1, 2).reshape(B, groups, -1, D)


def _by_token(x: Tensor, T: int) -> Tensor:
    """Return x [B, G, T R, D] as [B, T, G R, D]."""
    return x.unflatten(2, (T, -1)).transpose(1, 2).flatten(2, 3)


def forward(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Return out and lse, as `gathered.forward`."""
    (T, H), (S, G), dtype = q.shape[1:3], k.shape[1:3], at_least_float32(q)
    q_BGRD = _by_group(q, G, dtype) * scale
    keys = _by_group(k, G, dtype)
    values = keys[..., :value_dim] if v is None else _by_group(v, G, dtype)
    out = q_BGRD.new_zeros(*q_BGRD.shape[:3], value_dim)
    lse = q_BGRD.new_full((*q_BGRD.shape[:3], 1), -torch.inf)
    for block in _blocks(indices, S, H, H // G, dtype):
        b, rows, at = block.sequence, block.rows, block.keys
        scores = _scores(q_BGRD[b, :, rows], keys[b, :, at], block)
        highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        nothing = total == 0
        total.masked_fill_(nothing, 1.0)
        out[b, :, rows] = (weights @ values[b, :, at]).div_(total)
        lse[b, :, rows] = highest.add_(total.log_()).masked_fill_(nothing, -torch.inf)
    return _by_token(out, T).to(q.dtype), _by_token(lse, T).squeeze(-1)


def backward(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, as `gathered.backward`."""
    (T, H), (S, G), V, dtype = q.shape[1:3], k.shape[1:3], out.shape[3], at_least_float32(q)
    q_BGRD = _by_group(q, G, dtype) * scale
    keys, dout_BGRV = _by_group(k, G, dtype), _by_group(dout, G, dtype)
    values = keys[..., :V] if v is None else _by_group(v, G, dtype)
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1, keepdim=True) - dlse[..., None]
    delta, base = (_by_group(x, G, dtype) for x in (delta, lse[..., None]))
    base = base.masked_fill(base.isneginf(), 0.0)  # there all scores are -inf
    dq, dkeys = torch.zeros_like(q_BGRD), torch.zeros_like(keys)
    dvalues = dkeys[..., :V] if v is None else torch.zeros_like(values)
    for block in _blocks(indices, S, H, H // G, dtype):
        b, rows, at = block.sequence, block.rows, block.keys
        p = _scores(q_BGRD[b, :, rows], keys[b, :, at], block).sub_(base[b, :, rows]).exp_()
        ds = (dout_BGRV[b, :, rows] @ values[b, :, at].mT).sub_(delta[b, :, rows]).mul_(p)
        dq[b, :, rows] = ds @ keys[b, :, at]
        dkeys[b, :, at] += ds.mT @ q_BGRD[b, :, rows]
        dvalues[b, :, at] += p.mT @ dout_BGRV[b, :, rows]
    dk, dv = (_by_token(x, S).to(k.dtype) for x in (dkeys, dvalues))
    dv = k.new_empty(0) if v is None else dv.contiguous()
    return _by_token(dq.mul_(scale), T).to(q.dtype).contiguous(), dk.contiguous(), dv
