"""The state space recurrence token by token, as the paper writes it: the definition the other backends answer to."""

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`, with the log decays g = dt A [B or 1, T, H]; computes in the dtype of the initial states."""
    T, H, G, dtype = *x.shape[1:3], B.shape[2], initial_states.dtype
    B_BTHN, C_BTHN = (t.to(dtype).repeat_interleave(H // G, dim=2) for t in (B, C))
    u_BTHP = x.to(dtype) if dt is None else x.to(dtype) * dt[..., None]
    decay = g.exp()
    state, outputs = initial_states, []
    for t in range(T):
        write = u_BTHP[:, t, :, :, None] * B_BTHN[:, t, :, None]
        state = state * decay[:, t, :, None, None] + write
        outputs.append((state @ C_BTHN[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1), state
