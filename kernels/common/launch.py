"""Launches of Triton kernels: dtypes that they take, block sizes for the GPU at hand, and the launch itself.

To add a GPU, add its rows to BLOCK_SIZES: the tests compile every kernel for every architecture, head size and dtype,
and check that its shared memory suffices.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class BlockSizes(NamedTuple):
    """The block that a program holds, its warps and its pipeline stages.

    Attributes:
        rows, columns: of the block; of what, the comment above an operation's rows says.
        forward_warps, backward_warps: warps of a program in the forward and in the backward pass.
        stages: pipeline stages; of the delta rule in the kernels that go through a sequence, the others have one.
    """

    rows: int
    columns: int
    forward_warps: int
    backward_warps: int
    stages: int


ANY_SIZE = math.inf

# Operation, least compute capability that a row is for, largest head size that it is for.
BLOCK_SIZES: dict[str, dict[tuple[int, int], dict[float, BlockSizes]]] = {
    # Tokens and channels.
    "causal_conv1d": {
        # One warp, whose threads have four channels each: programs share nothing, and many of them hide memory.
        (8, 0): {
            ANY_SIZE: BlockSizes(rows=64, columns=128, forward_warps=1, backward_warps=1, stages=1),
        },
    },
    # Value dimensions that the gradients of a chunk take at a time, and value dimensions of a state; sizes of heads
    # as of the gated delta rule.
    "delta_rule": {
        (8, 0): {
            64: BlockSizes(rows=32, columns=32, forward_warps=4, backward_warps=8, stages=2),
            128: BlockSizes(rows=32, columns=32, forward_warps=8, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=16, columns=16, forward_warps=8, backward_warps=8, stages=1),
        },
        (9, 0): {
            64: BlockSizes(rows=32, columns=32, forward_warps=4, backward_warps=8, stages=2),
            128: BlockSizes(rows=32, columns=32, forward_warps=4, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=16, columns=16, forward_warps=8, backward_warps=8, stages=1),
        },
    },
    # Value dimensions that the gradients of a chunk take at a time, and value dimensions of a state. Sizes of heads in
    # half precision; in float32 a head counts as one of twice its size.
    "gated_delta_rule": {
        (8, 0): {
            64: BlockSizes(rows=32, columns=32, forward_warps=4, backward_warps=8, stages=2),
            128: BlockSizes(rows=16, columns=32, forward_warps=8, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=16, columns=16, forward_warps=8, backward_warps=8, stages=1),
        },
        (9, 0): {
            64: BlockSizes(rows=32, columns=32, forward_warps=4, backward_warps=8, stages=2),
            128: BlockSizes(rows=16, columns=32, forward_warps=4, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=16, columns=16, forward_warps=8, backward_warps=8, stages=1),
        },
        (10, 0): {
            64: BlockSizes(rows=32, columns=32, forward_warps=8, backward_warps=8, stages=2),
            128: BlockSizes(rows=16, columns=32, forward_warps=8, backward_warps=8, stages=2),
            256: BlockSizes(rows=16, columns=16, forward_warps=8, backward_warps=8, stages=1),
            # More warps would take more tensor memory than there is.
            ANY_SIZE: BlockSizes(rows=16, columns=16, forward_warps=8, backward_warps=2, stages=1),
        },
    },
    # Rows, and numbers of a row of the output.
    "grouped_matmul": {
        (8, 0): {
            ANY_SIZE: BlockSizes(rows=128, columns=128, forward_warps=8, backward_warps=8, stages=3),
        },
    },
    # Queries and keys.
    "lightning_indexer": {
        (8, 0): {
            128: BlockSizes(rows=32, columns=128, forward_warps=4, backward_warps=4, stages=2),
            256: BlockSizes(rows=32, columns=64, forward_warps=4, backward_warps=4, stages=1),
        },
        (9, 0): {
            128: BlockSizes(rows=32, columns=128, forward_warps=4, backward_warps=4, stages=3),
            256: BlockSizes(rows=32, columns=64, forward_warps=4, backward_warps=4, stages=2),
        },
    },
    # Heads and keys.
    "sparse_attention": {
        (8, 0): {
            64: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=4, stages=2),
            128: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=4, stages=2),
            256: BlockSizes(rows=32, columns=32, forward_warps=4, backward_warps=4, stages=2),
            ANY_SIZE: BlockSizes(rows=32, columns=32, forward_warps=8, backward_warps=8, stages=1),
        },
        (9, 0): {
            64: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=4, stages=3),
            128: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=4, stages=3),
            256: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=64, columns=32, forward_warps=8, backward_warps=8, stages=2),
        },
        # 64 rows of 576 would fill the shared memory with what goes to the tensor memory of Blackwell.
        (10, 0): {
            64: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=4, stages=3),
            128: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=4, stages=3),
            256: BlockSizes(rows=64, columns=64, forward_warps=4, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=32, columns=32, forward_warps=8, backward_warps=8, stages=2),
        },
    },
    # Channels of a state, and numbers per channel. The size is that of a state of half precision in numbers per
    # channel; float32, whose products take three times the registers, is any other size.
    "ssd": {
        (8, 0): {
            128: BlockSizes(rows=64, columns=64, forward_warps=8, backward_warps=8, stages=3),
            256: BlockSizes(rows=32, columns=64, forward_warps=8, backward_warps=8, stages=2),
            ANY_SIZE: BlockSizes(rows=16, columns=64, forward_warps=8, backward_warps=8, stages=1),
        },
    },
}


def capability(x: Tensor) -> tuple[int, int]:
    """Return the compute capability of the GPU that x is on; (0, 0) for Triton's interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)


