"""Attention in rows of blocks, forward and backward: a block of queries reads the keys that one of them sees, and no
others, through batched matrix products.

With s = scale q k^T + biases, p = softmax(s) and o = p v; for the gradients

    dp = do v^T    ds = p (dp - sum p dp)    dq = scale ds k    dk = scale ds^T q    dv = p^T do

p is computed again from q and k in the backward pass, or kept where it is small (`KEPT_BYTES`). Products are in the
dtype given, softmax and sums over blocks in float32 at least. The operator is ours so that torch.compile does not look
inside: which keys are read depends on numbers.

Shape letters: B sequences, T queries, S keys, H query heads in groups of R that share one of G key-value heads, D key
dimensions, E value dimensions; M of the B G key-value heads, W tokens of a block of queries, N of the keys that they
read.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.arguments import at_least_float32, without_autocast
from kernels.softmax_attention.pairs import Block, Pairs, blocks_of

SHORT, SHORT_BLOCK, BLOCK = 256, 64, 128  # up to so many tokens blocks are small, so that little of them is unseen
SCORE_BYTES = 2**21  # of the scores that are worked on at once: what a core's cache holds
KEPT_BYTES = 2**26  # of the probabilities of a call


def block_for(T: int) -> int:
    """Return the queries of a block."""
    return SHORT_BLOCK if T <= SHORT else BLOCK


def kept_numbers(pairs: Pairs, rows: int) -> int:
    """Return how many probabilities `rows` query heads of all sequences have, those of unseen pairs within blocks too;
    0 where only numbers per query say it."""
    if pairs.begins is not None:
        return 0
    return rows * sum((block.end - block.begin) * block.keys for block in blocks_of(pairs, block_for(pairs.T))[0])


def _row_major(x: Tensor, groups: int) -> Tensor:
    """Turn [B, T, G R, D] into [B G, T R, D] in its own memory."""
    B, T, H, D = x.shape
    return x.unflatten(2, (groups, -1)).transpose(1, 2).reshape(B * groups, T * (H // groups), D).contiguous()


def _heads(x: Tensor, B: int, T: int) -> Tensor:
    """Turn [B G, T R, D] into [B, T, G R, D] in its own memory."""
    return x.view(B, -1, T, x.shape[1] // T, x.shape[2]).transpose(1, 2).flatten(2, 3).contiguous()


class _Rows:
    """The blocks of one call, and the probabilities of each."""

    def __init__(self, q, k, v, begins, ends, sinks, slopes, places, scale: float, causal: bool, window: int):
        (self.B, self.T, self.H, _), (S, self.G) = q.shape, k.shape[1:3]
        self.repeats, self.scale, self.sinks, self.slopes, self.places = self.H // self.G, scale, sinks, slopes, places
        self.pairs = Pairs(self.T, S, causal, window or None, begins, ends)
        self.begins, self.ends = self.pairs.runs(q.device)
        self.q, self.k, self.v = _row_major(q * scale, self.G), _row_major(k, self.G), _row_major(v, self.G)

    def blocks(self) -> Iterator[tuple[slice, int, Block]]:
        """Go through heads of `q`, the sequence whose numbers they follow, and the block of queries."""
        W = block_for(self.T)
        plans = blocks_of(self.pairs, W)
        heads = self.B * self.G // len(plans)
        largest = max((block.keys for plan in plans for block in plan), default=1)
        size = max(1, SCORE_BYTES // (W * self.repeats * largest * self.q.element_size()))
        for b, plan in enumerate(plans):
            for first in range(b * heads, (b + 1) * heads, size):
                for block in plan:
                    yield slice(first, min(first + size, (b + 1) * heads)), b, block

    def rows(self, block: Block) -> slice:
        return slice(block.begin * self.repeats, block.end * self.repeats)

    def read(self, x: Tensor, heads: slice, block: Block) -> Tensor:
        """Return the keys or values [M, N, D] that a block reads."""
        parts = [x[heads, stretch.begin : stretch.end] for _, stretch in block.stretches]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add(self, total: Tensor, x: Tensor, heads: slice, block: Block) -> None:
        """Add x [M, N, D] to what the keys or values that a block reads have in `total`."""
        for (_, stretch), part in zip(block.stretches, x.split(_widths(block), dim=1), strict=True):
            total[heads, stretch.begin : stretch.end] += part

    def probabilities(
        self, q: Tensor, k: Tensor, heads: slice, b: int, block: Block, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return p [M, W R, N], in `out` where it is given, and where there are sinks theirs [M, W R, 1]."""
        scores = q @ k.mT
        if self.sinks is None and self.slopes is None:
            self._hide(scores, b, block)
            return torch.softmax(scores, -1, out=out), None
        exact = scores.to(at_least_float32(scores))
        M, (W, R) = len(exact), (block.end - block.begin, self.repeats)
        if self.slopes is not None:
            at = self.places[-self.T :][block.begin : block.end, None]
            keys = torch.cat([self.places[stretch.begin : stretch.end] for _, stretch in block.stretches])
            biases = self._of_heads(self.slopes, heads, exact)[:, None] * (at - keys).abs()[:, None]
            exact = (exact.view(M, W, R, -1) - biases).flatten(1, 2)
        self._hide(exact, b, block)
        if self.sinks is None:
            return exact.softmax(-1).to(q.dtype), None
        sinks = self._of_heads(self.sinks, heads, exact)[:, None].expand(M, W, R, 1).flatten(1, 2)
        p, p_sinks = torch.cat([exact, sinks], dim=-1).softmax(-1).split([exact.shape[-1], 1], dim=-1)
        return p.to(q.dtype), p_sinks

    def _of_heads(self, numbers_H: Tensor, heads: slice, like: Tensor) -> Tensor:
        """Return a number per query head as [M, R, 1]."""
        return numbers_H.to(like.dtype).view(self.G, -1, 1).repeat(self.B, 1, 1)[heads]

    def _hide(self, scores: Tensor, b: int, block: Block) -> None:
        """Make the scores [M, W R, N] of unseen pairs -inf, in place."""
        scores, first = scores.view(len(scores), -1, self.repeats, scores.shape[-1]), 0
        for run, stretch in block.stretches:
            begins, ends = (x[run, b, block.begin : block.end, None] for x in (self.begins, self.ends))
            for begin, end in ((stretch.begin, stretch.full), (stretch.ragged, stretch.end)):
                if begin < end:
                    keys = torch.arange(begin, end, device=scores.device)
                    unseen = (keys < begins) | (keys >= ends)
                    at = first - stretch.begin
                    scores[..., at + begin : at + end].masked_fill_(unseen[:, None], -math.inf)
            first += stretch.end - stretch.begin


