"""Sparse attention with a lightning indexer: a small scorer picks the tokens that attention reads."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from archs.mixers.attention import Attention
from archs.mixers.latent_attention import LatentAttention
from archs.positions import Alibi, Rotary
from archs.state import KVCache, States
from archs.visibility import BIDIRECTIONAL, CAUSAL, Visibility


class Indexer(nn.Module):
    """Scores I_ts = sum_j w_tj ReLU(q_tj . k_s) of every pair of tokens (DeepSeek-V3.2-Exp, section 2.1).

    Its weights w take any sign. The release also turns q and k by a Hadamard matrix and rounds them to fp8: the first
    changes no product, the second is not done here.

    Args:
        width: model width, of what keys and weights are made of; query_width: of what queries are made of.
        heads, dim: number of heads j and dimension of their queries and of the one key that they share.
        position: turns the first dimensions of queries and key; V3.2 turns "halves", unlike its attention.
    """

    def __init__(self, width: int, query_width: int, *, heads: int, dim: int, position: Rotary):
        super().__init__()
        self.heads, self.dim, self.position = heads, dim, position
        self.query = nn.Linear(query_width, heads * dim, bias=False)
        self.key = nn.Linear(width, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim, eps=1e-6)
        self.weights = nn.Linear(width, heads, bias=False)

    def keys(self, x_BTD: Tensor, offset: int) -> Tensor:
        """The key [B, T, 1, dim] of each token, which a cache keeps."""
        return self.position(self.key_norm(self.key(x_BTD))[:, :, None], offset)

    def scores(self, x_BTD: Tensor, query_input: Tensor, k_BS1E: Tensor, offset: int) -> Tensor:
        """I [B, T, S] of the tokens x, which start at position `offset`, and the keys of S tokens; float32 or more."""
        q_BTHE = self.position(self.query(query_input).unflatten(-1, (self.heads, -1)), offset)
        w_BHT1 = self.weights(x_BTD).mT[..., None] * (self.heads * self.dim) ** -0.5
        match_BHTS = (q_BTHE.transpose(1, 2) @ k_BS1E.permute(0, 2, 3, 1)).relu()
        return (match_BHTS * w_BHT1).sum(1, dtype=torch.promote_types(x_BTD.dtype, torch.float32))

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and products of queries and keys over the visible pairs."""
        weights = sum(layer.weight.numel() for layer in (self.query, self.key, self.weights))
        return 2 * T * weights + 2 * self.heads * self.dim * visibility.pairs(T)


