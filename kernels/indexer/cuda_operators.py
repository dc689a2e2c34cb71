"""The kernels in CUDA C++ for Hopper as a PyTorch operator: known to torch.compile and to FlopCounterMode.

The library is built on first use by PyTorch's own tools, which keep it for the next process. It knows nothing of
PyTorch: pointers and sizes go in through ctypes.

Shape letters: B rows of the batch, T queries, R of them in a block, S keys, H heads of D dimensions.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.indexer.blocks import count_flops, empty_picks, queries_at_once
from kernels.indexer.ranges import visible_ranges

SOURCE = Path(__file__).parent / "cuda" / "lightning_indexer.cu"
FLAGS = ["-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a"]
MOST_HEADS, LARGEST_HEAD = 64, 128
QUERIES = 64  # that a block of threads goes through


@cache
def build() -> ctypes.CDLL:
    """Return the library, built where it is not yet there.

    Raises:
        RuntimeError: where it does not compile.
    """
    from torch.utils import cpp_extension  # takes half a second

    path = cpp_extension.load(
        "archipelago_lightning_indexer", [str(SOURCE)], extra_cuda_cflags=FLAGS, is_python_module=False
    )
    return declared(ctypes.CDLL(str(path)))


def declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Return the library with the types of its functions' arguments."""
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.lightning_indexer_scores.argtypes = [pointer] * 6 + [number] * 8 + [pointer]
    library.lightning_indexer_select.argtypes = [pointer] * 4 + [number] * 7 + [pointer]
    library.lightning_indexer_error.argtypes = [number]
    library.lightning_indexer_error.restype = ctypes.c_char_p
    return library


def check(library: ctypes.CDLL, error: int) -> None:
    """Check what a launch has returned.

    Raises:
        RuntimeError: for any error, in CUDA's words.
    """
    if error:
        raise RuntimeError(f"the CUDA kernels of lightning_indexer: {library.lightning_indexer_error(error).decode()}")


@torch.library.custom_op("archipelago::lightning_indexer_cuda", mutates_args=())
def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool
) -> Tensor:
    """Return the picks [B, T, topk], shapes as in `kernels.lightning_indexer`; weights in float32."""
    (B, T, H, D), S, library = q.shape, k.shape[1], build()
    ranges = (None, None) if cu_seqlens is None else visible_ranges(T, S, causal, cu_seqlens, q)
    begins, ends = (None if x is None else x.data_ptr() for x in ranges)
    R = queries_at_once(B, T, S, QUERIES)
    scores = torch.empty(B, R, S, dtype=torch.float32, device=q.device)
    out = torch.empty(B, T, topk, dtype=torch.int32, device=q.device)
    tensors = [x.data_ptr() for x in (q, k, weights, scores)]
    with torch.cuda.device_of(q):
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, T, R):
            block = first, min(R, T - first), causal, stream
            check(library, library.lightning_indexer_scores(*tensors, begins, ends, B, T, S, H, D, *block))
            picks = scores.data_ptr(), out.data_ptr(), begins, ends
            check(library, library.lightning_indexer_select(*picks, B, T, S, topk, *block))
    return out


lightning_indexer.register_fake(empty_picks)
register_flop_formula(torch.ops.archipelago.lightning_indexer_cuda)(count_flops)


def lightning_indexer_cuda(
    q: Tensor, k: Tensor, weights: Tensor, cu_seqlens: Tensor | None, topk: int, causal: bool
) -> Tensor:
    """Return the picks [B, T, topk], shapes as in `kernels.lightning_indexer`.

    Raises:
        ValueError: for tensors that are not on a Hopper GPU, a dtype other than bfloat16, more than 64 heads, or
            dimensions that are more than 128 or no multiple of 8; and where there is no nvcc to build with.
    """
    H, D = q.shape[2:]
    if q.dtype != torch.bfloat16 or H > MOST_HEADS or D > LARGEST_HEAD or D % 8:
        raise ValueError(
            f"backend 'cuda' of lightning_indexer takes bfloat16, up to {MOST_HEADS} heads of up to {LARGEST_HEAD} "
            f"dimensions, a multiple of 8; got {q.dtype}, {H} heads of {D}: choose backend='triton'"
        )
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        device = torch.cuda.get_device_name(q.device) if q.is_cuda else q.device.type
        raise ValueError(
            f"backend 'cuda' of lightning_indexer is for Hopper GPUs (compute capability 9.0), not for {device}: "
            "choose backend='auto'"
        )
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None:
        raise ValueError(
            "backend 'cuda' of lightning_indexer is built with nvcc, which is not found: install the CUDA toolkit and "
            "set CUDA_HOME, or choose backend='triton'"
        )
    return lightning_indexer(q.contiguous(), k.contiguous(), weights.float().contiguous(), cu_seqlens, topk, causal)