def _widths(block: Block) -> list[int]:
    return [stretch.end - stretch.begin for _, stretch in block.stretches]


@torch.library.custom_op("archipelago::attention_block_rows", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    slopes: Tensor | None, places: Tensor | None, scale: float, causal: bool, window: int, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return o [B, T, H, E], and p of all blocks one after the other, or nothing. Arguments as in `attention`; a window
    of 0 is none."""
    with without_autocast(q):
        rows = _Rows(q, k, v, begins, ends, sinks, slopes, places, scale, causal, window)
        o = q.new_empty(*rows.q.shape[:2], v.shape[-1])
        kept, place = q.new_empty(kept_numbers(rows.pairs, len(rows.q) * rows.repeats) if keep else 0), 0
        for heads, b, block in rows.blocks():
            at, out = rows.rows(block), None
            q_, k_ = rows.q[heads, at], rows.read(rows.k, heads, block)
            if keep:
                shape = len(q_), q_.shape[1], k_.shape[1]
                out = kept[place : place + math.prod(shape)].view(shape)
                place += out.numel()
            p, _ = rows.probabilities(q_, k_, heads, b, block, out)
            torch.bmm(p, rows.read(rows.v, heads, block), out=o[heads, at])
        return _heads(o, rows.B, rows.T), kept


@forward.register_fake
def _(q, k, v, begins, ends, sinks, slopes, places, scale, causal, window, keep):
    numbers = kept_numbers(_pairs(q, k, begins, ends, causal, window), q.shape[0] * q.shape[2]) if keep else 0
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(numbers)


def _pairs(q: Tensor, k: Tensor, begins: Tensor | None, ends: Tensor | None, causal: bool, window: int) -> Pairs:
    return Pairs(q.shape[1], k.shape[1], causal, window or None, begins, ends)


@torch.library.custom_op("archipelago::attention_block_rows_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, ends: Tensor | None, sinks: Tensor | None,
    slopes: Tensor | None, places: Tensor | None, kept: Tensor, do: Tensor, scale: float, causal: bool, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k, v and of the sinks (nothing without them)."""
    with without_autocast(q):
        rows = _Rows(q, k, v, begins, ends, sinks, slopes, places, scale, causal, window)
        do = _row_major(do, rows.G)
        dq, single = torch.empty_like(rows.q), at_least_float32(q)
        dk, dv = (torch.zeros_like(x, dtype=single) for x in (rows.k, rows.v))
        dsinks = q.new_zeros(0 if sinks is None else (rows.B * rows.G, rows.repeats), dtype=single)
        place = 0
        for heads, b, block in rows.blocks():
            at = rows.rows(block)
            q_, k_, do_ = rows.q[heads, at], rows.read(rows.k, heads, block), do[heads, at]
            p_sinks = None
            if len(kept):
                shape = len(q_), q_.shape[1], k_.shape[1]
                p = kept[place : place + math.prod(shape)].view(shape)
                place += p.numel()
            else:
                p, p_sinks = rows.probabilities(q_, k_, heads, b, block)
            rows.add(dv, p.mT @ do_, heads, block)
            dp = do_ @ rows.read(rows.v, heads, block).mT
            if p_sinks is not None:
                moved = p_sinks * (p * dp).sum(-1, keepdim=True, dtype=single)
                dsinks[heads] -= moved.view(len(p), -1, rows.repeats).sum(1)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, k_, out=dq[heads, at])
            rows.add(dk, ds.mT @ q_, heads, block)
        dsinks = dsinks.view(rows.B, -1).sum(0) if sinks is not None else dsinks
        gradients = (x.to(q.dtype) for x in (dq.mul_(scale), dk, dv))
        lengths = rows.T, k.shape[1], k.shape[1]
        dq, dk, dv = (_heads(x, rows.B, length) for x, length in zip(gradients, lengths, strict=True))
        return dq, dk, dv, dsinks


