"""The Triton kernels as a PyTorch operator: known to torch.compile and to FlopCounterMode.

Shape letters: B rows of the batch, T queries, R of them in a block, S keys, H heads of D dimensions.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import (
    block_for,
    block_sizes,
    check_dtype,
    check_fp8,
    launch_kernel,
    power_of_two,
    precision_for,
)
from kernels.indexer import triton_kernels as kernels
from kernels.indexer.blocks import count_flops, empty_picks, queries_at_once
from kernels.indexer.fp8 import FP8, quantised
from kernels.indexer.ranges import visible_ranges

LARGEST_HEAD = 256
MOST_HEADS = 128
LARGEST_TILE = {torch.float32: (64, 32)}  # keys and dimensions at a time, of a product in three parts
FP8_DIMENSIONS = 32  # that tensor cores sum over at once
SELECT_BLOCK, SELECT_WARPS = 2048, 8  # scores that a program selects from at a time


@torch.library.custom_op("archipelago::lightning_indexer", mutates_args=())
def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool,
    scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the picks [B, T, topk], shapes as in `kernels.lightning_indexer`; scales [B, S] of keys in fp8."""
    (B, T, H, D), S = q.shape, k.shape[1]
    sizes = block_sizes("lightning_indexer", D, q)
    begins, ends = (None, None) if cu_seqlens is None else visible_ranges(T, S, causal, cu_seqlens, q)
    R = queries_at_once(B, T, S, sizes.rows)
    scores = torch.empty(B, R, S, dtype=torch.float32, device=q.device)
    out = torch.empty(B, T, topk, dtype=torch.int32, device=q.device)
    named: dict = {"T": T, "S": S, "H": H, "D": D, "K": topk, "CAUSAL": causal, "PACKED": cu_seqlens is not None}
    named |= {"begins": begins, "ends": ends, "of_sequence": k.stride(0) // D}
    keys, dimensions = LARGEST_TILE.get(q.dtype, (sizes.columns, LARGEST_HEAD))
    named |= {"BLOCK_R": sizes.rows, "BLOCK_H": block_for(H, MOST_HEADS), "BLOCK_D": block_for(D, dimensions)}
    if q.dtype == FP8:
        named["BLOCK_D"] = max(FP8_DIMENSIONS, named["BLOCK_D"])
    named |= {"BLOCK_K": min(1024, power_of_two(topk)), "PRECISION": precision_for(q.dtype)}
    run = partial(launch_kernel, named=named)
    for first in range(0, T, R):
        rows = min(R, T - first)
        named |= {"first": first, "R": rows, "BLOCK_S": keys}
        grid = (-(-S // keys), -(-rows // sizes.rows), B)
        options = {"warps": sizes.forward_warps, "stages": sizes.stages}
        run(kernels.scores_kernel, q, k, weights, scales, scores, grid=grid, **options)
        named["BLOCK_S"] = SELECT_BLOCK
        run(kernels.select_kernel, scores, out, grid=(rows, B), warps=SELECT_WARPS, stages=1)
    return out


lightning_indexer.register_fake(empty_picks)
register_flop_formula(torch.ops.archipelago.lightning_indexer)(count_flops)


def lightning_indexer_triton(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool, fp8: bool
) -> Tensor:
    """Return the picks [B, T, topk], shapes as in `kernels.lightning_indexer`; with fp8 of q and k rounded to it.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, more than 256 dimensions or 128 heads, or fp8
            on a GPU whose tensor cores have none.
    """
    check_dtype(q)
    H, D = q.shape[2:]
    if D > LARGEST_HEAD or H > MOST_HEADS:
        raise ValueError(
            f"{H} index heads of {D} dimensions: the Triton kernels take up to {MOST_HEADS} heads of up to "
            f"{LARGEST_HEAD}; choose backend='torch'"
        )
    scales = None
    if fp8:
        check_fp8(q)
        (q, of_queries), (k, scales) = quantised(q), quantised(k)
        weights = weights * of_queries
    if k.stride()[1:] != (D, 1) or k.stride(0) % D:  # those of a cache, with room behind them, are read where they lie
        k = k.contiguous()
    return lightning_indexer(q.contiguous(), k, weights.contiguous(), cu_seqlens, topk, causal, scales)
