"""The ways in which sparse attention is computed, by how many of the keys queries name: Triton sums the gradients of
keys and values by tiles of keys or by rows of the pairs that are named; a CPU masks keys or gathers them.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, K indices of a query.
"""

import torch
from torch import Tensor

# Bytes in which the gradients of the pairs of some queries lie before they are summed by key, or the counts of tiles.
WORKSPACE = 1 << 30
COUNT = torch.int32  # of how often a query names a key
# Tiles cost 4 H / G FLOPs for each number of a key, of every query and key; a row of a pair, of those that are named,
# costs 4 bytes for it, of which an H200 moves one in the time of some 200 FLOPs in half precision.
WORTH = 200

FEW_QUERIES = 16  # for which a CPU gathers keys in any case


def names_most(indices: Tensor, S: int) -> bool:
    """Return whether queries on a CPU name so many of S keys that products with all of them, and a mask, are cheaper
    than to gather them: half, from which on they were so with any number of heads."""
    T, K = indices.shape[1:]
    return indices.device.type == "cpu" and T >= FEW_QUERIES and 2 * K >= S


def names_many(q: Tensor, k: Tensor, indices: Tensor) -> bool:
    """Return whether, in half precision, queries name so many of the keys that the gradients of these are cheaper tile
    by tile, and how often each query names each key has room in WORKSPACE."""
    (B, T, H, _), (S, G), K = q.shape, k.shape[1:3], indices.shape[2]
    cheaper = q.dtype != torch.float32 and S * (H // G) <= WORTH * K
    return cheaper and B * T * (S + 1) * COUNT.itemsize <= WORKSPACE
