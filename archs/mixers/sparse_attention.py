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
from archs.mixers.softmax import attend, in_attention, positions_of
from archs.positions import Alibi, Positions, Rotary
from archs.state import KVCache
from archs.visibility import Kind, Visibility
from kernels import lightning_indexer, lightning_indexer_keys, lightning_indexer_loss, sparse_attention


class Indexer(nn.Module):
    """Scores I_ts = sum_j w_tj ReLU(q_tj . k_s) of every pair of tokens (DeepSeek-V3.2-Exp, section 2.1).

    Its weights w take any sign. The release also multiplies q and k by a Hadamard matrix, which changes no product and
    is not done here, and rounds them to fp8 where it picks.

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
        k_BTF = self.key(x_BTD)
        return self.position(self.key_norm(k_BTF).to(k_BTF.dtype)[:, :, None], position)  # autocast norms in float32

    def queries(self, x_BTD: Tensor, query_input: Tensor, position: Positions) -> tuple[Tensor, Tensor]:
        """The queries [B, T, I, F] of the tokens x and their heads' weights [B, T, I]; position: of x."""
        q_BTIF = self.position(self.query(query_input).unflatten(-1, (self.heads, -1)), position)
        return q_BTIF, self.weights(x_BTD) * (self.heads * self.dim) ** -0.5

    def flops(self, T: int, pairs: int) -> int:
        """Forward FLOPs of the projections of one sequence, and of the products of queries and keys of some pairs."""
        weights = sum(layer.weight.numel() for layer in (self.query, self.key, self.weights))
        return 2 * T * weights + 2 * self.heads * self.dim * pairs


