"""The lightning indexer of DeepSeek sparse attention (DeepSeek-V3.2-Exp, section 2.1): a small scorer that picks the
keys which attention reads, and the loss that it learns from.

Shape letters: B rows of the batch, T queries, S keys, H index heads of D dimensions, A attention heads of E dimensions
on G heads of keys, N packed documents.
"""

from functools import wraps

import torch
from torch import Tensor

from kernels.common.arguments import at_least_float32, check_packed, check_shape
from kernels.common.dispatch import choose_backend
from kernels.common.operation import Operation
from kernels.indexer.blocks import lightning_indexer_blocks, lightning_indexer_flops
from kernels.indexer.fp8 import FP8, quantised, restored, rounded
from kernels.indexer.loss import forward as loss_in_blocks
from kernels.indexer.loss import lightning_indexer_loss_flops
from kernels.indexer.problems import KEPT, random_problem
from kernels.indexer.ranges import visible_ranges
from kernels.indexer.reference import index_scores, lightning_indexer_loss_reference, lightning_indexer_reference

__all__ = [
    "OPERATION",
    "lightning_indexer",
    "lightning_indexer_flops",
    "lightning_indexer_keys",
    "lightning_indexer_loss",
    "lightning_indexer_loss_flops",
]


@torch.no_grad()
def lightning_indexer(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    topk: int,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    precision: str | None = None,
    key_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the places of the topk visible keys s of highest score sum_h weights[t, h] relu(q[t, h] . k[s]).

    Of equal scores (the relu makes many zeros) the latest is picked; 0 and -0 are equal, and a score that is NaN is
    taken as -inf. The choice has no gradient. No backend but "reference" has more of the scores in memory than those
    of a block of queries.

    Args:
        q: [B, T, H, D]; the queries are the last T of the S tokens.
        k: [B, S, D], one key per token for all heads.
        weights: [B, T, H], of any sign.
        topk: keys per query, at least 1; there may be fewer.
        causal: whether a query sees the keys up to its own place, or all of them.
        cu_seqlens: [N + 1] int32 or int64: the batch of one row holds N documents one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1], which do not see each other.
        precision: "fp8" rounds q and k to fp8 (E4M3) first, each row of D numbers with a scale of its own, a power of
            two (see `fp8.quantised`); None takes them as they are.
        key_scale: [B, S] float32, with precision "fp8", where k is in fp8 already (float8_e4m3fn): both as
            `lightning_indexer_keys` makes them once for all calls, which is what a cache keeps.
        backend: "auto" (see `choose_backend`), "torch" (in blocks), "reference" (all scores in memory),
            "triton" (float32, bfloat16 and float16; multiplies in fp8 what is in fp8, on GPUs of compute capability 8.9
            or higher) or "cuda" (Hopper, bfloat16, up to 64 heads of up to 128 dimensions; built on first use; not in
            fp8). Scores are in float32, or float64 for float64 inputs.

    Returns:
        [B, T, topk] int32: the places in rising order, and -1 behind them where fewer keys are visible.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or a backend that does not exist or that cannot run
            here.
    """
    if (key_scale is not None) != (k.dtype == FP8):
        raise ValueError(
            f"lightning_indexer takes keys in fp8 together with their key_scale, and no others with one; got {k.dtype} "
            f"{'without' if key_scale is None else 'with'} key_scale: take both from lightning_indexer_keys"
        )
    key_dtype = None if key_scale is None else FP8
    B, T, S = check_indexer("lightning_indexer", q, k, weights, causal, cu_seqlens, key_dtype)
    check_shape("key_scale", key_scale, (B, S))
    if topk < 1:
        raise ValueError(f"topk={topk} must be at least 1 key")
    if precision not in (None, "fp8"):
        raise ValueError(f"precision={precision!r} of lightning_indexer must be 'fp8', or None for that of q and k")
    if key_scale is not None and precision != "fp8":
        raise ValueError("key_scale of lightning_indexer belongs to keys in fp8: say precision='fp8', or leave it out")
    if backend == "cuda":
        if precision == "fp8":
            raise ValueError("backend 'cuda' of lightning_indexer has no fp8: choose backend='auto', or precision=None")
        from kernels.indexer.cuda_operators import lightning_indexer_cuda

        return lightning_indexer_cuda(q, k, weights, cu_seqlens, topk, causal)
    backend = choose_backend(
        FP8_OPERATION if precision == "fp8" else OPERATION,
        backend,
        ["reference", "torch", "triton"],
        "torch",
        q,
        heads=q.shape[2],
        head_dim=q.shape[3],
    )
    if q.numel() == 0 or S == 0:
        return q.new_full((B, T, topk), -1, dtype=torch.int32)
    if backend == "triton":
        from kernels.indexer.triton_operators import lightning_indexer_triton

        return lightning_indexer_triton(q, k, weights, cu_seqlens, topk, causal, precision == "fp8", key_scale)
    if precision == "fp8":
        q, k = rounded(q), rounded(k) if key_scale is None else restored(k, key_scale, at_least_float32(q))
    if backend == "torch":
        return lightning_indexer_blocks(q, k, weights, cu_seqlens, topk, causal)
    return lightning_indexer_reference(q, k, weights, *visible_ranges(T, S, causal, cu_seqlens, q), topk)


@torch.no_grad()
def lightning_indexer_keys(k: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Return keys [..., D] in fp8 (float8_e4m3fn) and their `key_scale` [...] in float32, for `lightning_indexer` with
    precision "fp8": it picks the same by them as by k, and need not round the keys of a cache again.

    Args:
        k: of any shape; no gradient reaches it.
        backend: "auto", "torch" or "triton" (as in `lightning_indexer`), which give the same bits.

    Raises:
        ValueError: for a backend that does not exist or that cannot run here.
    """
    backend = choose_backend(FP8_OPERATION, backend, ["torch", "triton"], "torch", k, heads=1, head_dim=k.shape[-1])
    if backend == "triton":
        from kernels.indexer.triton_operators import lightning_indexer_keys_triton

        return lightning_indexer_keys_triton(k)
    return quantised(k)


