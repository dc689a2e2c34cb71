"""Registration of a forward and a backward pass as a PyTorch operator: known to autograd, to torch.compile, which sees
none of its blocks, and to FlopCounterMode.

Shape letters: B sequences, T queries, S keys, H query heads, G key-value heads, D and V dimensions of keys and values,
K indices of a query.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.common.arguments import at_least_float32


def sparse_attention_flops(queries: int, heads: int, head_dim: int, value_dim: int, picked: int) -> int:
    """Return the forward FLOPs of so many queries: scores and sums over `picked` keys each, whether named or none."""
    return 2 * queries * heads * (head_dim + value_dim) * picked


def register(name: str, forward: Callable, backward: Callable) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the operator archipelago::`name` of two functions with the signatures of `gathered.forward` and
    `gathered.backward`."""
    run = torch.library.custom_op(f"archipelago::{name}", forward, mutates_args=())
    run_back = torch.library.custom_op(f"archipelago::{name}_backward", backward, mutates_args=())

    def fake(q, k, v, indices, scale, value_dim):
        return q.new_empty(*q.shape[:3], value_dim), q.new_empty(q.shape[:3], dtype=at_least_float32(q))

    def fake_back(q, k, v, indices, out, lse, dout, dlse, scale):
        return torch.empty_like(q), k.new_empty(k.shape), k.new_empty(0) if v is None else v.new_empty(v.shape)

    def save(ctx, inputs, output):
        q, k, v, indices, ctx.scale, _ = inputs
        ctx.save_for_backward(q, k, v, indices, *output)

    def differentiate(ctx, dout, dlse):
        q, k, v, indices, out, lse = ctx.saved_tensors
        dq, dk, dv = run_back(q, k, v, indices, out, lse, dout.contiguous(), dlse.contiguous(), ctx.scale)
        return dq, dk, None if v is None else dv, None, None, None

    def flops(q_shape, k_shape, v_shape, indices_shape, scale, value_dim, *args, out_shape=None, **kwargs) -> int:
        (B, T, H, D), K = q_shape, indices_shape[2]
        return sparse_attention_flops(B * T, H, D, value_dim, K)

    def flops_back(q_shape, k_shape, v_shape, indices_shape, lse_shape, *args, out_shape=None, **kwargs) -> int:
        """Count scores again and four products: of the weights, and for dq, dk and dv."""
        (B, T, H, D), K, V = q_shape, indices_shape[2], lse_shape[3]
        return sparse_attention_flops(B * T, H, 3 * D, 2 * V, K)

    run.register_fake(fake)
    run_back.register_fake(fake_back)
    run.register_autograd(differentiate, setup_context=save)
    register_flop_formula(getattr(torch.ops.archipelago, name))(flops)
    register_flop_formula(getattr(torch.ops.archipelago, f"{name}_backward"))(flops_back)
    return run
