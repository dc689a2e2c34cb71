"""The state space dual form of Mamba-2 (Dao and Gu, arXiv 2405.21060): linear attention with a scalar decay."""

import math

import torch.nn.functional as F
from torch import Tensor, autocast, float32, promote_types

from kernels.backend import choose
from kernels.ssd.reference import ssd_reference
from kernels.ssd.torch import CHUNK, ssd_chunked

BACKENDS = {"reference": ssd_reference, "torch": ssd_chunked}


def ssd(
    x: Tensor,
    dt: Tensor | None,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    chunk_size: int = CHUNK,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^{dt_t A} S_{t-1} + dt_t x_t B_t^T;  y_t = (S_t C_t + D x_t) silu(z_t).

    With dt = None and log decays A this is linear attention: x are the values, B the keys and C the queries.

    Args:
        x: [B, T, H, P].
        dt: [B, T, H], the time step of each token; None is a step of 1 everywhere.
        A: [H], or [B, T, H] where it differs from token to token; at most 0.
        B, C: [B, T, G, N] with H a multiple of G; head i reads group i // (H / G).
        chunk_size: tokens that the "torch" backend takes at once; it changes the cost, not the result.
        D: [H], weight of the direct path from x to y.
        z: [B, T, H, P], gate of the output.
        dt_bias: [H], added to dt.
        dt_softplus: whether softplus is applied to dt (after the bias).
        dt_limit: least and greatest time step (after softplus).
        initial_states: [B, H, P, N], zeros where None.
        return_final_states: whether to return the states after the last token.
        backend: "auto" (see `choose`), "torch" (chunked) or "reference" (token by token, which is the
            fastest for one token).

    Returns:
        y [B, T, H, P] in x's dtype, and the final states [B, H, P, N] in float32 (float64 for float64 inputs)
        or None.

    Raises:
        ValueError: for shapes that do not fit together, options of dt without a dt, a chunk size below 1 or an
            unknown backend.
    """
    batch, T, H, P = x.shape
    G, N = B.shape[2:]
    steps = (batch, T, H)
    if B.shape != (batch, T, G, N) or C.shape != B.shape or A.shape not in ((H,), steps):
        raise ValueError(
            "ssd takes x [B, T, H, P], A [H] or [B, T, H] and B, C [B, T, G, N]; got "
            f"x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
    if H % G:
        raise ValueError(f"{H} heads are not a multiple of {G} groups")
    if dt is None and (dt_bias is not None or dt_softplus or dt_limit != (0.0, math.inf)):
        raise ValueError("dt_bias, dt_softplus and dt_limit change dt, which is None: give dt, or leave them out")
    wanted = {"dt": steps, "D": (H,), "z": x.shape, "dt_bias": (H,), "initial_states": (batch, H, P, N)}
    given = {"dt": dt, "D": D, "z": z, "dt_bias": dt_bias, "initial_states": initial_states}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != wanted[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, it must be {tuple(wanted[name])}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1 token")
    # A chunk of one token is the recurrence in more steps.
    backend = choose("ssd", backend, BACKENDS, "torch" if T > 1 else "reference", x)

    dtype = promote_types(x.dtype, float32)
    if dt is None:
        g = A.to(dtype).expand(1, T, H) if A.dim() == 1 else A.to(dtype)
    else:
        dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        if dt_limit != (0.0, math.inf):
            dt = dt.clamp(*dt_limit)
        g = dt * A.to(dtype)
    # Autocast would round the decayed scores and the states to bfloat16.
    with autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        y, final_states = BACKENDS[backend](x, dt, g, B, C, chunk_size, initial_states)
    y = y if D is None else y + D.to(y.dtype)[:, None] * x
    y = y if z is None else y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), final_states if return_final_states else None
