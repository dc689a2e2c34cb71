"""Sparse attention on any device: blocks of queries gather their keys and values, and gather them again in the backward
pass, so that nothing of T x K is ever in memory but the indices.

An item is a query in the heads of one group, which read the same keys: as a matrix product, R rows against K.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, R query heads per key-value head, D and
V dimensions of keys and values, K indices of a query, I items, N items of a block, M queries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.common.arguments import at_least_float32
from kernels.sparse.rows import row_steps, rows_of, where_they_lie

# Numbers that a block gathers at most, or those of one query: on a CPU about what a core keeps in its cache.
GATHERED = 1 << 19
GATHERED_ELSEWHERE = 1 << 26


class Memory:
    """Memory for the blocks of one pass, one after the other: fresh memory for each would cost more than what is
    computed.

    Args:
        indices: [B, T, K].
        k, v: [B, S, G, D] and [B, S, G, V] with the same steps between their rows (`row_steps`), or no v where a value
            is the first `value_dim` numbers of its key.

    Attributes:
        keys, values: the tables [rows, D] and [rows, V], or no values.
    """

    def __init__(self, indices: Tensor, k: Tensor, v: Tensor | None, value_dim: int):
        (B, S, G, _), (_, T, K) = k.shape, indices.shape
        self.indices, self.shape, self.value_dim, self.made = indices.flatten(0, 1), (B, S, G, T, K), value_dim, {}
        self.steps, self.dtype = row_steps(k), at_least_float32(k)
        self.keys, self.values = rows_of(k), None if v is None else rows_of(v)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b, for [N, ..., ...]."""
        shape = (len(a), a.shape[1], b.shape[2])
        return torch.bmm(a, b, out=self._take(name, shape, a.dtype))

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
        """Go through the items: their places, the rows [N K] of the tables that they read (the first one of a sequence
        for an index of none), their keys [N, K, D] and values [N, K, V], and [N, 1, K] where an index is none."""
        (B, S, G, T, K), device = self.shape, self.indices.device
        most = GATHERED if device.type == "cpu" else GATHERED_ELSEWHERE
        queries = max(1, most // max(1, G * K * self.keys.shape[1]))
        of_sequence, of_token, of_head = self.steps
        first_B = (torch.arange(B, device=device) * of_sequence).repeat_interleave(T)
        head_G1 = (torch.arange(G, device=device) * of_head)[:, None]
        for start in range(0, B * T, queries):
            end = min(start + queries, B * T)
            index_1K = self.indices[start:end, None]
            none_1K = (index_1K < 0) | (index_1K >= S)
            rows = (index_1K.masked_fill(none_1K, 0) * of_token + first_B[start:end, None, None] + head_G1).flatten()
            keys = self._rows("keys", self.keys, rows)
            values = keys[..., : self.value_dim] if self.values is None else self._rows("values", self.values, rows)
            yield slice(start * G, end * G), rows, keys, values, none_1K.expand(-1, G, -1).flatten(0, 1)[:, None]

    def _rows(self, name: str, table: Tensor, rows: Tensor) -> Tensor:
        K = self.shape[-1]
        shape = (len(rows) // K, K, table.shape[1])
        taken = self._take(name, shape, table.dtype)
        torch.index_select(table, 0, rows, out=taken.flatten(0, 1))
        return taken if table.dtype == self.dtype else self._take(f"{name} in full", shape, self.dtype).copy_(taken)

    def _take(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
        if name not in self.made:  # the first block is the largest
            self.made[name] = self.keys.new_empty(shape, dtype=dtype)
        return self.made[name][: shape[0]]


def in_full(x: Tensor) -> Tensor:
    """Return x [B, S, G, D] in float32 or more, in which scores keep their digits, the rows of a head one after the
    other."""
    return x.permute(2, 0, 1, 3).to(at_least_float32(x)).contiguous().permute(1, 2, 0, 3)


def forward(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Return out [B, T, H, V] in the dtype of q and lse [B, T, H] in float32 or more.

    Args:
        q: [B, T, H, D].
        k: [B, S, G, D].
        v: [B, S, G, V], or None where a value is the first `value_dim` numbers of its key.
        indices: [B, T, K] int32.
        scale: factor on the scores.
        value_dim: V.
    """
    (B, T, H, _), (_, S, G, _) = q.shape, k.shape
    if k.dtype == at_least_float32(k) or T * indices.shape[2] < S:  # fewer rows are gathered than there are
        k, v = where_they_lie(k, v)
    else:
        k, v = in_full(k), None if v is None else in_full(v)
    memory = Memory(indices, k, v, value_dim)
    q_IRD = _items(q, G).to(memory.dtype) * scale
    out_IRV, lse_IR1 = q_IRD.new_empty(*q_IRD.shape[:2], value_dim), q_IRD.new_empty(*q_IRD.shape[:2], 1)
    for items, _, keys, values, none in memory.blocks():
        scores = memory.product("scores", q_IRD[items], keys.mT)
        scores.masked_fill_(none, -torch.inf)
        highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
        weights = scores.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        nothing = total == 0
        total.masked_fill_(nothing, 1.0)
        out_IRV[items] = memory.product("found", weights, values).div_(total)
        lse_IR1[items] = highest.add_(total.log_()).masked_fill_(nothing, -torch.inf)
    return out_IRV.view(B, T, H, value_dim).to(q.dtype), lse_IR1.view(B, T, H)


def backward(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v; of no v an empty one, since that of k holds its share."""
    (B, S, G, _), V = k.shape, out.shape[3]
    memory = Memory(indices, in_full(k), None if v is None else in_full(v), V)
    q_IRD, out_IRV, dout_IRV = (_items(x, G).to(memory.dtype) for x in (q, out, dout))
    q_IRD = q_IRD * scale
    lse_IR1, dlse_IR1 = (_items(x[..., None], G) for x in (lse, dlse))
    lse_IR1 = lse_IR1.masked_fill(lse_IR1.isneginf(), 0.0)  # there all scores are -inf
    delta_IR1 = (out_IRV * dout_IRV).sum(-1, keepdim=True) - dlse_IR1
    dq_IRD, dkeys = torch.empty_like(q_IRD), torch.zeros_like(memory.keys)
    dvalues = dkeys[:, :V] if memory.values is None else torch.zeros_like(memory.values)
    for items, rows, keys, values, none in memory.blocks():
        scores = memory.product("scores", q_IRD[items], keys.mT)
        p = scores.masked_fill_(none, -torch.inf).sub_(lse_IR1[items]).exp_()
        ds = memory.product("dp", dout_IRV[items], values.mT).sub_(delta_IR1[items]).mul_(p)
        dq_IRD[items] = memory.product("dq", ds, keys)
        # The gathered keys and values are done with: their gradients take their place.
        dkeys.index_add_(0, rows, memory.product("keys", ds.mT, q_IRD[items]).flatten(0, 1))
        dvalues.index_add_(0, rows, memory.product("values", p.mT, dout_IRV[items]).flatten(0, 1))
    dk, dv = (x.unflatten(0, (G, B, S)).permute(1, 2, 0, 3).to(k.dtype) for x in (dkeys, dvalues))
    dv = k.new_empty(0) if v is None else dv.contiguous()
    return dq_IRD.mul_(scale).view(q.shape).to(q.dtype), dk.contiguous(), dv


def _items(x: Tensor, kv_heads: int) -> Tensor:
    """Return x [B, T, H, ...] as [I, R, ...]."""
    B, T, H, last = x.shape
    return x.reshape(B * T * kv_heads, H // kv_heads, last)