@dataclass(frozen=True, eq=False)
class IndexedCache(State):
    """The attention's cache, and that of the index keys, whose values are their scales where fp8 picks, or empty."""

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
        index_precision: "fp8" picks by scores of queries and keys rounded to it, as the release does, and a cache keeps
            those keys in it; None by exact ones. The indexer's loss takes exact ones either way.
        loss_weight: factor on the indexer's loss, which is the auxiliary loss "indexer_kl".
        stage: "dense" or "sparse".

    Raises:
        ValueError: for an attention that knows its own set of tokens, a top_k below 1, an unknown stage or precision.
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
        index_precision: str | None = None,
    ):
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1 token")
        if stage not in ("dense", "sparse"):
            raise ValueError(f"stage={stage!r} must be 'dense' or 'sparse'")
        if index_precision not in (None, "fp8"):
            raise ValueError(f"index_precision={index_precision!r} must be 'fp8', or null for exact scores")
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
        self.index_precision = index_precision
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
        picks = self._picks(x_BTD.shape[1] + (0 if before is None else before.length))
        query_input, q, k, v, output, cache = self._attention(x_BTD, position, before, picks)
        index_q, index_weights = self.indexer.queries(x_BTD.detach(), query_input.detach(), position)
        index_k, key_scale = self.indexer.keys(x_BTD.detach(), position), None
        if state is not None and cache is not None:
            index_k, key_scale, state = self._keep_index(index_k, cache, state)
        asked, scale = (index_q, index_k[:, :, 0], index_weights), self.attention.scale
        picked_BTK = self._pick(*asked, key_scale, visibility) if picks else None
        if picked_BTK is None:
            y_BTHE = attend(q, k, v, visibility, scale=scale)
        else:
            y_BTHE, _ = sparse_attention(q, k, v, picked_BTK, scale=scale)
        self.losses = {}
        if self.training and state is None:
            self.losses["indexer_kl"] = self.loss_weight * self._divergence(*asked, q, k, picked_BTK, visibility)
        return output(y_BTHE), state

    def _attention(self, x_BTD: Tensor, position: Positions, cache: KVCache | None, picks: bool):
        """Return the input of the indexer's queries; q, k, v of all heads; what brings findings back; the cache. picks:
        whether each query reads tokens of its own, of which it then gathers the latents rather than all heads."""
        if isinstance(self.attention, LatentAttention):
            absorbed = picks or cache is not None and cache.length > 0
            query_input = self.attention.query_input(x_BTD)
            q, latent = self.attention.project(x_BTD, query_input, position)
            if cache is not None:
                latent, cache = self.attention.extend(latent, cache)
            qkv = self.attention.heads_of(q, latent, absorbed)
            return query_input, *qkv, partial(self.attention.output, absorbed=absorbed), cache
        q, k, v = self.attention.project(x_BTD, position)
        if cache is not None:
            k, v, cache = cache.append(in_attention(k), in_attention(v))
        return x_BTD, q, k.to(q.dtype), v.to(q.dtype), partial(self.attention.output, x_BTD=x_BTD), cache

    def _keep_index(
        self, k_BT1F: Tensor, cache: KVCache, state: IndexedCache
    ) -> tuple[Tensor, Tensor | None, IndexedCache]:
        """Return the keys of all tokens [B, S, 1, F], their scales [B, S] where they are in fp8, and the state with the
        new ones and the attention's cache."""
        if self.index_precision is None:
            k_BS1F, _, index = state.index.append(k_BT1F, k_BT1F[..., :0])
            return k_BS1F, None, IndexedCache(cache, index)
        numbers, scale_BT1 = lightning_indexer_keys(k_BT1F)
        k_BS1F, scale_BS11, index = state.index.append(numbers, scale_BT1[..., None])
        return k_BS1F, scale_BS11[:, :, 0, 0], IndexedCache(cache, index)

    def _pick(self, q: Tensor, k: Tensor, weights: Tensor, key_scale: Tensor | None, visibility: Visibility) -> Tensor:
        """Places [B, T, K] of the tokens of highest score, as `lightning_indexer` gives them."""
        options = {"causal": visibility.kind is Kind.CAUSAL, "precision": self.index_precision}
        if visibility.starts_BL is None:
            return lightning_indexer(q, k, weights, self.top_k, **options, key_scale=key_scale)
        B, T = q.shape[:2]
        q, k, weights = _end_to_end(q, k, weights)
        picked = lightning_indexer(q, k, weights, self.top_k, **options, cu_seqlens=visibility.cu_seqlens())
        return _shifted(picked.view(B, T, -1), -T)

    def _divergence(
        self, index_q: Tensor, index_k: Tensor, weights: Tensor, q: Tensor, k: Tensor, picked_BTK: Tensor | None,
        visibility: Visibility,
    ) -> Tensor:  # fmt: skip
        """The mean over tokens of the indexer's loss, over what attention reads."""
        options = {"scale": self.attention.scale, "causal": visibility.kind is Kind.CAUSAL}
        tensors = index_q, index_k, weights, q, k
        if visibility.starts_BL is not None:
            tensors, options["cu_seqlens"] = _end_to_end(*tensors), visibility.cu_seqlens()
            if picked_BTK is not None:
                picked_BTK = _shifted(picked_BTK, q.shape[1]).flatten(0, 1)[None]
        return lightning_indexer_loss(*tensors, indices=picked_BTK, **options).mean()

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The indexer's loss, "indexer_kl"; none in evaluation, nor from a cache, whose keys may be rounded."""
        return self.losses

    def residual_projections(self) -> Sequence[nn.Module]:
        return self.attention.residual_projections()

    def empty_state(self, batch: int) -> IndexedCache:
        weight, scales = self.indexer.key.weight, 0 if self.index_precision is None else 1
        keys, values = (weight.new_empty(batch, 0, 1, numbers) for numbers in (self.indexer.dim, scales))
        return IndexedCache(self.attention.empty_state(batch), KVCache(keys, values))

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: attention over the pairs that it reads, absorbed where it is latent and picks;
        the indexer over all visible pairs where it picks; and in training, over the pairs read, its loss: the products
        of the indexer and the scores of the attention. (What runs computes places without a token too.)"""
        read, visible, picks = self.pairs(T, visibility), visibility.pairs(T), self._picks(T)
        attention, pair_flops, score_flops = self.attention, *self._pair_flops(picks)
        attended = attention.flops(T, visibility) - attention.pair_flops * visible + pair_flops * read
        indexed = self.indexer.flops(T, picks * visible + self.training * read)
        return attended + indexed + self.training * score_flops * read

    def _pair_flops(self, picks: bool) -> tuple[int, int]:
        """FLOPs of the attention on one (query, key) pair in all heads, and of its score alone."""
        attention = self.attention
        if not isinstance(attention, LatentAttention):
            return attention.pair_flops, 2 * attention.heads * attention.head_dim
        if picks:
            return attention.absorbed_pair_flops, 2 * attention.heads * (attention.kv_rank + attention.rope_dim)
        return attention.pair_flops, 2 * attention.heads * (attention.nope_dim + attention.rope_dim)

    def pairs(self, T: int, visibility: Visibility) -> int:
        """Number of (query, key) pairs that attention reads in a sequence of T tokens."""
        if not self._picks(T):
            return visibility.pairs(T)
        return visibility.pairs(T, self.top_k) if visibility.kind is Kind.CAUSAL else T * self.top_k

    def _picks(self, keys: int) -> bool:
        """Return whether queries of so many keys read fewer of them."""
        return self.stage == "sparse" and self.top_k < keys


def _end_to_end(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of each tensor [B, T, ...] one after the other, [1, B T, ...]."""
    return tuple(x.flatten(0, 1)[None] for x in tensors)


def _shifted(picked_BTK: Tensor, by: int) -> Tensor:
    """Places moved by so many per row of the batch, between those in rows and those of rows laid end to end."""
    rows = torch.arange(len(picked_BTK), device=picked_BTK.device, dtype=picked_BTK.dtype)
    return torch.where(picked_BTK < 0, -1, picked_BTK + by * rows[:, None, None])
