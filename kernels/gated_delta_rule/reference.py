"""The gated delta rule token by token, as the paper writes it: the definition the other backends answer to."""

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_rule`; computes in float32, or float64 for float64 inputs."""
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = (x.to(dtype).repeat_interleave(HV // H, dim=2) for x in (q, k))
    v_BTHV, decay_BTH, beta = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    state = q.new_zeros(B, HV, K, V) if initial_state is None else initial_state.to(dtype)

    outputs = []
    for t in range(T):
        state = state * decay_BTH[:, t, :, None, None]
        stored = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        write = beta[:, t, :, None] * (v_BTHV[:, t] - stored)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(v.dtype), state
