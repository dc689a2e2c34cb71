"""The state space recurrence token by token, as the paper writes it: the definition the other backends answer to.

Shape letters: S sequences, T tokens, H heads (groups are repeated to them) of P channels, N numbers of a state per
channel.
"""

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor, dt: Tensor | None, g: Tensor, B: Tensor, C: Tensor, initial_states: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and the final states, shapes as in `ssd`, with the log decays g = dt A [S or 1, T, H].

    Computes in the dtype of the initial states.
    """
    dtype, repeats = initial_states.dtype, x.shape[2] // B.shape[2]
    B_STHN, C_STHN = (t.to(dtype).repeat_interleave(repeats, dim=2) for t in (B, C))
    u_STHP = x.to(dtype) if dt is None else x.to(dtype) * dt[..., None]
    decay_STH = g.exp()
    state_SHPN, outputs = initial_states, []
    for t in range(x.shape[1]):
        write_SHPN = u_STHP[:, t, :, :, None] * B_STHN[:, t, :, None]
        state_SHPN = state_SHPN * decay_STH[:, t, :, None, None] + write_SHPN
        outputs.append((state_SHPN @ C_STHN[:, t, :, :, None])[..., 0])
    return torch.stack(outputs, dim=1), state_SHPN