class SparseAttention(nn.Module):
    """DeepSeek sparse attention (DSA; DeepSeek-V3.2-Exp): attention over the top_k visible tokens of highest index
    score, on top of latent or of grouped-query attention.

    The choice has no gradient. In training the indexer learns from a loss of its own, the mean over tokens of
    KL(p || softmax(I)), where p is what attention gives to each token, averaged over its heads, and the softmax runs
    over the tokens attended to. What the indexer reads is detached and so is p: its loss trains the indexer alone, and
    the model's objective never reaches it.

    In stage "dense" attention reads all visible tokens, so that the indexer sees what it would miss; in "sparse"
    those that it picked. DeepSeek trains a finished model's indexer alone in the first (see `dense_warm_up`) and then
    all in the second.

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

    visibilities = frozenset({CAUSAL, BIDIRECTIONAL})

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
        self.latent = isinstance(self.attention, LatentAttention)
        if not self.latent and (
            self.attention.window is not None
            or self.attention.sinks is not None
            or isinstance(self.attention.position, Alibi)
        ):
            raise ValueError("an indexer picks among all tokens for plain scores: leave out window, sinks and Alibi")
        query_width = self.attention.q_up.in_features if self.latent else width
        self.indexer = Indexer(width, query_width, heads=index_heads, dim=index_dim, position=index_position)
        self.top_k, self.loss_weight, self.stage = top_k, loss_weight, stage
        self.auxiliary_losses: dict[str, Tensor] = {}

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: States | None = None
    ) -> tuple[Tensor, States | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        tokens, index = (None, None) if state is None else state.states
        offset = 0 if tokens is None else tokens.length
        query_input, q, k, v, output = self._attention(x_BTD, offset, tokens)
        index_k = self.indexer.keys(x_BTD.detach(), offset)
        if index is not None:
            index_k, _ = index.append(index_k, index_k[..., :0])
        scores_BTS = self.indexer.scores(x_BTD.detach(), query_input.detach(), index_k, offset)

        T, S = scores_BTS.shape[1:]
        if visibility is CAUSAL:
            seen_TS = torch.ones(T, S, dtype=torch.bool, device=x_BTD.device).tril(S - T)
            scores_BTS = scores_BTS.masked_fill(~seen_TS, -torch.inf)
        if self.stage == "sparse" and self.top_k < S:
            picked_BTS = pick(scores_BTS, self.top_k)
            if T == 1:  # read no more than was picked
                picked_BTK = picked_BTS.byte().topk(self.top_k, dim=-1).indices
                k, v = (x.take_along_dim(picked_BTK.mT[..., None], dim=1) for x in (k, v))
                scores_BTS = scores_BTS.gather(2, picked_BTK)
            else:
                scores_BTS = scores_BTS.masked_fill(~picked_BTS, -torch.inf)
        y_BTHD, p_BTS = _attend(q, k, v, scores_BTS.isneginf(), self.attention.scale)
        self.auxiliary_losses = {}
        if self.training:
            self.auxiliary_losses["indexer_kl"] = self.loss_weight * _divergence(p_BTS, scores_BTS)
        return output(y_BTHD, x_BTD), state

    def _attention(self, x_BTD: Tensor, offset: int, cache: KVCache | None):
        """What the indexer's queries are made of; q, k, v of all heads; and what brings their findings back."""
        if self.latent:
            absorbed = offset > 0
            query_input = self.attention.query_input(x_BTD)
            q, latent, k_rope = self.attention.project(x_BTD, query_input, offset)
            if cache is not None:
                latent, k_rope = cache.append(latent, k_rope)
            qkv = self.attention.heads_of(q, latent, k_rope, absorbed)
            return query_input, *qkv, partial(self.attention.output, absorbed=absorbed)
        q, k, v = self.attention.project(x_BTD, offset)
        if cache is not None:
            k, v = cache.append(k, v)
        return x_BTD, q, k, v, self.attention.output

    def empty_state(self, batch: int) -> States:
        """The attention's cache and that of the index keys."""
        weight = self.indexer.key.weight
        keys, nothing = (weight.new_empty(batch, 0, 1, n) for n in (self.indexer.dim, 0))
        return States([self.attention.empty_state(batch), KVCache(keys, nothing)])

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence, attention over the picked pairs only. (What runs masks the others, and so
        computes all pairs; only decoding reads no more than it picked. A kernel that gathers is what the count is of.)"""
        dense = self.attention.flops(T, visibility) + self.indexer.flops(T, visibility)
        return dense - self.attention.pair_flops * (visibility.pairs(T) - self.pairs(T, visibility))

    def pairs(self, T: int, visibility: Visibility) -> int:
        """Number of (query, key) pairs that attention reads in a sequence of T tokens."""
        if self.stage == "dense" or self.top_k >= T:
            return visibility.pairs(T)
        return visibility.pairs(T, self.top_k) if visibility is CAUSAL else T * self.top_k


def pick(scores_BTS: Tensor, top_k: int) -> Tensor:
    """True at the top_k highest scores of each token, of equal ones (the ReLU makes many zeros) the latest: which of
    them `torch.topk` takes depends on the length, so that decoding would pick others than a full pass."""
    least_BT1 = scores_BTS.topk(top_k, dim=-1).values[..., -1:]
    above_BTS, level_BTS = scores_BTS > least_BT1, scores_BTS == least_BT1
    room_BT1 = top_k - above_BTS.sum(-1, keepdim=True)
    return above_BTS | (level_BTS & (level_BTS.flip(-1).cumsum(-1).flip(-1) <= room_BT1))


def _attend(q: Tensor, k: Tensor, v: Tensor, unseen_BTS: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [B, T, H, D] on k [B, S, KV heads, D] and v [B, S, KV heads, E], not at unseen pairs: what it
    finds [B, T, H, E], and the mean over the heads of its weights [B, T, S], in float32 or more and without gradient."""
    kv_heads = k.shape[2]
    q_BGRTD = q.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    k_BG1DS, v_BG1SE = k.permute(0, 2, 3, 1)[:, :, None], v.transpose(1, 2)[:, :, None]
    scores = (q_BGRTD * scale) @ k_BG1DS
    p = scores.masked_fill(unseen_BTS[:, None, None], -torch.inf).softmax(-1)
    y_BTHE = (p.to(v.dtype) @ v_BG1SE).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return y_BTHE, p.detach().mean((1, 2), dtype=torch.promote_types(p.dtype, torch.float32))


def _divergence(p_BTS: Tensor, scores_BTS: Tensor) -> Tensor:
    """Mean over tokens of KL(p || softmax(scores)); unseen pairs have p = 0 and scores of -inf."""
    log_q = scores_BTS.log_softmax(-1).masked_fill(scores_BTS.isneginf(), 0.0)
    return (torch.xlogy(p_BTS, p_BTS) - p_BTS * log_q).sum(-1).mean()


@contextmanager
def dense_warm_up(model: nn.Module) -> Iterator[None]:
    """Inside, every SparseAttention is in its dense stage and nothing but indexers has gradients; afterwards stages and
    gradients are as before. What the optimiser of the warm-up is built from is `p for p in model.parameters() if
    p.requires_grad`, and its loss `model.auxiliary_losses()["indexer_kl"]`.

    Raises:
        ValueError: for a model without an indexer.
    """
    mixers = [module for module in model.modules() if isinstance(module, SparseAttention)]
    if not mixers:
        raise ValueError("this model has no SparseAttention whose indexer could warm up")
    stages = [mixer.stage for mixer in mixers]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    for mixer in mixers:
        mixer.stage = "dense"
        mixer.indexer.requires_grad_(True)
    try:
        yield
    finally:
        for mixer, stage in zip(mixers, stages, strict=True):
            mixer.stage = stage
        for p, before in wanted:
            p.requires_grad_(before)