def fill_card(block: int, size: int, others: int, x: Tensor) -> int:
    """Return the block of a dimension of this size: `block`, or the largest half of halves, down to 16, with which
    there are as many programs, `others` times those of the dimension, as the GPU of x has multiprocessors."""
    there = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 0
    while block > 16 and others * -(-size // block) < there:
        block //= 2
    return block


def block_sizes(operation: str, size: float, x: Tensor) -> BlockSizes:
    """Return the row of an operation for heads of this size on the device of x; a GPU older than all rows takes the
    oldest."""
    table = BLOCK_SIZES[operation]
    rows = table[max(least for least in table if least <= max(capability(x), min(table)))]
    return rows[min(largest for largest in rows if largest >= size)]


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below n, at least 1."""
    return 1 << (max(n, 1) - 1).bit_length()


def block_for(size: int, most: int) -> int:
    """Return the block of a dimension of this size in a matrix product: a power of two from 16 to `most`."""
    return min(most, max(16, power_of_two(size)))


def chunk_for(K: int, V: int, dtype: torch.dtype) -> int:
    """Return the tokens of a chunk of the delta rules, writes where a token has several: wide heads leave memory for
    half as many, in float32 above 32 dimensions already, since its products are of three parts."""
    return 64 if max(K, V) <= (32 if dtype == torch.float32 else 128) else 32


def precision_for(dtype: torch.dtype) -> str:
    """Return the precision of `tl.dot`: TF32; for float32 in three parts that together keep its precision."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def check_dtype(x: Tensor) -> None:
    """Check that the Triton kernels take tensors like x.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    if x.dtype not in DTYPES:
        raise ValueError(
            f"the Triton kernels take float32, bfloat16 and float16, not {x.dtype}: choose backend='torch'"
        )


def check_fp8(x: Tensor) -> None:
    """Check that the GPU that x is on multiplies fp8; Triton's interpreter does.

    Raises:
        ValueError: for a compute capability below 8.9.
    """
    found = capability(x)
    if (0, 0) < found < (8, 9):
        raise ValueError(
            f"fp8 takes a GPU of compute capability 8.9 or higher, not {found[0]}.{found[1]}: choose backend='torch', "
            "or precision=None"
        )


def launch_kernel(
    kernel, *tensors: Tensor | None, grid: tuple[int, ...], named: dict, warps: int = 4, stages: int = 3
) -> None:
    """Launch a kernel on the device of its tensors.

    Args:
        kernel: a function of `triton.jit`.
        tensors: its first arguments, None where one is left out.
        grid: programs in each dimension.
        named: sizes, chunks and constants by name; the kernel is given those that it names after `tensors`.
        warps, stages: warps of a program and pipeline stages, as Triton's own defaults.
    """
    others = {name: named[name] for name in kernel.arg_names[len(tensors) :]}
    with torch.cuda.device_of(next(x for x in tensors if x is not None)):
        kernel[grid](*tensors, **others, num_warps=warps, num_stages=stages)
