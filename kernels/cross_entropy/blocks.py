"""The cross entropy of a linear head in blocks of tokens, on any device, and the count of its FLOPs.

The gradients are made together with the losses, while the logits of a block are there: three products in all, as many
as with all logits in memory. The gradient of the head is summed in float32.

Shape letters: N tokens, D numbers of a hidden vector, V token ids.
"""

import torch
from torch import Tensor

COLUMNS = 8192  # token ids whose part of the head's gradient in half precision is in memory at once


def linear_cross_entropy_flops(N: int, D: int, V: int) -> int:
    """Return the FLOPs of the logits of N tokens; each gradient costs as many again."""
    return 2 * N * D * V


def rows_of_a_block(N: int) -> int:
    """Return how many tokens have their logits in memory at once: an eighth, of a size that products are fast with."""
    return min(512, max(128, -(-N // 8)))


def block_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weights: Tensor, soft_cap: float | None,
    z_loss: float, hidden_wanted: bool, weight_wanted: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the losses [N] of the tokens that count, and the gradients of their weighted sum: of hidden vectors
    [N, D], of the head [V, D] and of its bias [V]; an empty one for each that is not wanted or not there. Products are
    of numbers of `dtype`, all else is in float32 or wider."""
    (N, D), V, wide = hidden.shape, len(weight), torch.promote_types(dtype, torch.float32)
    losses, weights = hidden.new_zeros(N, dtype=wide), token_weights.to(wide)
    dhidden = torch.zeros_like(hidden) if hidden_wanted else hidden.new_empty(0)
    dweight = weight.new_zeros(V, D, dtype=wide) if weight_wanted else weight.new_empty(0)
    dbias = weight.new_zeros(V if weight_wanted and bias is not None else 0, dtype=wide)
    counted = torch.arange(N, device=hidden.device) if hidden.is_cuda else weights.nonzero()[:, 0]
    rows, head = rows_of_a_block(len(counted)), weight.to(dtype)
    logits = hidden.new_empty(min(rows, len(counted)), V, dtype=wide)
    low = logits if dtype == wide else logits.new_empty(logits.shape, dtype=dtype)
    for part in counted.split(rows):
        n, h, w, y = len(part), hidden[part].to(dtype), weights[part], targets[part][:, None]
        z, slopes = logits[:n], None
        d = z if low is logits else low[:n]
        torch.mm(h, head.T, out=d)
        if d is not z:
            z.copy_(d)
        if bias is not None:
            z.add_(bias)
        if soft_cap is not None:
            z.div_(soft_cap).tanh_()
            slopes = 1 - z.square()
            z.mul_(soft_cap)
        most, of_target = z.amax(-1), z.gather(1, y)[:, 0]
        sums = z.sub_(most[:, None]).exp_().sum(-1)
        total = most + sums.log()
        losses[part] = total - of_target + z_loss * total.square()
        if not (hidden_wanted or weight_wanted):
            continue
        z.mul_((w * (1 + 2 * z_loss * total) / sums)[:, None]).scatter_add_(1, y, -w[:, None])
        if slopes is not None:
            z.mul_(slopes)
        if d is not z:
            d.copy_(z)
        if hidden_wanted:
            dhidden[part] = (d @ head).to(hidden.dtype)
        if weight_wanted and dtype == wide:
            dweight.addmm_(d.T, h)
        elif weight_wanted:
            for some, columns in zip(dweight.split(COLUMNS), d.split(COLUMNS, dim=1), strict=True):
                some.add_(columns.T @ h)
        if len(dbias):
            dbias.add_(z.sum(0))
    return losses.where(weights != 0, 0.0), dhidden, dweight.to(weight.dtype), dbias
