"""Attention through PyTorch's own kernels: scaled_dot_product_attention, and FlexAttention on a GPU.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, D key dimensions, E value dimensions.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from kernels.softmax_attention.pairs import Pairs
from kernels.softmax_attention.reference import biases

FLEX_BLOCK = 128


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, sinks: Tensor | None, slopes: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return o [B, T, H, E], arguments as in `attention`. All pairs and a causal triangle take no mask; others take
    one of [T, S], and sinks or slopes one per head. The heads of a group of one query, as in decoding, are rows of one
    product, so that their keys are read once."""
    (B, T, H, _), (_, S, G, _) = q.shape, k.shape
    plain = pairs.all or pairs.triangle
    mask = None if plain and sinks is None and slopes is None else pairs.dense(q.device)[:, None]
    if mask is not None and (sinks is not None or slopes is not None):
        bias = q.new_zeros(H, T, S) if slopes is None or places is None else -biases(slopes, places, T).to(q.dtype)
        mask = torch.where(mask, bias, -math.inf)
    if mask is not None and sinks is not None:
        # A key of zeros with the sink as its bias and no value is the softmax with one more score.
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        sinks_HT1 = sinks.to(q.dtype)[:, None, None].expand(*mask.shape[:-3], H, T, 1)
        mask = torch.cat([mask, sinks_HT1], dim=-1)
    as_rows = T == 1 and sinks is None and slopes is None
    o = F.scaled_dot_product_attention(
        q.reshape(B, G, H // G, -1) if as_rows else q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and not pairs.all,
        scale=scale,
        enable_gqa=not as_rows and G != H,
    )
    return o.reshape(B, 1, H, -1) if as_rows else o.transpose(1, 2)


def attention_flex(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, sinks: Tensor | None, slopes: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return o [B, T, H, E], arguments as in `attention`; no table of pairs is made, but one of blocks of them."""

    def with_bias(slopes: Tensor, places: Tensor):
        offset = pairs.S - pairs.T
        return lambda score, b, h, t, s: score - slopes[h] * (places[offset + t] - places[s]).abs()

    o, aux = _compiled(q.is_cuda)(
        *(x.transpose(1, 2) for x in (q, k, v)),
        score_mod=None if slopes is None or places is None else with_bias(slopes, places),
        block_mask=None if pairs.all else block_mask(pairs, q.device),
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
        return_aux=AuxRequest(lse=True),
    )
    if sinks is not None and aux.lse is not None:
        o = o * (aux.lse - sinks.to(aux.lse.dtype)[:, None]).sigmoid()[..., None].to(o.dtype)
    return o.transpose(1, 2)


@functools.cache
def _compiled(on_gpu: bool):
    """FlexAttention without the compiler makes a table of all pairs: it is for tests on a CPU."""
    return torch.compile(flex_attention) if on_gpu else flex_attention


def block_mask(pairs: Pairs, device: torch.device) -> BlockMask:
    """Return the blocks that FlexAttention reads, from the numbers of each query, on their device."""
    begins, ends = pairs.runs(device)

    def seen(b, h, t, s):
        b = b if begins.shape[1] > 1 else 0
        found = (begins[0, b, t] <= s) & (s < ends[0, b, t])
        for run in range(1, len(begins)):
            found = found | ((begins[run, b, t] <= s) & (s < ends[run, b, t]))
        return found

    first = torch.arange(0, pairs.S, FLEX_BLOCK, device=device)
    last = (first + FLEX_BLOCK).clamp(max=pairs.S)
    some = ((begins[..., None] < last) & (ends[..., None] > first) & (begins < ends)[..., None]).any(0)
    whole = ((begins[..., None] <= first) & (ends[..., None] >= last)).any(0)
    pad = -pairs.T % FLEX_BLOCK
    some, whole = (
        F.pad(x, (0, 0, 0, pad), value=filled).unflatten(1, (-1, FLEX_BLOCK))
        for x, filled in ((some, False), (whole, True))
    )
    some, whole = some.any(2), whole.all(2)
    tables = []
    for chosen in (some & ~whole, whole):
        order = chosen.int().argsort(dim=-1, descending=True, stable=True)
        tables += [chosen.sum(-1)[:, None].int(), order[:, None].int()]
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=FLEX_BLOCK, mask_mod=seen, seq_lengths=(pairs.T, pairs.S))
