"""Softmax attention: multi-head, grouped-query or multi-query."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.mixers.heads import heads_for
from archs.positions import rotary
from archs.state import KVCache
from archs.visibility import BIDIRECTIONAL, CAUSAL, Visibility


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., arXiv 2305.13245) with rotary positions and optional QK-norm.

    Args:
        width: model width.
        head_dim: dimension that heads are to have, nearly (see `heads_for`).
        queries_per_kv: query heads that share a key-value head.
        qk_norm: RMSNorm on each head's queries and keys before the rotation.
        rope_base: theta of the rotary embedding.

    Raises:
        ValueError: when the width cannot be cut into such heads.
    """

    visibilities = frozenset({CAUSAL, BIDIRECTIONAL})

    def __init__(self, width: int, *, head_dim: int, queries_per_kv: int, qk_norm: bool, rope_base: float):
        super().__init__()
        self.heads = heads_for(width, head_dim, multiple=queries_per_kv)
        self.kv_heads = self.heads // queries_per_kv
        self.head_dim = head_dim = width // self.heads
        self.rope_base = rope_base
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * head_dim, bias=False)
        self.q_norm = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.ones(head_dim)) if qk_norm else None
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        B, T, _ = x_BTD.shape
        offset = state.length if state is not None else 0
        heads = self.qkv(x_BTD).view(B, T, -1, self.head_dim)
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None:
            scale_HD = torch.cat([self.q_norm.expand(self.heads, -1), self.k_norm.expand(self.kv_heads, -1)])
            qk = F.rms_norm(qk, (self.head_dim,)) * scale_HD.to(qk.dtype)
        q, k = rotary(qk, offset, self.rope_base).split([self.heads, self.kv_heads], dim=2)
        if state is not None:
            k, v = state.append(k, v)
        mask = None
        if offset and T > 1:
            mask = torch.ones(T, offset + T, dtype=torch.bool, device=x_BTD.device).tril(offset)
        y_BHTD = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=mask,
            is_causal=visibility is CAUSAL and not offset and T > 1,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.out_proj(y_BHTD.transpose(1, 2).reshape(B, T, -1)), state

    def empty_state(self, batch: int) -> KVCache:
        weight = self.qkv.weight
        k, v = weight.new_empty(2, batch, 0, self.kv_heads, self.head_dim)
        return KVCache(k, v)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and scores and sums over the visible pairs only."""
        projections = 2 * T * (self.qkv.weight.numel() + self.out_proj.weight.numel())
        return projections + 4 * self.out_proj.in_features * visibility.pairs(T)
