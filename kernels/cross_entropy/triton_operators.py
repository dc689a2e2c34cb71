"""Launches of the Triton kernels of the cross entropy of a linear head; `operators.py` registers what they make.

Shape letters: N tokens, D numbers of a hidden vector, V token ids.
"""

import torch
from torch import Tensor

from kernels.common.launch import check_dtype, launch_kernel, power_of_two
from kernels.cross_entropy import triton_kernels as kernels
from kernels.cross_entropy.blocks import rows_of_a_block
from kernels.grouped.triton_operators import triton_outer_products, triton_products

COLUMNS = 4096  # token ids that a program has at once


def tokens_at_once(N: int, D: int) -> int:
    """Return how many tokens have their logits in memory at once. Each block of them reads the head and adds to the
    head's gradient in float32, so blocks are large: logits in half precision then take half as much as the gradient."""
    return max(rows_of_a_block(N), D)


def triton_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weights: Tensor, soft_cap: float | None,
    z_loss: float, hidden_wanted: bool, weight_wanted: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what `block_losses` does. Tokens that count are brought to the front, and of those behind them nothing is
    computed.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    (N, D), V = hidden.shape, len(weight)
    order = (token_weights == 0).int().argsort(stable=True)
    counted = (token_weights != 0).sum(dtype=torch.int32)
    head = weight.to(dtype).contiguous()
    x, y, w = (rows.index_select(0, order) for rows in (hidden.to(dtype), targets, token_weights.float()))
    check_dtype(x)
    losses = torch.empty(N, dtype=torch.float32, device=hidden.device)
    dhidden = torch.empty_like(x) if hidden_wanted else hidden.new_empty(0)
    dweight = torch.zeros(V, D, device=weight.device) if weight_wanted else weight.new_empty(0)
    dbias = torch.zeros(V if weight_wanted and bias is not None else 0, device=weight.device)
    rows, GRADIENT = tokens_at_once(N, D), hidden_wanted or weight_wanted
    named = {"soft_cap": 1.0 if soft_cap is None else soft_cap, "z_loss": z_loss, "V": V, "GRADIENT": GRADIENT}
    named |= {"BLOCK_V": min(COLUMNS, power_of_two(V)), "BIAS": bias is not None, "CAPPED": soft_cap is not None}
    for begin in range(0, N, rows):
        part = slice(begin, min(begin + rows, N))
        n = part.stop - begin
        counts = (counted - begin).clamp(0, n).view(1)
        logits = triton_products(x[part], head.T[None], counts)
        tensors = (logits, bias, y[part], w[part], losses[part], counts)
        launch_kernel(kernels.losses_kernel, *tensors, grid=(n,), named=named, warps=8)
        if hidden_wanted:
            dhidden[part] = triton_products(logits, head[None], counts)
        if weight_wanted:
            dweight += triton_outer_products(logits, x[part], counts)[0]
        if len(dbias):
            dbias += logits.sum(0, dtype=torch.float32)
    back = order.argsort()
    dhidden = dhidden.index_select(0, back).to(hidden.dtype) if hidden_wanted else dhidden
    return losses.index_select(0, back), dhidden, dweight.to(weight.dtype), dbias
