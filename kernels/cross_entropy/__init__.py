"""The cross entropy of a linear head, without its logits in memory.

Shape letters: N tokens, D numbers of a hidden vector, V token ids.
"""

import torch
from torch import Tensor

from kernels.common.arguments import is_transformed
from kernels.common.dispatch import choose_backend, refuse_transforms
from kernels.common.operation import Operation
from kernels.cross_entropy.blocks import linear_cross_entropy_flops
from kernels.cross_entropy.operators import forward
from kernels.cross_entropy.problems import KEPT, random_problem
from kernels.cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["OPERATION", "linear_cross_entropy", "linear_cross_entropy_flops"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weights: Tensor | None = None,
    bias: Tensor | None = None,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return sum_i w_i l_i and the l_i; l_i = log sum_v e^{z_iv} - z_iy + z_loss (log sum_v e^{z_iv})^2 for the target
    y and the logits z = cap tanh((W h + b) / cap).

    Logits are there for a block of tokens at a time, and the gradients of the sum are made with them: no product is
    taken twice. A token of weight 0 is left out: on a CPU its logits are not computed, on a GPU the kernels of "triton"
    skip it without the host waiting to know. Sums are taken in one order, so two runs are equal bit for bit. Under
    autocast the products are of its dtype, as in a linear layer, and gradients leave in the dtype of what they are of;
    losses are float32 at least.

    Args:
        hidden: [N, D].
        weight: [V, D], the head's.
        targets: [N] int64, from 0 to V - 1.
        token_weights: [N], 1 where None. They get no gradient.
        bias: [V]; minus infinity bars a token id (not where logits are capped).
        soft_cap: what logits stay below in size (Gemma 2, arXiv 2408.00118, section 2); None for none.
        z_loss: coefficient of the squared logarithm of the sum (PaLM, arXiv 2204.02311, section 5).
        backend: "auto" (see `choose_backend`), "torch" (in blocks), "triton" (float32, bfloat16 and float16) or
            "reference" (all logits).

    Returns:
        The sum, a scalar with gradients for hidden, weight and bias, of which one backward pass can be taken; and the
        losses [N] without gradients, 0 for tokens of weight 0.

    Raises:
        ValueError: for shapes that do not fit together, mixed dtypes or dtypes that are not of floating-point numbers,
            targets that are not int64 or (on a CPU) no token id, a soft_cap that is not above 0, or a backend that does
            not exist or that cannot run here.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "linear_cross_entropy takes hidden [N, D] and weight [V, D]; got "
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
        )
    N, V = len(hidden), len(weight)
    for name, x, length in (("targets", targets, N), ("token_weights", token_weights, N), ("bias", bias, V)):
        if x is not None and x.shape != (length,):
            raise ValueError(f"{name} of linear_cross_entropy is {list(x.shape)}, it must be [{length}]")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets of linear_cross_entropy are {targets.dtype}, they must be int64: convert them")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap} must be above 0, or None for no cap")
    device = "cpu" if hidden.is_meta else hidden.device.type
    lowered = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    if not (hidden.is_floating_point() and weight.is_floating_point()) or (
        hidden.dtype != weight.dtype and not lowered
    ):
        raise ValueError(
            f"hidden of linear_cross_entropy is {hidden.dtype} and weight {weight.dtype}: both must be of one "
            "floating-point dtype"
        )
    dtype = torch.get_autocast_dtype(device) if lowered else hidden.dtype
    if hidden.device.type == "cpu" and type(targets) is Tensor and not torch.compiler.is_compiling():
        beyond = targets[(targets < 0) | (targets >= V)]
        if len(beyond):
            raise ValueError(f"target {beyond[0]} is not one of the {V} token ids: give a token without one weight 0")
    if token_weights is None:
        token_weights = hidden.new_ones(N, dtype=torch.float32)
    chosen = choose_backend(
        OPERATION, backend, ["reference", "torch", "triton"], "torch", hidden, width=hidden.shape[1], vocabulary=300
    )
    with torch.autocast(device, enabled=False):
        if chosen == "reference" or is_transformed(hidden, weight, bias):
            refuse_transforms("linear_cross_entropy", backend, hidden, weight, bias)
            return linear_cross_entropy_reference(hidden, weight, bias, targets, token_weights, soft_cap, z_loss, dtype)
        recorded = torch.is_grad_enabled()
        wanted = [recorded and any(x is not None and x.requires_grad for x in xs) for xs in ((hidden,), (weight, bias))]
        total, losses, *_ = forward(
            hidden, weight, bias, targets, token_weights.detach(), soft_cap, z_loss, *wanted, dtype, chosen
        )
    return total, losses.detach()


OPERATION = Operation(linear_cross_entropy, random_problem, KEPT)