def check_indexer(
    name: str,
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    causal: bool,
    cu_seqlens: Tensor | None,
    key_dtype: torch.dtype | None = None,
) -> tuple[int, int, int]:
    """Return B, T and S of the inputs of an indexer, checked; key_dtype: that k is to have where it is not q's.

    Raises:
        ValueError: for ranks, shapes, dtypes or boundaries that do not fit together.
    """
    if q.dim() != 4 or k.dim() != 3:
        raise ValueError(
            f"{name} takes q [B, T, H, D] and k [B, S, D], one key per token for all heads; got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)}"
        )
    (B, T, H, D), S = q.shape, k.shape[1]
    check_shape("k", k, (B, S, D))
    check_shape("weights", weights, (B, T, H))
    if any(not x.is_floating_point() for x in (q, k, weights)) or k.dtype != (key_dtype or q.dtype):
        raise ValueError(
            f"{name} takes q and k of one dtype and weights, all floating point; got {q.dtype}, {k.dtype} and "
            f"{weights.dtype}"
        )
    if causal and S < T:
        raise ValueError(f"the {T} causal queries are the last of the keys, of which there are only {S}")
    if cu_seqlens is not None and S != T:
        raise ValueError(f"packed documents have as many keys as queries, not {S} and {T}: run them without a cache")
    check_packed(B, T, cu_seqlens)
    return B, T, S


def lightning_indexer_loss(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    indices: Tensor | None = None,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return KL(p_t || softmax(I_t)) of each query: p is the mean over its heads of what attention gives to the keys, I
    the indexer's scores on them (DeepSeek-V3.2-Exp, equations 3 and 4).

    Gradients reach q, k and weights alone: attention teaches and does not learn here.

    Args:
        q, k, weights, causal, cu_seqlens: as in `lightning_indexer`.
        query: [B, T, A, E], of the attention; key: [B, S, G, E] with A a multiple of G.
        scale: factor on the attention's scores.
        indices: [B, T, K] int32, the keys that were picked, each once, and -1 for none: softmax and p run over them
            (the sparse stage). None: over all that are visible (the dense warm-up).
        backend: "torch", which "auto" takes (in blocks, made again in the backward pass: memory grows with T and not
            with T x S), or "reference" (all pairs in memory).

    Returns:
        [B, T] in float32, or float64 for float64 inputs; 0 for a query that reads nothing.

    Raises:
        ValueError: for shapes that do not fit together, or a backend that does not exist.
    """
    B, T, S = check_indexer("lightning_indexer_loss", q, k, weights, causal, cu_seqlens)
    if query.dim() != 4 or key.dim() != 4 or query.shape[2] % max(key.shape[2], 1):
        raise ValueError(
            "lightning_indexer_loss takes query [B, T, A, E] and key [B, S, G, E] with A a multiple of G; got query "
            f"{tuple(query.shape)}, key {tuple(key.shape)}"
        )
    check_shape("query", query, (B, T, *query.shape[2:]))
    check_shape("key", key, (B, S, key.shape[2], query.shape[3]))
    if indices is not None:
        check_shape("indices", indices, (B, T, indices.shape[-1]))
    if backend not in ("auto", "torch", "reference"):
        raise ValueError(f"unknown backend {backend!r} for lightning_indexer_loss: choose from auto, torch, reference")
    query, key = query.detach(), key.detach()
    if backend == "reference":
        ranges = visible_ranges(T, S, causal, cu_seqlens, q)
        return lightning_indexer_loss_reference(q, k, weights, query, key, scale, indices, *ranges)
    return loss_in_blocks(q, k, weights, query, key, indices, cu_seqlens, scale, causal)


TRIED = 48  # keys that a trial picks: fewer than it has tokens


@wraps(lightning_indexer)
def _scores_of_picks(
    q: Tensor, k: Tensor, weights: Tensor, *, backend: str, precision: str | None = None
) -> tuple[Tensor, None]:
    """Return the scores [B, T, TRIED] of what a backend picks, in falling order and 0 for none, which is how it is
    tried: keys whose scores are as good as equal may change places."""
    picked = lightning_indexer(q, k, weights, TRIED, precision=precision, backend=backend).long()
    scores = index_scores(q, k, weights).gather(2, picked.clamp(min=0)).masked_fill(picked < 0, -torch.inf)
    falling = scores.sort(dim=-1, descending=True).values
    return falling.masked_fill(falling.isneginf(), 0.0), None


@wraps(lightning_indexer)
def _scores_of_picks_in_fp8(q: Tensor, k: Tensor, weights: Tensor, *, backend: str) -> tuple[Tensor, None]:
    return _scores_of_picks(q, k, weights, precision="fp8", backend=backend)


def _random_problem_in_fp8(T: int, **sizes) -> dict[str, Tensor]:
    """Return a random problem whose queries and keys fp8 holds: rounded again in another dtype they stay the same."""
    inputs = random_problem(T, **sizes)
    return inputs | {name: rounded(inputs[name]) for name in ("q", "k")}


OPERATION = Operation(_scores_of_picks, random_problem, KEPT)
FP8_OPERATION = Operation(_scores_of_picks_in_fp8, _random_problem_in_fp8, KEPT)
