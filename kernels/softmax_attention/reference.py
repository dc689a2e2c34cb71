"""Attention with a table of the pairs that are seen: the definition.

Shape letters: B sequences, T queries, S keys, H query heads in groups of R that share one of G key-value heads, D key
dimensions, E value dimensions.
"""

import math

import torch
from torch import Tensor

from kernels.softmax_attention.pairs import Pairs


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float, sinks: Tensor | None, slopes: Tensor | None,
    places: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return o [B, T, H, E], arguments as in `attention`."""
    T, H, R = *q.shape[1:3], q.shape[2] // k.shape[2]
    k_BHSD, v_BHSE = (x.repeat_interleave(R, dim=2).transpose(1, 2) for x in (k, v))
    scores_BHTS = q.transpose(1, 2) @ k_BHSD.mT * scale
    if slopes is not None and places is not None:
        scores_BHTS = scores_BHTS - biases(slopes, places, T).to(q.dtype)
    scores_BHTS = scores_BHTS.masked_fill(~pairs.dense(q.device)[:, None], -math.inf)
    if sinks is not None:
        sinks_BHT1 = sinks.to(q.dtype)[:, None, None].expand(len(q), H, T, 1)
        scores_BHTS = torch.cat([scores_BHTS, sinks_BHT1], dim=-1)
    return (scores_BHTS.softmax(-1)[..., : k.shape[1]] @ v_BHSE).transpose(1, 2)


def biases(slopes_H: Tensor, places_S: Tensor, T: int) -> Tensor:
    """Return what is taken from the scores of the last T of the tokens at these places, [H, T, S]."""
    return slopes_H[:, None, None] * (places_S[-T:, None] - places_S).abs()
