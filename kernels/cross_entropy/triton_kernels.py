"""What becomes of the logits of a block of tokens, in Triton: losses, and in place of the logits their gradients.

The products around it are those of `kernels.grouped`, with the tokens that count as the rows of one expert: rows behind
them cost nothing, and nobody waits to know how many there are.

Shape letters: V token ids.
"""

import triton
import triton.language as tl


@triton.jit
def capped(z, soft_cap):
    """Return cap tanh(z / cap), sharp near 0 too, where a quotient of exponentials is not."""
    x = z / soft_cap
    e, square = tl.exp(-2 * tl.abs(x)), x * x
    far = tl.where(x < 0, e - 1, 1 - e) / (1 + e)
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return soft_cap * tl.where(tl.abs(x) < 0.3, near, far)


@triton.jit
def logits_at(logits, bias, columns, V: tl.constexpr, soft_cap, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Return a row's logits at these columns as they enter the loss, in float32; behind the last minus infinity."""
    exist = columns < V
    z = tl.load(logits + columns, mask=exist, other=0.0).to(tl.float32)
    if BIAS:
        z += tl.load(bias + columns, mask=exist, other=0.0).to(tl.float32)
    if CAPPED:
        z = capped(z, soft_cap)
    return tl.where(exist, z, -float("inf"))


@triton.jit
def losses_kernel(
    logits, bias, targets, weights, losses, counts, soft_cap, z_loss, V: tl.constexpr, BLOCK_V: tl.constexpr,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Store the loss of a row of logits [rows, V], and where GRADIENT in its place that of its weighted loss. Rows from
    counts [1] on are left as they are, their losses are 0."""
    row = tl.program_id(0)
    counts_here = row < tl.load(counts)
    if counts_here:
        logits += row.to(tl.int64) * V
        target = tl.load(targets + row)
        most = tl.full((BLOCK_V,), -float("inf"), tl.float32)
        sums = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for first in range(0, V, BLOCK_V):
            z = logits_at(logits, bias, first + tl.arange(0, BLOCK_V), V, soft_cap, BIAS, CAPPED)
            larger = tl.maximum(most, z)
            base = tl.where(larger == -float("inf"), 0.0, larger)  # a lane that has seen barred ids alone
            sums = sums * tl.exp(most - base) + tl.exp(z - base)
            most = larger
        top = tl.max(most, 0)
        total = top + tl.log(tl.sum(sums * tl.exp(most - top), 0))
        only = target + tl.arange(0, 1)
        z_target = tl.sum(logits_at(logits, bias, only, V, soft_cap, BIAS, CAPPED), 0)
        tl.store(losses + row, total - z_target + z_loss * total * total)
        if GRADIENT:
            w = tl.load(weights + row).to(tl.float32)
            for first in range(0, V, BLOCK_V):
                columns = first + tl.arange(0, BLOCK_V)
                z = logits_at(logits, bias, columns, V, soft_cap, BIAS, CAPPED)
                d = tl.exp(z - total) * (1 + 2 * z_loss * total) - (columns == target).to(tl.float32)
                if CAPPED:
                    d *= 1 - (z / soft_cap) * (z / soft_cap)
                tl.store(logits + columns, (w * d).to(logits.dtype.element_ty), mask=columns < V)
    else:
        tl.store(losses + row, 0.0)
