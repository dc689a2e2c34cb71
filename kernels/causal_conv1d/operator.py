"""The Triton kernels as PyTorch operators: known to autograd, to torch.compile and to FlopCounterMode."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.causal_conv1d import triton as kernels
from kernels.causal_conv1d.torch import causal_conv1d_flops
from kernels.sequences import chunks_of

BLOCK = {"BT": 16, "BC": 64}  # larger ones do not fit into registers


def _grids(x: Tensor, weight: Tensor, cu_seqlens: Tensor):
    begins, ends, sequences, _ = chunks_of(cu_seqlens, len(x), BLOCK["BT"])
    columns = -(-x.shape[1] // BLOCK["BC"])
    window = {"W": weight.shape[1], "BW": 1 << max(0, weight.shape[1] - 2).bit_length(), "BC": BLOCK["BC"]}
    return (len(begins), columns), (len(cu_seqlens) - 1, columns), (begins, ends, sequences), window


@torch.library.custom_op("archipelago::causal_conv1d", mutates_args=())
def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """x [tokens, C], weight [C, W], initial_state [sequences, W - 1, C] -> y [tokens, C] and the final states."""
    per_chunk, per_sequence, where, window = _grids(x, weight, cu_seqlens)
    y, final, C, W = torch.empty_like(x), torch.empty_like(initial_state), x.shape[1], weight.shape[1]
    options = {"W": W, "BIAS": bias is not None, "SILU": silu}
    with torch.cuda.device_of(x):
        kernels.forward_kernel[per_chunk](x, initial_state, weight, bias, y, *where, cu_seqlens, C, **options, **BLOCK)
        if W > 1:
            kernels.final_kernel[per_sequence](x, initial_state, final, cu_seqlens, C, **window)
    return y, final


@forward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu):
    return torch.empty_like(x), torch.empty_like(initial_state)


@torch.library.custom_op("archipelago::causal_conv1d_backward", mutates_args=())
def backward(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor, silu: bool, dy: Tensor,
    dfinal: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight and bias (in float32) and the initial states."""
    per_chunk, per_sequence, where, window = _grids(x, weight, cu_seqlens)
    C, W, chunks = x.shape[1], weight.shape[1], per_chunk[0]
    dx, dstate = torch.empty_like(x), torch.empty_like(initial_state)
    shapes = (x.shape, (chunks, W, C), (chunks, C))
    dz, dweight, dbias = (torch.empty(shape, dtype=torch.float32, device=x.device) for shape in shapes)
    options = {"W": W, "BIAS": bias is not None, "SILU": silu}
    kernels.sums_kernel[per_chunk](
        x, initial_state, weight, bias, dy, dz, dweight, dbias, *where, cu_seqlens, C, **options, **BLOCK
    )
    kernels.tokens_gradient_kernel[per_chunk](dz, dfinal, weight, dx, *where, cu_seqlens, C, W=W, **BLOCK)
    if W > 1:
        kernels.state_gradient_kernel[per_sequence](dz, dfinal, weight, dstate, cu_seqlens, C, **window)
    return dx, dweight.sum(0).T.contiguous(), dbias.sum(0), dstate


@backward.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, dy, dfinal):
    taps = torch.empty_like(weight, dtype=torch.float32)
    return torch.empty_like(x), taps, taps.new_empty(weight.shape[0]), torch.empty_like(initial_state)


def _save(ctx, inputs, output):
    x, weight, bias, initial_state, cu_seqlens, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _differentiate(ctx, dy, dfinal):
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = backward(
        x, weight, bias, initial_state, cu_seqlens, ctx.silu, dy.contiguous(), dfinal.contiguous()
    )
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dweight.to(weight.dtype), dbias, dstate, None, None


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.causal_conv1d)
def _(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return causal_conv1d_flops(x_shape[0], *weight_shape)


def causal_conv1d_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, cu_seqlens: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    """Shapes as in `causal_conv1d`.

    Raises:
        ValueError: for a dtype other than float32, bfloat16 and float16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the Triton kernels take float32, bfloat16 and float16, not {x.dtype}: choose backend='torch'"
        )
    B, T, C = x.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(B + 1, device=x.device) * T
    state = initial_state.to(x.dtype).contiguous()
    y, final = forward(x.reshape(B * T, C).contiguous(), weight.contiguous(), bias, state, cu_seqlens, silu)
    return y.view(x.shape), final
