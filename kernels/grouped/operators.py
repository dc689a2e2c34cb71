"""The grouped product and its gradient as PyTorch operators: known to autograd, to torch.compile, to FlopCounterMode
and to meta tensors, which have no counts to read.

Shape letters: N rows, D numbers of a row, E experts, F numbers of a row of the output.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.grouped.segments import grouped_matmul_flops, segment_outer_products, segment_products


@torch.library.custom_op("archipelago::grouped_matmul", mutates_args=())
def product(x: Tensor, weight: Tensor, counts: Tensor, backend: str) -> Tensor:
    """Return y [N, F] for x [N, D], weight [E, D, F] and counts [E]; backend "torch" or "triton"."""
    if backend == "triton":
        from kernels.grouped.triton_operators import triton_products

        return triton_products(x, weight, counts)
    return segment_products(x, weight, counts)


@torch.library.custom_op("archipelago::grouped_outer", mutates_args=())
def outer(x: Tensor, y: Tensor, counts: Tensor, backend: str) -> Tensor:
    """Return x^T y of each expert's rows, [E, D, F], for x [N, D], y [N, F] and counts [E]; backend as of `product`."""
    if backend == "triton":
        from kernels.grouped.triton_operators import triton_outer_products

        return triton_outer_products(x, y, counts)
    return segment_outer_products(x, y, counts)


@product.register_fake
def _(x, weight, counts, backend):
    return x.new_empty(x.shape[0], weight.shape[2])


@outer.register_fake
def _(x, y, counts, backend):
    return x.new_empty(counts.shape[0], x.shape[1], y.shape[1])


def _save_product(ctx, inputs, output):
    x, weight, counts, ctx.backend = inputs
    wanted_x, wanted_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if wanted_weight else None, weight if wanted_x else None, counts)
    ctx.transposed = weight.mT.is_contiguous()


def _differentiate_product(ctx, dy):
    x, weight, counts = ctx.saved_tensors
    dx = None if weight is None else product(dy.contiguous(), weight.mT, counts, ctx.backend)
    if x is None:
        return dx, None, None, None
    # The gradient of a matrix lies in memory as the matrix does.
    dy = dy.contiguous()
    transposed = ctx.transposed
    dweight = outer(dy, x, counts, ctx.backend).mT if transposed else outer(x, dy, counts, ctx.backend)
    return dx, dweight, None, None


def _save_outer(ctx, inputs, output):
    x, y, counts, ctx.backend = inputs
    ctx.save_for_backward(x, y, counts)


def _differentiate_outer(ctx, d):
    x, y, counts = ctx.saved_tensors
    return product(y, d.mT, counts, ctx.backend), product(x, d, counts, ctx.backend), None, None


product.register_autograd(_differentiate_product, setup_context=_save_product)
outer.register_autograd(_differentiate_outer, setup_context=_save_outer)


@register_flop_formula(torch.ops.archipelago.grouped_matmul)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return grouped_matmul_flops(x_shape[0], x_shape[1], weight_shape[2])


@register_flop_formula(torch.ops.archipelago.grouped_outer)
def _(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return grouped_matmul_flops(x_shape[0], x_shape[1], y_shape[1])
