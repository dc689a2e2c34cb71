"""The gated delta rule in chunks: the delta rule with write keys beta k and read keys k.

Shape letters: B sequences, T tokens, H key heads of K dimensions, HV value heads of V dimensions.
"""

from torch import Tensor

from kernels.fast_weights.chunked import delta_rule_chunked, delta_rule_flops


def gated_delta_rule_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and the final state, shapes as in `gated_delta_rule`; computes in the dtype of the initial state."""
    dtype, H = initial_state.dtype, k.shape[2]
    write_keys = (k.to(dtype)[:, :, :, None] * beta.to(dtype).unflatten(2, (H, -1))[..., None]).flatten(2, 3)
    write_keys, read_keys, v = (x[:, :, None] for x in (write_keys, k, v))
    return delta_rule_chunked(q, write_keys, read_keys, v, g[..., None], initial_state, scale)


def gated_delta_rule_flops(T: int, value_heads: int, K: int, V: int) -> int:
    """Return the forward FLOPs of one sequence of T tokens, those of `delta_rule_flops`."""
    return delta_rule_flops(T, value_heads, K, V)
