"""The delta rule token by token and write by write: the definition the other backends answer to.

Shape letters: B sequences, T tokens, R writes of a token, H heads (those of queries and keys are repeated to the HV of
values), K and V dimensions of keys and values; D gates of a token and head, K or 1.
"""

import torch
from torch import Tensor


def delta_rule_reference(
    q: Tensor, k: Tensor, a: Tensor | None, u: Tensor, g: Tensor, initial_state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return o [B, T, HV, V] and the final state [B, HV, K, V].

    Takes q [B, T, H, K], k, a [B, T, R, H, K], u [B, T, R, HV, V] and g [B, T, HV, D]; computes in the dtype of the
    initial state.
    """
    dtype, heads = initial_state.dtype, u.shape[3]
    q_BTHK, k_BTRHK = (x.to(dtype).repeat_interleave(heads // x.shape[-2], dim=-2) for x in (q, k))
    a_BTRHK = None if a is None else a.to(dtype).repeat_interleave(heads // a.shape[-2], dim=-2)
    u_BTRHV, decay_BTHD = u.to(dtype), g.to(dtype).exp()

    state_BHKV, outputs = initial_state, []
    for t in range(u.shape[1]):
        state_BHKV = state_BHKV * decay_BTHD[:, t, :, :, None]
        for r in range(u.shape[2]):
            write_BHV = u_BTRHV[:, t, r]
            if a_BTRHK is not None:
                write_BHV = write_BHV - torch.einsum("bhkv,bhk->bhv", state_BHKV, a_BTRHK[:, t, r])
            state_BHKV = state_BHKV + torch.einsum("bhk,bhv->bhkv", k_BTRHK[:, t, r], write_BHV)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state_BHKV, q_BTHK[:, t]))
    return torch.stack(outputs, dim=1).to(u.dtype), state_BHKV