@backward.register_fake
def _(q, k, v, begins, ends, sinks, slopes, places, kept, do, scale, causal, window):
    dsinks = q.new_empty(0 if sinks is None else len(sinks), dtype=at_least_float32(q))
    return *(x.new_empty(x.shape) for x in (q, k, v)), dsinks


def _save(ctx, inputs, output):
    *tensors, ctx.scale, ctx.causal, ctx.window, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # or autograd makes zeros of the size of p


def _differentiate(ctx, do, _):
    *tensors, kept = ctx.saved_tensors
    sinks = tensors[5]
    dq, dk, dv, dsinks = backward(*tensors, kept, do, ctx.scale, ctx.causal, ctx.window)
    return dq, dk, dv, None, None, None if sinks is None else dsinks.to(sinks.dtype), *[None] * 6


forward.register_autograd(_differentiate, setup_context=_save)


def attention_flops(pairs: int, heads: int, D: int, E: int) -> int:
    """Return the forward FLOPs of so many pairs of query and key: 2 D of each score and 2 E of each sum."""
    return 2 * pairs * heads * (D + E)


@register_flop_formula(torch.ops.archipelago.attention_block_rows)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Count all pairs, seen or not, as PyTorch counts its own attention: fewer are computed."""
    B, T, H, D = q_shape
    return B * attention_flops(T * k_shape[1], H, D, v_shape[-1])


@register_flop_formula(torch.ops.archipelago.attention_block_rows_backward)
def _(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Count the gradients, without the scores that are computed again."""
    B, T, H, D = q_shape
    return 2 * B * attention_flops(T * k_shape[1], H, D, v_shape[-1])
