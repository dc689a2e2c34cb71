"""The gated delta rule token by token, as the paper writes it: the definition the other backends answer to.

Shape letters: B sequences, T tokens, H value heads (key heads are repeated to them), K and V dimensions of keys and
values.
"""

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o and the final state, shapes as in `gated_delta_rule`; computes in the dtype of the initial state."""
    dtype, repeats = initial_state.dtype, v.shape[2] // q.shape[2]
    q_BTHK, k_BTHK = (x.to(dtype).repeat_interleave(repeats, dim=2) for x in (q, k))
    v_BTHV, decay_BTH, beta_BTH = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)

    state_BHKV, outputs = initial_state, []
    for t in range(v.shape[1]):
        state_BHKV = state_BHKV * decay_BTH[:, t, :, None, None]
        stored_BHV = torch.einsum("bhkv,bhk->bhv", state_BHKV, k_BTHK[:, t])
        write_BHV = beta_BTH[:, t, :, None] * (v_BTHV[:, t] - stored_BHV)
        state_BHKV = state_BHKV + torch.einsum("bhk,bhv->bhkv", k_BTHK[:, t], write_BHV)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state_BHKV, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1).to(v.dtype), state_BHKV
