"""Attention over the keys that each query names, by its definition: gather them, then softmax.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, R query heads per key-value head, D and
V dimensions of keys and values, K indices of a query.
"""

import torch
from torch import Tensor

from kernels.common.arguments import at_least_float32


def sparse_attention_reference(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out and lse, shapes as in `sparse_attention`; products in the dtype of q, the softmax in float32 or
    more."""
    (B, S, G), real_BTK = k.shape[:3], (indices >= 0) & (indices < k.shape[1])
    row_BTK = torch.where(real_BTK, indices, 0).long() + S * torch.arange(B, device=q.device)[:, None, None]
    q_BTGRD = q.unflatten(2, (G, -1))
    k_BTKGD, v_BTKGV = (x.flatten(0, 1)[row_BTK] for x in (k, v))
    scores = torch.einsum("btgrd,btkgd->btgrk", q_BTGRD, k_BTKGD).to(at_least_float32(q)) * scale
    scores = scores.masked_fill(~real_BTK[:, :, None, None], -torch.inf)
    highest = scores.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    nothing = total == 0  # no index at all
    total = total.masked_fill(nothing, 1.0)
    out = torch.einsum("btgrk,btkgv->btgrv", (weights / total).to(v.dtype), v_BTKGV)
    lse = (highest + total.log()).masked_fill(nothing, -torch.inf)
    return out.flatten(2, 3), lse[..., 0].flatten(2)
