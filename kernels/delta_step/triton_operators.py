"""The Triton step as a PyTorch operator: known to torch.compile and to FlopCounterMode; without gradients."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.launch import check_dtype, launch_kernel, power_of_two
from kernels.convolution.depthwise import causal_conv1d_flops
from kernels.delta.chunked import gated_delta_rule_flops
from kernels.delta_step import triton_kernels as kernels

LARGEST_HEAD = 128


@torch.library.custom_op("archipelago::gated_delta_step", mutates_args=())
def step(
    qkv: Tensor, a: Tensor | None, b: Tensor, z: Tensor, conv: Tensor, memory: Tensor, conv_weight: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, conv and memory after the token; shapes as in `gated_delta_step`."""
    (B, C), (HV, K, V), W = qkv.shape, memory.shape[1:], conv_weight.shape[1]
    y, conv_after, memory_after = after = [torch.empty_like(x) for x in (z, conv, memory)]
    named = {"eps": eps, "scale": K**-0.5, "HV": HV, "H": (C - HV * V) // (2 * K), "C": C, "K": K, "V": V, "W": W}
    named |= {"BLOCK_K": power_of_two(K), "BLOCK_V": power_of_two(V), "DECAYS": a is not None}
    none = memory.new_empty(0)  # stands for what is not there
    tensors = (none if x is None else x for x in (qkv, a, b, z, conv, memory, conv_weight, A_log, dt_bias, norm_weight))
    launch_kernel(kernels.step_kernel, *tensors, *after, grid=(B, HV), named=named, warps=8)
    return y, conv_after, memory_after


@step.register_fake
def _(qkv, a, b, z, conv, memory, conv_weight, A_log, dt_bias, norm_weight, eps):
    return torch.empty_like(z), torch.empty_like(conv), torch.empty_like(memory)


@register_flop_formula(torch.ops.archipelago.gated_delta_step)
def _(qkv_shape, a_shape, b_shape, z_shape, conv_shape, memory_shape, weight_shape, *args, out_shape=None, **kwargs):
    (B, C), W = qkv_shape, weight_shape[1]
    return B * (causal_conv1d_flops(1, C, W) + gated_delta_rule_flops(1, *memory_shape[1:]))


def gated_delta_step_triton(
    qkv: Tensor, a: Tensor | None, b: Tensor, z: Tensor, conv: Tensor, memory: Tensor, conv_weight: Tensor,
    A_log: Tensor | None, dt_bias: Tensor | None, norm_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return y, conv and memory after the token; shapes as in `gated_delta_step`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16, or heads above 128 dimensions.
    """
    check_dtype(qkv)
    if max(memory.shape[2:]) > LARGEST_HEAD:
        raise ValueError(
            f"heads of {memory.shape[2]} and {memory.shape[3]} dimensions: the Triton step takes up to {LARGEST_HEAD}; "
            "choose backend='reference'"
        )
    given = (qkv, a, b, z, conv, memory, conv_weight, A_log, dt_bias, norm_weight)
    return step(*(x if x is None else x.contiguous() for x in given), eps)
