"""The keys that each query may read: one range per query, whatever makes it so.

Shape letters: T queries, S keys, N packed documents.
"""

import torch
from torch import Tensor


def visible_ranges(T: int, S: int, causal: bool, cu_seqlens: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first key that each query may read and the one behind its last, [T] int32 each, on the device of
    `like` and without waiting for it. The queries are the last T of the S tokens; boundaries beyond the tokens are
    taken as the ends of the row, so that nothing outside is read."""
    place = torch.arange(S - T, S, device=like.device, dtype=torch.int32)
    if cu_seqlens is None:
        return torch.zeros_like(place), place + 1 if causal else torch.full_like(place, S)
    bounds = cu_seqlens.to(torch.int32).clamp(0, S)
    document = (torch.searchsorted(bounds, place, right=True) - 1).clamp(0, len(bounds) - 2)
    return bounds[document], place + 1 if causal else bounds[document + 1]


def pair_count(T: int, S: int, causal: bool) -> int:
    """Return the number of pairs of a query and a key that it may read, in one document."""
    return T * S - T * (T - 1) // 2 if causal else T * S
