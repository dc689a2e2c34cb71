"""The Triton kernels as PyTorch operators: known to torch.compile and to FlopCounterMode.

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
from kernels.indexer.fp8 import EXPONENT, FP8, LARGEST, LEAST_MAXIMUM, MANTISSA
from kernels.indexer.ranges import visible_ranges

LARGEST_HEAD = 256
MOST_HEADS = 128
LARGEST_TILE = {torch.float32: (64, 32)}  # keys and dimensions at a time, of a product in three parts
FP8_DIMENSIONS = 32  # that tensor cores sum over at once
SELECT_BLOCK, SELECT_WARPS = 2048, 8  # scores that a program selects from at a time
QUANTISED = 4096  # numbers that a program rounds to fp8


def quantised_rows(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return x [..., D] in fp8 with the scales [...], as `fp8.quantised`; the scales times weights [...], if any."""
    x, D = x.contiguous(), x.shape[-1]
    numbers, scales = torch.empty_like(x, dtype=torch.uint8), x.new_empty(x.shape[:-1], dtype=torch.float32)
    columns = power_of_two(D)
    N, rows = scales.numel(), max(1, QUANTISED // columns)
    named = {"N": N, "D": D, "BLOCK_R": rows, "BLOCK_D": columns}
    named |= {"LEAST": LEAST_MAXIMUM, "LARGEST": LARGEST, "MANTISSA": MANTISSA, "EXPONENT": EXPONENT}
    if N:
        grid = (-(-N // rows),)
        launch_kernel(kernels.quantise_kernel, x, weights, numbers, scales, grid=grid, named=named, stages=1)
    return numbers.view(FP8), scales


@torch.library.custom_op("archipelago::lightning_indexer_keys", mutates_args=())
def lightning_indexer_keys(k: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys in fp8 and their scales, shapes as in `kernels.lightning_indexer_keys`."""
    return quantised_rows(k)


@lightning_indexer_keys.register_fake
def _(k):
    return k.new_empty(k.shape, dtype=FP8), k.new_empty(k.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("archipelago::lightning_indexer", mutates_args=())
def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool,
    fp8: bool = False, key_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the picks [B, T, topk], shapes as in `kernels.lightning_indexer`; with fp8 of q rounded to it, and of k
    where it has no key_scale yet."""
    (B, T, H, D), S = q.shape, k.shape[1]
    if fp8:
        q, weights = quantised_rows(q, weights)
        k, key_scale = quantised_rows(k) if key_scale is None else (k, key_scale)
    # Those of a cache, with room behind them, are read where they lie.
    if k.stride()[1:] != (D, 1) or k.stride(0) % D:
        k = k.contiguous()
    if key_scale is not None and key_scale.stride() != (k.stride(0) // D, 1):
        k, key_scale = k.contiguous(), key_scale.contiguous()
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
        run(kernels.scores_kernel, q, k, weights, key_scale, scores, grid=grid, **options)
        named["BLOCK_S"] = SELECT_BLOCK
        run(kernels.select_kernel, scores, out, grid=(rows, B), warps=SELECT_WARPS, stages=1)
    return out


lightning_indexer.register_fake(empty_picks)
register_flop_formula(torch.ops.archipelago.lightning_indexer)(count_flops)


def lightning_indexer_keys_triton(k: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys in fp8 and their scales, shapes as in `kernels.lightning_indexer_keys`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or a GPU whose tensor cores have no fp8.
    """
    check_dtype(k)
    check_fp8(k)
    return lightning_indexer_keys(k)


def lightning_indexer_triton(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool, fp8: bool,
    key_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the picks [B, T, topk], shapes as in `kernels.lightning_indexer`.

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
    if fp8:
        check_fp8(q)
    return lightning_indexer(q.contiguous(), k, weights.contiguous(), cu_seqlens, topk, causal, fp8, key_scale)
