"""The state space recurrence token by token, as the paper writes it: the definition the other backends answer to."""

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, chunk_size: int, initial_states: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Shapes as in `ssd`, with the log decays g = dt A [B or 1, T, H]; `chunk_size` is of no use here.

    Computes in float32, or float64 for float64 inputs.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    B_BTHN, C_BTHN = (t.to(dtype).repeat_interleave(H // G, dim=2) for t in (B, C))
    u_BTHP = x.to(dtype) if dt is None else x.to(dtype) * dt[..., None]
    decay = g.exp()
    state = x.new_zeros(batch, H, P, N, dtype=dtype) if initial_states is None else initial_states.to(dtype)

    outputs = []
    for t in range(T):
        write = u_BTHP[:, t, :, :, None] * B_BTHN[:, t, :, None]
        state = state * decay[:, t, :, None, None] + write
        outputs.append((state @ C_BTHN[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1), state
