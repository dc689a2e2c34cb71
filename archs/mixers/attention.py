"""Softmax attention in the forms that transformers since GPT-2 have taken, each an option of one mixer.

Shape letters: B sequences, T tokens, D model width, H query heads, G key-value heads, R query heads
per key-value head, E dimensions of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.contracts import Mixer
from archs.mixers.heads import cut_heads
from archs.mixers.softmax import attend, in_attention, largest_logits, positions_of
from archs.positions import Alibi, Positions, Rotary
from archs.state import KVCache
from archs.visibility import Kind, Visibility


class Attention(Mixer[KVCache]):
    """Multi-head, grouped-query or multi-query attention (Ainslie et al., arXiv 2305.13245).

    Args:
        width: model width.
        head_dim: dimension of a head; where `heads` is None, nearly (see `cut_heads`).
        queries_per_kv: query heads that share a key-value head.
        position: Rotary, Alibi or None (the model then has learned positions, or a mixer that knows the order).
        heads: number of query heads, or None for as many as fill the width with heads of head_dim.
        qk_norm: RMSNorm on queries and keys before the rotation: "head" (each head by itself, as in Qwen3), "all" (all
            heads of a token together, as in OLMo 2) or None.
        bias: whether the projections have biases.
        window: tokens that a query sees under causal visibility, itself included; under bidirectional visibility as
            many to either side. None: all of them.
        sinks: one learned score per head, which takes part in the softmax and carries no value (gpt-oss).
        gate: the output is multiplied by the sigmoid of a projection of x before the output projection (Qiu et al.,
            arXiv 2505.06708; Qwen3-Next).
        scale: factor on the scores; None for head_dim ** -0.5.
        norm_eps: of the QK-norm.

    Attributes:
        largest_H: the largest logit of each head in the training forwards since `watch_logits`, biases by distance left
            out; None where nobody asked.

    Raises:
        ValueError: when the width cannot be cut into such heads, or an option is not one of those above.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int | None,
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
        heads, head_dim = cut_heads(width, heads, head_dim, multiple=queries_per_kv)
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
        self.largest_H: Tensor | None = None  # no buffer, since it is not of the weights

    @property
    def visibilities(self) -> frozenset[Kind]:
        """Blocks of two copies have no window."""
        return frozenset(Kind) if self.window is None else frozenset({Kind.CAUSAL, Kind.BIDIRECTIONAL})

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: KVCache | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """Mix x; see `Mixer`."""
        q, k, v = self.project(x_BTD, positions_of(x_BTD, visibility, state))
        if state is not None:
            k, v, state = state.append(in_attention(k), in_attention(v))
        if self.largest_H is not None and self.training and torch.is_grad_enabled():
            found_H = largest_logits(q, k, visibility, scale=self.scale, window=self.window)
            self.largest_H = torch.maximum(self.largest_H.to(found_H), found_H)
        y_BTHE = attend(
            q,
            k,
            v,
            visibility,
            scale=self.scale,
            window=self.window,
            alibi=self.position if isinstance(self.position, Alibi) else None,
            sinks_H=self.sinks,
        )
        return self.output(y_BTHE, x_BTD), state

    def project(self, x_BTD: Tensor, position: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, E] and k, v [B, T, G, E], normalised and rotated by the positions of x."""
        heads = self.qkv(x_BTD).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = self._normalise(qk, self.q_norm, self.k_norm)
        if isinstance(self.position, Rotary):
            qk = self.position(qk, position)
        q, k = qk.split([self.heads, self.kv_heads], dim=2)
        return q, k, v

    def _normalise(self, qk: Tensor, q_norm: Tensor, k_norm: Tensor) -> Tensor:
        if self.per_head:
            scale_HE = torch.cat([q_norm.expand(self.heads, -1), k_norm.expand(self.kv_heads, -1)])
            return F.rms_norm(qk, (self.head_dim,), eps=self.norm_eps) * scale_HE.to(qk.dtype)
        q, k = (x.flatten(2) for x in qk.split([self.heads, self.kv_heads], dim=2))
        q, k = (F.rms_norm(x, w.shape, w.to(x.dtype), self.norm_eps) for x, w in ((q, q_norm), (k, k_norm)))
        return torch.cat([q, k], dim=-1).unflatten(-1, (-1, self.head_dim))

    def output(self, y_BTHE: Tensor, x_BTD: Tensor) -> Tensor:
        """Bring what the heads found to [B, T, D]; x is the mixer's input, which the gate reads."""
        y = y_BTHE.flatten(2)
        if self.gate is not None:
            y = y * self.gate(x_BTD).sigmoid()
        return self.out_proj(y)

    def watch_logits(self) -> Tensor:
        """Look for the largest logit of each head from now on; return what was found before, -inf where nothing was.

        Raises:
            ValueError: with QK-norm, which bounds logits whatever the weights of queries and keys are.
        """
        if self.q_norm is not None:
            raise ValueError(
                "its queries and keys are normed, which bounds logits: set qk_norm=null or do not clip them"
            )
        nothing_H = torch.full((self.heads,), -math.inf, device=self.qkv.weight.device)
        before_H, self.largest_H = self.largest_H, nothing_H
        return nothing_H if before_H is None else before_H

    @torch.no_grad()
    def scale_logits(self, factor_H: Tensor) -> None:
        """Multiply the logits of each head, biases by distance left out, through the weights that make queries and
        keys: each by the square root (QK-Clip, Kimi K2, arXiv 2507.20534, algorithm 1). A key that several heads
        share takes that of the largest of their factors, and their queries the rest. QK-norm would undo it."""
        factor_GR = factor_H.view(self.kv_heads, -1)
        key_G1 = factor_GR.amax(1, keepdim=True).sqrt()
        factors = torch.cat([(factor_GR / key_G1).flatten(), key_G1.flatten()]).repeat_interleave(self.head_dim)
        factors = F.pad(factors, (0, len(self.qkv.weight) - len(factors)), value=1.0)  # values stay as they are
        self.qkv.weight.mul_(factors[:, None])  # whole, since no view can be had of rows that are cut between processes
        if self.qkv.bias is not None:
            self.qkv.bias.mul_(factors)

    def residual_projections(self) -> tuple[nn.Linear]:
        return (self.out_proj,)

    def empty_state(self, batch: int) -> KVCache:
        weight = self.qkv.weight
        k, v = weight.new_empty(2, batch, 0, self.kv_heads, self.head_dim)
        return KVCache(k, v, self.window)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and scores and sums over the visible pairs only. (What runs
        computes unseen pairs too: the upper triangle where no fused kernel skips it, the rest of a band's blocks.)"""
        weights = sum(layer.weight.numel() for layer in (self.qkv, self.gate, self.out_proj) if layer is not None)
        sinks, pairs = T if self.sinks is not None else 0, visibility.pairs(T, self.window)
        watched = self.score_flops * pairs if self.largest_H is not None and self.training else 0
        return 2 * T * weights + self.pair_flops * (pairs + sinks) + watched

    @property
    def pair_flops(self) -> int:
        """Forward FLOPs of the score and the sum of one (query, key) pair in all heads."""
        return 2 * self.score_flops

    @property
    def score_flops(self) -> int:
        """Forward FLOPs of the score of one pair in all heads."""
        return 2 * self.heads * self.head_dim
