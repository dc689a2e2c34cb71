"""Softmax attention in the forms that transformers since GPT-2 have taken, each an option of one mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.mixers.heads import heads_for
from archs.positions import Alibi, Rotary
from archs.state import KVCache
from archs.visibility import BIDIRECTIONAL, CAUSAL, BlockCausal, Visibility


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query attention (Ainslie et al., arXiv 2305.13245).

    Args:
        width: model width.
        head_dim: dimension of a head; where `heads` is None, nearly (see `heads_for`).
        queries_per_kv: query heads that share a key-value head.
        position: Rotary, Alibi or None (the model then has learned positions, or a mixer that knows the order).
        heads: number of query heads, or None for as many as fill the width.
        qk_norm: RMSNorm on queries and keys before the rotation: "head" (each head by itself, as in Qwen3), "all" (all
            heads of a token together, as in OLMo 2) or None.
        bias: whether the projections have biases.
        window: tokens that a query sees under causal visibility, itself included; under bidirectional visibility as
            many to either side. None: all of them.
        sinks: one learned score a head that takes part in the softmax and carries no value (gpt-oss).
        gate: the output is multiplied by the sigmoid of a projection of x before the output projection (Qiu et al.,
            arXiv 2505.06708; Qwen3-Next).
        scale: factor on the scores; None for head_dim ** -0.5.
        norm_eps: of the QK-norm.

    Raises:
        ValueError: when the width cannot be cut into such heads, or an option is not one of those above.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int,
        queries_per_kv: int,
        position: Rotary | Alibi | None,
        heads: int | None = None,
        qk_norm: str | None = None,
        bias: bool = False,
        window: int | None = None,
        sinks: bool = False,
        gate: bool = False,
        scale: float | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if qk_norm not in (None, "head", "all"):
            raise ValueError(f"qk_norm={qk_norm!r} must be 'head', 'all' or null")
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1 token, or null for all")
        if heads is None:
            heads = heads_for(width, head_dim, multiple=queries_per_kv)
            head_dim = width // heads
        if heads % queries_per_kv:
            raise ValueError(f"{heads} heads are not a multiple of queries_per_kv={queries_per_kv}")
        self.heads, self.kv_heads, self.head_dim = heads, heads // queries_per_kv, head_dim
        self.position, self.window, self.norm_eps = position, window, norm_eps
        self.scale = head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * head_dim, bias=bias)
        self.gate = nn.Linear(width, heads * head_dim, bias=bias) if gate else None
        self.per_head = qk_norm != "all"
        sizes = (head_dim, head_dim) if self.per_head else (heads * head_dim, self.kv_heads * head_dim)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(n)) if qk_norm else None for n in sizes)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None
        self.out_proj = nn.Linear(heads * head_dim, width, bias=bias)

    @property
    def visibilities(self) -> frozenset[Visibility]:
        """Blocks of two copies have no window, whose cache could not take a block back."""
        return frozenset(Visibility if self.window is None else {CAUSAL, BIDIRECTIONAL})

    def forward(
        self, x_BTD: Tensor, visibility: Visibility | BlockCausal, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it and sees them all; of its own tokens one sees
        those before it, or under bidirectional visibility all."""
        q, k, v = self.project(x_BTD, state.length if state is not None else 0, visibility.copies)
        if state is not None:
            k, v = state.append(k, v)
        return self.output(self.attend(q, k, v, visibility), x_BTD), state

    def project(self, x_BTD: Tensor, offset: int, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, heads, D] and k, v [B, T, KV heads, D], normalised and turned; x starts at position `offset`."""
        heads = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None:
            qk = self._normalise(qk)
        if isinstance(self.position, Rotary):
            qk = self.position(qk, offset, copies)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        return q, k, v

    def _normalise(self, qk: Tensor) -> Tensor:
        if self.per_head:
            scale_HD = torch.cat([self.q_norm.expand(self.heads, -1), self.k_norm.expand(self.kv_heads, -1)])
            return F.rms_norm(qk, (self.head_dim,), eps=self.norm_eps) * scale_HD.to(qk.dtype)
        q, k = (x.flatten(2) for x in qk.split([self.heads, self.kv_heads], dim=2))
        q, k = (F.rms_norm(x, w.shape, w.to(x.dtype), self.norm_eps) for x, w in ((q, self.q_norm), (k, self.k_norm)))
        return torch.cat([q, k], dim=-1).unflatten(-1, (-1, self.head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visibility: Visibility | BlockCausal) -> Tensor:
        """y [B, T, heads, D] of q [B, T, heads, D] over k, v [B, S, KV heads, D], of which the last T are q's own."""
        T, S = q.shape[1], k.shape[1]
        causal = visibility is CAUSAL
        windowed = self.window is not None and self.window < S
        grouped = self.kv_heads != self.heads
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if windowed and causal and T == S and self.sinks is None and not isinstance(self.position, Alibi):
            return self._banded(q, k, v).transpose(1, 2)
        mask = None
        blocks = visibility.copies > 1
        plain = self.sinks is None and not (windowed or blocks) and not isinstance(self.position, Alibi)
        if not plain or (causal and T not in (1, S)):
            mask = self._mask(T, S, visibility, q.dtype, q.device)
        if self.sinks is not None:
            # A key of zeros with the sink as its bias and no value is the softmax with one more score.
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
            sinks_HT1 = self.sinks.to(q.dtype)[:, None, None].expand(-1, T, 1)
            mask = torch.cat([mask.expand(self.heads, -1, -1), sinks_HT1], dim=-1)
        y_BHTD = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if mask is None else mask[None] if mask.dim() == 3 else mask,
            is_causal=causal and mask is None and T > 1,
            scale=self.scale,
            enable_gqa=grouped,
        )
        return y_BHTD.transpose(1, 2)

    def _mask(
        self, T: int, S: int, visibility: Visibility | BlockCausal, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Visible pairs as booleans [T, S], or as additive biases where sinks or Alibi need them."""
        position_S = torch.arange(S, device=device) % (S // visibility.copies)
        distance_TS = position_S[S - T :, None] - position_S
        if visibility.copies > 1:
            visible_TS = visibility.visible(T, device)
        else:
            visible_TS = distance_TS >= 0 if visibility is CAUSAL else torch.ones_like(distance_TS, dtype=torch.bool)
        if self.window is not None:
            visible_TS = visible_TS & (distance_TS.abs() < self.window)
        if isinstance(self.position, Alibi):
            return self.position.bias(distance_TS, self.heads).to(dtype).masked_fill(~visible_TS, -torch.inf)
        if self.sinks is not None:
            return torch.zeros_like(distance_TS, dtype=dtype).masked_fill(~visible_TS, -torch.inf)
        return visible_TS

    def _banded(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal window attention of [B, H, T, D] in blocks of one window: each block of queries reads its own block of
        keys and the one before, so time and memory grow with T x window and not with T^2."""
        T, w = q.shape[2], self.window
        pad = -T % w
        q = F.pad(q, (0, 0, 0, pad)).unflatten(2, (-1, w)).transpose(1, 2)
        k, v = (F.pad(x, (0, 0, w, pad)).unfold(2, 2 * w, w).transpose(1, 2).mT for x in (k, v))
        blocks = q.shape[1]
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)
        band = (j > i) & (j <= i + w)
        # The block before the first one is padding.
        real = (torch.arange(blocks, device=q.device)[:, None, None] > 0) | (j >= w)
        mask = (band & real).repeat(q.shape[0], 1, 1)[:, None]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=self.kv_heads != self.heads
        )
        return y.unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]

    def output(self, y_BTHD: Tensor, x_BTD: Tensor) -> Tensor:
        """What the heads found [B, T, heads, D] -> [B, T, width]; x is the mixer's input, which the gate reads."""
        y = y_BTHD.flatten(2)
        if self.gate is not None:
            y = y * self.gate(x_BTD).sigmoid()
        return self.out_proj(y)

    def empty_state(self, batch: int) -> KVCache:
        weight = self.qkv.weight
        k, v = weight.new_empty(2, batch, 0, self.kv_heads, self.head_dim)
        return KVCache(k, v, self.window)

    def flops(self, T: int, visibility: Visibility | BlockCausal) -> int:
        """Forward FLOPs of one sequence: projections, and scores and sums over the visible pairs only. (What runs
        computes unseen pairs too: the upper triangle where no fused kernel skips it, the rest of a band's blocks.)"""
        weights = sum(layer.weight.numel() for layer in (self.qkv, self.gate, self.out_proj) if layer is not None)
        sinks = T if self.sinks is not None else 0
        return 2 * T * weights + self.pair_flops * (visibility.pairs(T, self.window) + sinks)

    @property
    def pair_flops(self) -> int:
        """Forward FLOPs of the score and the sum of one (query, key) pair in all heads."""
        return 4 * self.heads * self.head_dim
