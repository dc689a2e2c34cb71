"""The Triton kernels as a PyTorch operator.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, R query heads per key-value head, D and
V dimensions of keys and values, K indices of a query, W of a row of the gradients.
"""

import torch
from torch import Tensor

from kernels.common.launch import block_for, block_sizes, check_dtype, launch_kernel, power_of_two, precision_for
from kernels.sparse import triton_kernels as kernels
from kernels.sparse.operators import register
from kernels.sparse.rows import row_steps, where_they_lie
from kernels.sparse.ways import COUNT, WORKSPACE, names_many

LARGEST_HEAD = 256  # where values are numbers of their own
LARGEST_PART = 256  # of a value that is the beginning of its key
LARGEST_LATENT = 512, 576  # a value that is the beginning of its key, and the key
SUMMED = 32  # pairs that a program adds up at once, of
COLUMNS = 128  # numbers
TILE, TILE_ROWS = 64, 32  # keys that a program holds, and rows of queries that it takes at once


def _sizes(q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, value_dim: int, scale: float, backward: bool):
    """Return what the kernels take by name, and warps and stages of a program."""
    (_, T, H, D), (_, S, G, _), K = q.shape, k.shape, indices.shape[2]
    sizes, shared, exact = block_sizes("sparse_attention", D, q), v is None, q.dtype == torch.float32
    if shared:
        A, C = min(value_dim, LARGEST_PART), D - value_dim
    else:  # the largest power of two, and the rest
        A, C = D if D < 16 or power_of_two(D) == D else power_of_two(D) // 2, 0
    parts = {"A": A, "B": D - A - C, "C": C}
    named = {"T": T, "S": S, "H": H, "G": G, "K": K, "scale": scale, "SHARED": shared, "D": D, "V": value_dim}
    named |= parts | {"W": D if shared else D + value_dim, "PRECISION": precision_for(q.dtype)}
    numbers = parts | {"V": value_dim, "K": K}
    named |= {f"BLOCK_{name}": max(16, power_of_two(number)) for name, number in numbers.items()}
    # float32 takes twice the room, and tensor cores make less of it; the sums of dq over more heads would spill.
    rows = 16 if exact else min(sizes.rows, 32) if backward and D > LARGEST_HEAD else sizes.rows
    named |= {"BLOCK_M": block_for(H // G, rows)}
    named |= {"BLOCK_N": max(16, sizes.columns // (2 if exact else 1))}
    named |= dict(zip(("of_sequence", "of_token", "of_head"), row_steps(k), strict=True))
    return named, {"warps": sizes.backward_warps if backward else sizes.forward_warps, "stages": sizes.stages}


def forward(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Return out and lse, as `gathered.forward`."""
    k, v = where_they_lie(k, v)
    named, options = _sizes(q, k, v, indices, value_dim, scale, backward=False)
    (B, T, H, _), G = q.shape, k.shape[2]
    out = torch.empty(B, T, H, value_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    grid = (B * T, G, -(-(H // G) // named["BLOCK_M"]))
    v = k if v is None else v
    launch_kernel(kernels.forward_kernel, q, k, v, indices, out, lse, grid=grid, named=named, **options)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, as `gathered.backward`."""
    k, v = k.contiguous(), None if v is None else v.contiguous()
    if v is not None and names_many(q, k, indices):
        return _backward_by_tiles(q, k, v, indices, out, lse, dout, dlse, scale)
    return _backward_by_pairs(q, k, v, indices, out, lse, dout, dlse, scale)


def _backward_by_tiles(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients: of keys and values from all queries, by tiles of keys.

    The queries of a sequence are taken in parts, each summed by itself: 8 B S G W bytes for each of them. A query that
    is NaN makes the gradients of all keys of its sequence so, those too that it does not name.
    """
    named, options = _sizes(q, k, v, indices, out.shape[3], scale, backward=True)
    (B, T, _, D), (S, G), W = q.shape, k.shape[1:3], named["W"]
    dq, deltas = torch.empty_like(q), torch.empty_like(lse)
    grid = (B * T, G, -(-(q.shape[2] // G) // named["BLOCK_M"]))
    launch_kernel(
        kernels.queries_gradient_kernel, q, k, v, indices, out, lse, dout, dlse, dq, deltas, None, None, grid=grid,
        named=named | {"first": 0}, **options,
    )  # fmt: skip
    part = queries_of_part(T)
    parts = -(-T // part)
    sums = torch.empty(parts, B, S, G, W, dtype=torch.float32, device=q.device)
    launch_kernel(
        kernels.tiles_gradient_kernel, q, k, v, _counts(indices, S), lse, dout, deltas, sums,
        grid=(-(-S // TILE), B * G, parts), warps=8, stages=2,
        named=named | {"PART": part, "BLOCK_M": TILE_ROWS, "BLOCK_N": TILE},
    )  # fmt: skip
    dk, dv = sums.sum(0).split([D, W - D], dim=-1)
    return dq, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def queries_of_part(T: int) -> int:
    """Return how many queries a program goes through that holds a tile of keys."""
    return min(T, 1024)


def _counts(indices: Tensor, S: int) -> Tensor:
    """Return how often each query names each key, [B, T, S + 1]; in the last column, none."""
    counts = torch.zeros(*indices.shape[:2], S + 1, dtype=COUNT, device=indices.device)
    place = torch.where((indices >= 0) & (indices < S), indices, S).flatten(0, 1)
    first = torch.arange(len(place), device=place.device)[:, None] * (S + 1)
    one = torch.ones((), dtype=COUNT, device=place.device).expand(place.numel())
    counts.view(-1).scatter_add_(0, (first + place).flatten(), one)  # of integers: in any order the same
    return counts


def _backward_by_pairs(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients: of keys and values from rows of the pairs that are named.

    Some queries at a time, as many as WORKSPACE has room for: each pair's gradients are written, W numbers in the
    dtype of the inputs, and read once by the sum over the pairs of a key, in an order that a sort gives. That is
    2 B T K G W numbers in all, beside 4 B T K H for weights and gradients of scores, and about 110 bytes of each of
    the B T K pairs for the sort.
    """
    named, options = _sizes(q, k, v, indices, out.shape[3], scale, backward=True)
    (B, T, H, D), (S, G), K, V, W = q.shape, k.shape[1:3], indices.shape[2], out.shape[3], named["W"]
    heads, BLOCK_N, BLOCK_W = -(-(H // G) // named["BLOCK_M"]), block_for(K, 64), block_for(W, COLUMNS)
    blocks = {"BLOCK_W": BLOCK_W}
    dq, sums = torch.empty_like(q), torch.zeros(B, S, G, W, dtype=torch.float32, device=q.device)
    queries = min(B * T, queries_at_once(K, G * W + 2 * H, q.element_size()))
    shapes = (queries, H, K), (queries, H, K), (queries, G, K, W)
    weights, dscores, gradients = (torch.empty(shape, dtype=q.dtype, device=q.device) for shape in shapes)
    for first in range(0, B * T, queries):
        n = min(queries, B * T - first)
        launch_kernel(
            kernels.queries_gradient_kernel, q, k, k if v is None else v, indices, out, lse, dout, dlse, dq, None,
            weights, dscores, grid=(n, G, heads), named=named | {"first": first}, **options,
        )  # fmt: skip
        for of_keys, of_values in [(True, True)] if v is None else [(True, False), (False, True)]:
            launch_kernel(
                kernels.pairs_gradient_kernel, q, dout, weights, dscores, gradients,
                grid=(n, G * -(-(D if of_keys else V) // BLOCK_W), -(-K // BLOCK_N)),
                named=named | {"first": first, "KEYS": of_keys, "VALUES": of_values} | blocks | {"BLOCK_N": BLOCK_N},
            )  # fmt: skip
        order, begins = _sort_by_key(indices.flatten(0, 1)[first : first + n], first, T, S, B)
        launch_kernel(
            kernels.sums_kernel, gradients, order, begins, sums, grid=(B * S, G, -(-W // BLOCK_W)),
            named=named | blocks | {"BLOCK_N": SUMMED},
        )  # fmt: skip
    dk, dv = sums.split([D, W - D], dim=-1)
    return dq, dk.to(k.dtype).contiguous(), k.new_empty(0) if v is None else dv.to(v.dtype).contiguous()


def queries_at_once(K: int, numbers: int, bytes: int) -> int:
    """Return how many queries have the gradients of their pairs in memory, so many numbers of each pair."""
    return max(1, WORKSPACE // max(1, K * numbers * bytes))


def _sort_by_key(indices: Tensor, first: int, T: int, S: int, B: int) -> tuple[Tensor, Tensor]:
    """Return the places of the pairs of indices [queries, K], which begin with query `first` of all, sorted by key; and
    where those of each key begin among them, [B S + 1] int32. Pairs of no key come last. Nothing waits for the GPU."""
    sequence = torch.arange(first, first + len(indices), device=indices.device, dtype=torch.int32) // T
    exist = (indices >= 0) & (indices < S)
    keys, order = torch.where(exist, indices + sequence[:, None] * S, B * S).flatten().sort(stable=True)
    each = torch.arange(B * S + 1, device=indices.device, dtype=torch.int32)
    return order, torch.searchsorted(keys, each, out_int32=True)


operator = register("sparse_attention", forward, backward)


def sparse_attention_triton(
    q: Tensor, k: Tensor, v: Tensor | None, indices: Tensor, scale: float, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Return out and lse, arguments as those of `gathered.forward`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or too large heads.
    """
    check_dtype(q)
    D = q.shape[3]
    if v is None and (value_dim > LARGEST_LATENT[0] or D > LARGEST_LATENT[1]):
        raise ValueError(
            f"keys of {D} dimensions that hold values of {value_dim}: the Triton kernels take up to "
            f"{LARGEST_LATENT[1]} and {LARGEST_LATENT[0]}; choose backend='torch'"
        )
    if v is not None and max(D, value_dim) > LARGEST_HEAD:
        raise ValueError(
            f"heads of {D} and {value_dim} dimensions: the Triton kernels take up to {LARGEST_HEAD}, or values that "
            "are views of the beginning of their keys; choose backend='torch'"
        )
    return operator(q, k, v, indices, scale, value_dim)
