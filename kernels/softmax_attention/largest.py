"""The largest score of each head over the pairs that are seen, in blocks of queries.

Shape letters: B sequences, T queries, S keys, H query heads in groups of R that share one of G key-value heads, D key
dimensions, W queries of a block, N the keys that they read.
"""

import math

import torch
from torch import Tensor

from kernels.softmax_attention.block_rows import block_for
from kernels.softmax_attention.pairs import Pairs


@torch.no_grad()
def largest_scores(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    runs: tuple[Tensor, Tensor] | None = None,
    scale: float,
) -> Tensor:
    """Return the largest scale q_t . k_s of each head over the queries t and the keys s that they see, [H] float32.

    Arguments as in `attention`, which checks them. It takes the FLOPs of the scores, 2 D of each pair and head, and
    memory for those of one block of queries. It waits for no device.
    """
    pairs = Pairs(q.shape[1], k.shape[1], causal, window, *(runs or (None, None)))
    G = k.shape[2]
    begins, ends = pairs.runs(q.device)
    q_BGRTD, k_BG1SD = q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4), k.transpose(1, 2)[:, :, None]
    found_GR = q.new_full(q_BGRTD.shape[1:3], -math.inf, dtype=torch.float32)
    size = block_for(pairs.T)
    for first in range(0, pairs.T, size):
        end = min(first + size, pairs.T)
        low, high = (pairs.ends_of(first)[0], pairs.ends_of(end - 1)[1]) if runs is None else (0, pairs.S)
        key_N = torch.arange(low, high, device=q.device)
        seen_BWN = ((begins[..., first:end, None] <= key_N) & (key_N < ends[..., first:end, None])).any(0)
        scores = q_BGRTD[..., first:end, :] @ k_BG1SD[..., low:high, :].mT
        scores.masked_fill_(~seen_BWN[:, None, None], -math.inf)
        found_GR = torch.maximum(found_GR, scores.amax((0, 3, 4)).float())
    return scale * found_GR.flatten()
