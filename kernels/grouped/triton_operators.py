"""Launches of the Triton kernels of the grouped product; `operators.py` registers what they make with PyTorch.

Shape letters: N rows, D numbers of a row, E experts, F numbers of a row of the output.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.common.launch import ANY_SIZE, block_for, block_sizes, check_dtype, launch_kernel, power_of_two
from kernels.common.packing import chunk_count
from kernels.grouped import triton_kernels as kernels

INNER_BYTES = 128  # of a row that one step of a sum takes


def _named(x: Tensor, counts: Tensor, D: int, F: int) -> tuple[dict, dict]:
    """Return sizes and blocks by name, and the warps and stages of a launch."""
    check_dtype(x)
    sizes, inner = block_sizes("grouped_matmul", ANY_SIZE, x), INNER_BYTES // x.element_size()
    named: dict[str, Any] = {"N": len(x), "E": len(counts), "D": D, "F": F, "BLOCK_E": power_of_two(len(counts) + 1)}
    named |= {"BLOCK_D": inner, "BLOCK_N": inner, "BLOCK_F": block_for(F, sizes.columns)}
    exact = x.dtype == torch.float32
    named["PRECISION"] = "tf32x3" if exact else "ieee"
    # Three products of float32 parts leave registers for half the rows.
    named["ROWS"] = sizes.rows // 2 if exact else sizes.rows
    return named, {"warps": sizes.forward_warps, "stages": sizes.stages}


def triton_products(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Return y [N, F] for x [N, D], weight [E, D, F] and counts [E].

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    E, D, F = weight.shape
    named, launch = _named(x, counts, D, F)
    # Few rows per expert fill no large block.
    rows = named["BLOCK_N"] = block_for(len(x) // max(E, 1), named["ROWS"])
    named["TRANSPOSED"] = weight.mT.is_contiguous()
    weight = weight if named["TRANSPOSED"] else weight.contiguous()
    y = torch.empty(len(x), F, dtype=x.dtype, device=x.device)
    if y.numel():
        grid = (chunk_count(len(x), E + 1, rows), -(-F // named["BLOCK_F"]))
        launch_kernel(kernels.products_kernel, x.contiguous(), weight, y, counts, grid=grid, named=named, **launch)
    return y


def triton_outer_products(x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Return x^T y of each expert's rows, [E, D, F], for x [N, D], y [N, F] and counts [E].

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    (D, F), E = (x.shape[1], y.shape[1]), len(counts)
    named, launch = _named(x, counts, D, F)
    named["BLOCK_D"] = block_for(D, named["ROWS"])
    sums = torch.empty(E, D, F, dtype=x.dtype, device=x.device)
    if sums.numel():
        grid = (-(-D // named["BLOCK_D"]), -(-F // named["BLOCK_F"]), E)
        inputs = (x.contiguous(), y.contiguous(), sums, counts)
        launch_kernel(kernels.outer_products_kernel, *inputs, grid=grid, named=named, **launch)
    return sums
