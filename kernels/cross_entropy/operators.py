"""The cross entropy of a linear head as a PyTorch operator: known to autograd, to torch.compile and to
FlopCounterMode.

Shape letters: N tokens, D numbers of a hidden vector, V token ids.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.cross_entropy.blocks import block_losses, linear_cross_entropy_flops


@torch.library.custom_op("archipelago::linear_cross_entropy", mutates_args=())
def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, token_weights: Tensor, soft_cap: float | None,
    z_loss: float, hidden_wanted: bool, weight_wanted: bool, dtype: torch.dtype, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the weighted sum, the losses [N] and what `block_losses` gives besides; backend "torch" or "triton"."""
    if backend == "triton":
        from kernels.cross_entropy.triton_operators import triton_losses as run
    else:
        run = block_losses
    losses, dhidden, dweight, dbias = run(
        hidden, weight, bias, targets, token_weights, soft_cap, z_loss, hidden_wanted, weight_wanted, dtype
    )
    return (losses * token_weights.to(losses.dtype)).sum(), losses, dhidden, dweight, dbias


@forward.register_fake
def _(hidden, weight, bias, targets, token_weights, soft_cap, z_loss, hidden_wanted, weight_wanted, dtype, backend):
    wide = torch.promote_types(dtype, torch.float32)
    losses = hidden.new_empty(hidden.shape[0], dtype=wide)
    dhidden = torch.empty_like(hidden) if hidden_wanted else hidden.new_empty(0)
    dweight = torch.empty_like(weight) if weight_wanted else weight.new_empty(0)
    dbias = weight.new_empty(weight.shape[0] if weight_wanted and bias is not None else 0, dtype=wide)
    return losses.sum(), losses, dhidden, dweight, dbias


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.wanted, ctx.dtype = inputs[7:9], None if inputs[2] is None else inputs[2].dtype


def _differentiate(ctx, dtotal, *unused):
    dhidden, dweight, dbias = ctx.saved_tensors
    hidden_wanted, weight_wanted = ctx.wanted
    if dtotal is None:
        return (None,) * 11
    # In place: a second gradient of the head would be most of the memory. Autograd refuses a second backward pass.
    dhidden = dhidden.mul_(dtotal.to(dhidden.dtype)) if hidden_wanted else None
    dbias = dbias.mul_(dtotal).to(ctx.dtype) if len(dbias) else None
    dweight = dweight.mul_(dtotal.to(dweight.dtype)) if weight_wanted else None
    return dhidden, dweight, dbias, *(None,) * 8


forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.archipelago.linear_cross_entropy)
def _(hidden_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Count the logits and each gradient that is wanted, of all tokens: which of them count is not looked at."""
    N, D = hidden_shape
    hidden_wanted, weight_wanted = args[5:7]
    return linear_cross_entropy_flops(N, D, weight_shape[0]) * (1 + hidden_wanted + weight_wanted)
