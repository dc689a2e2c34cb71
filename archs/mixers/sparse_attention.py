"""Sparse attention with a lightning indexer: a small scorer picks the tokens that attention reads.

Shape letters: B sequences, T queries, S keys, D model width, H query heads, G key-value heads, R query heads per
key-value head, E dimensions of a head, I heads of the indexer, F their dimensions, K picked tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from archs.contracts import Mixer, State
from archs.mixers.attention import Attention
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.softmax import positions_of
from archs.positions import Alibi, Positions, Rotary
from archs.state import KVCache
from archs.visibility import Kind, Visibility


class Indexer(nn.Module):
    """Scores I_ts = sum_j w_tj ReLU(q_tj . k_s) of every pair of tokens (DeepSeek-V3.2-Exp, section 2.1).

    Its weights w take any sign. The release also multiplies q and k by a Hadamard matrix and rounds them to fp8: the
    first changes no product, the second is not done here.

    Args:
        width: model width, of what keys and weights are made of; query_width: of what queries are made of.
        heads, dim: number of heads j and dimension of their queries and of the one key that they share.
        position: rotates the first dimensions of queries and key; V3.2 rotates "halves", unlike its attention.
    """

    def __init__(self, width: int, query_width: int, *, heads: int, dim: int, position: Rotary):
        super().__init__()
        self.heads, self.dim, self.position = heads, dim, position
        self.query = nn.Linear(query_width, heads * dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weights = nn.Linear(width, heads, bias=False)

    def keys(self, x_BTD: Tensor, position: Positions) -> Tensor:
        """The key [B, T, 1, F] of each token, which a cache keeps; position: of x."""
        return self.position(self.key_norm(self.key(x_BTD))[:, :, None], position)

    def scores(self, x_BTD: Tensor, query_input: Tensor, k_BS1F: Tensor, position: Positions) -> Tensor:
        """I [B, T, S] of the tokens x and the keys of S tokens; float32 or more. position: of x."""
        q_BTIF = self.position(self.query(query_input).unflatten(-1, (self.heads, -1)), position)
        w_BIT1 = self.weights(x_BTD).mT[..., None] * (self.heads * self.dim) ** -0.5
        match_BITS = (q_BTIF.transpose(1, 2) @ k_BS1F.permute(0, 2, 3, 1)).relu()
        return (match_BITS * w_BIT1).sum(1, dtype=torch.promote_types(x_BTD.dtype, torch.float32))

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and products of queries and keys over the visible pairs."""
        weights = sum(layer.weight.numel() for layer in (self.query, self.key, self.weights))
        return 2 * T * weights + 2 * self.heads * self.dim * visibility.pairs(T)


@dataclass(frozen=True, eq=False)
class IndexedCache(State):
    """The attention's cache, and that of the index keys, whose values are empty."""

    attention: KVCache
    index: KVCache

    @property
    def length(self) -> int:
        return self.attention.length

    @property
    def nbytes(self) -> int:
        return self.attention.nbytes + self.index.nbytes

    def repeat(self, copies: int) -> Self:
        return replace(self, attention=self.attention.repeat(copies), index=self.index.repeat(copies))


