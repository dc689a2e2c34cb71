"""The gated delta rule token by token, as the paper writes it: the definition the other backends answer to."""

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Shapes as in `gated_delta_rule`; computes in the dtype of the initial state."""
    T, H, HV = *q.shape[1:3], v.shape[2]
    dtype = initial_state.dtype
    q, k = (x.to(dtype).repeat_interleave(HV // H, dim=2) for x in (q, k))
    v_BTHV, decay_BTH, beta = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)

    state, outputs = initial_state, []
    for t in range(T):
        state = state * decay_BTH[:, t, :, None, None]
        stored = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        write = beta[:, t, :, None] * (v_BTHV[:, t] - stored)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, dim=1).to(v.dtype), state