class SparseAttention(Mixer[IndexedCache]):
    """DeepSeek sparse attention (DSA; DeepSeek-V3.2-Exp): attention over the top_k visible tokens of highest index
    score, on top of latent or of grouped-query attention.

    The choice has no gradient. In training the indexer learns from a loss of its own, the mean over tokens of
    KL(p || softmax(I)), where p is what attention gives to each token, averaged over its heads, and the softmax runs
    over the tokens attended to. What the indexer reads is detached and so is p: its loss trains the indexer alone, and
    the model's objective never reaches it.

    In stage "dense" attention reads all visible tokens, so that the indexer sees what it would miss; in "sparse"
    those that it picked. DeepSeek trains a finished model's indexer alone in the first and then all in the second.

    Args:
        width: model width.
        attention: builds the attention from the width: Attention without window, sinks or Alibi, or LatentAttention,
            whose latent of the queries then also feeds the indexer.
        index_heads, index_dim, index_position: of the `Indexer`.
        top_k: tokens that a query attends to; all visible ones while there are no more.
        loss_weight: factor on the indexer's loss, which is the auxiliary loss "indexer_kl".
        stage: "dense" or "sparse".

    Raises:
        ValueError: for an attention that knows its own set of tokens, a top_k below 1 or an unknown stage.
    """

    def __init__(
        self,
        width: int,
        *,
        attention: Callable[[int], Attention | LatentAttention],
        index_heads: int,
        index_dim: int,
        index_position: Rotary,
        top_k: int,
        loss_weight: float = 1.0,
        stage: str = "sparse",
    ):
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1 token")
        if stage not in ("dense", "sparse"):
            raise ValueError(f"stage={stage!r} must be 'dense' or 'sparse'")
        self.attention = attention(width)
        if isinstance(self.attention, LatentAttention):
            query_width = self.attention.q_up.in_features
        else:
            query_width = width
            options = self.attention.window, self.attention.sinks
            if options != (None, None) or isinstance(self.attention.position, Alibi):
                raise ValueError(
                    "an indexer picks among all tokens for plain scores: leave out window, sinks and Alibi"
                )
        self.indexer = Indexer(width, query_width, heads=index_heads, dim=index_dim, position=index_position)
        self.top_k, self.loss_weight, self.stage = top_k, loss_weight, stage
        self.losses: dict[str, Tensor] = {}

    @property
    def visibilities(self) -> frozenset[Kind]:
        return frozenset({Kind.CAUSAL, Kind.BIDIRECTIONAL})

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: IndexedCache | None = None
    ) -> tuple[Tensor, IndexedCache | None]:
        """Mix x; see `Mixer`."""
        position = positions_of(x_BTD, visibility, state)
        before = None if state is None else state.attention
        query_input, q, k, v, output, cache = self._attention(x_BTD, position, before)
        index_k = self.indexer.keys(x_BTD.detach(), position)
        if state is not None and cache is not None:
            index_k, _, index = state.index.append(index_k, index_k[..., :0])
            state = IndexedCache(cache, index)
        scores_BTS = self.indexer.scores(x_BTD.detach(), query_input.detach(), index_k, position)

        T, S = scores_BTS.shape[1:]
        seen = visibility.visible(T, S, device=x_BTD.device)
        if seen is not None:
            scores_BTS = scores_BTS.masked_fill(~(seen if seen.dim() == 2 else seen[:, 0]), -torch.inf)
        if self.stage == "sparse" and self.top_k < S:
            picked_BTS = pick(scores_BTS, self.top_k)
            if T == 1:  # read no more than was picked
                picked_BTK = picked_BTS.byte().topk(self.top_k, dim=-1).indices
                k, v = (x.take_along_dim(picked_BTK.mT[..., None], dim=1) for x in (k, v))
                scores_BTS = scores_BTS.gather(2, picked_BTK)
            else:
                scores_BTS = scores_BTS.masked_fill(~picked_BTS, -torch.inf)
        y_BTHE, p_BTS = _attend(q, k, v, scores_BTS.isneginf(), self.attention.scale)
        self.losses = {"indexer_kl": self.loss_weight * _divergence(p_BTS, scores_BTS)} if self.training else {}
        return output(y_BTHE), state

    def _attention(self, x_BTD: Tensor, position: Positions, cache: KVCache | None):
        """Return the input of the indexer's queries; q, k, v of all heads; what brings findings back; the cache."""
        if isinstance(self.attention, LatentAttention):
            absorbed = cache is not None and cache.length > 0
            query_input = self.attention.query_input(x_BTD)
            q, latent, k_rope = self.attention.project(x_BTD, query_input, position)
            if cache is not None:
                latent, k_rope, cache = cache.append(latent, k_rope)
            qkv = self.attention.heads_of(q, latent, k_rope, absorbed)
            return query_input, *qkv, partial(self.attention.output, absorbed=absorbed), cache
        q, k, v = self.attention.project(x_BTD, position)
        if cache is not None:
            k, v, cache = cache.append(k, v)
        return x_BTD, q, k, v, partial(self.attention.output, x_BTD=x_BTD), cache

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The indexer's loss, "indexer_kl"; none in evaluation."""
        return self.losses

    def residual_projections(self) -> Sequence[nn.Module]:
        return self.attention.residual_projections()

    def empty_state(self, batch: int) -> IndexedCache:
        weight = self.indexer.key.weight
        keys, nothing = (weight.new_empty(batch, 0, 1, n) for n in (self.indexer.dim, 0))
        return IndexedCache(self.attention.empty_state(batch), KVCache(keys, nothing))

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence, attention over the picked pairs only. (What runs masks the others, and so
        computes all pairs; only decoding reads no more than it picked. A kernel that gathers is what the count is
        of.)"""
        dense = self.attention.flops(T, visibility) + self.indexer.flops(T, visibility)
        return dense - self.attention.pair_flops * (visibility.pairs(T) - self.pairs(T, visibility))

    def pairs(self, T: int, visibility: Visibility) -> int:
        """Number of (query, key) pairs that attention reads in a sequence of T tokens."""
        if self.stage == "dense" or self.top_k >= T:
            return visibility.pairs(T)
        return visibility.pairs(T, self.top_k) if visibility.kind is Kind.CAUSAL else T * self.top_k


def pick(scores_BTS: Tensor, top_k: int) -> Tensor:
    """True [B, T, S] at the top_k highest scores of each token, of equal ones (the ReLU makes many zeros) the latest:
    which of them `torch.topk` takes depends on the length, so that decoding would pick others than a full pass."""
    least_BT1 = scores_BTS.topk(top_k, dim=-1).values[..., -1:]
    above_BTS, level_BTS = scores_BTS > least_BT1, scores_BTS == least_BT1
    room_BT1 = top_k - above_BTS.sum(-1, keepdim=True)
    return above_BTS | (level_BTS & (level_BTS.flip(-1).cumsum(-1).flip(-1) <= room_BT1))


def _attend(q: Tensor, k: Tensor, v: Tensor, unseen_BTS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, E] on k and v [B, S, G, E], not at unseen pairs: what it finds [B, T, H, E], and the
    mean over the heads of its weights [B, T, S], in float32 or more and without gradient."""
    kv_heads = k.shape[2]
    q_BGRTE = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k_BG1ES, v_BG1SE = k.permute(0, 2, 3, 1)[:, :, None], v.transpose(1, 2)[:, :, None]
    scores = (q_BGRTE * scale) @ k_BG1ES
    p = scores.masked_fill(unseen_BTS[:, None, None], -torch.inf).softmax(-1)
    y_BTHE = (p.to(v.dtype) @ v_BG1SE).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return y_BTHE, p.detach().mean((1, 2), dtype=torch.promote_types(p.dtype, torch.float32))


def _divergence(p_BTS: Tensor, scores_BTS: Tensor) -> Tensor:
    """Mean over tokens of KL(p || softmax(scores)); unseen pairs have p = 0 and scores of -inf."""
    log_q = scores_BTS.log_softmax(-1).masked_fill(scores_BTS.isneginf(), 0.0)
    return (torch.xlogy(p_BTS, p_BTS) - p_BTS * log_q).sum(-1).mean()
