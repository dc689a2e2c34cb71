"""The state space dual form of Mamba-2 (Dao and Gu, arXiv 2405.21060): linear attention with a scalar decay."""

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, autocast, float32, promote_types

from kernels.backend import choose
from kernels.sequences import check_packed, one_by_one
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
    cu_seqlens: Tensor | None = None,
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
        initial_states: [S, H, P, N], zeros where None; S = B, or the number of sequences of cu_seqlens.
        return_final_states: whether to return the states after the last token.
        cu_seqlens: [S + 1] int32 or int64: the batch of one holds S sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]. One may be empty: its state stays.
        backend: "auto" (see `choose`), "torch" (chunked), "reference" (token by token, which is the fastest for one
            token), "triton" (float32, bfloat16 and float16) or "mamba_ssm" (the package, where it is installed; it
            takes the same decay for every token, a dt and no cu_seqlens).

    Returns:
        y [B, T, H, P] in x's dtype, and the final states [S, H, P, N] in float32 (float64 for float64 inputs)
        or None.

    Raises:
        ValueError: for shapes that do not fit together, options of dt without a dt, a chunk size below 1, or a
            backend that there is not or that cannot run here.
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
    if cu_seqlens is not None:
        check_packed(batch, T, cu_seqlens)
    S = batch if cu_seqlens is None else len(cu_seqlens) - 1
    wanted = {"dt": steps, "D": (H,), "z": x.shape, "dt_bias": (H,), "initial_states": (S, H, P, N)}
    given = {"dt": dt, "D": D, "z": z, "dt_bias": dt_bias, "initial_states": initial_states}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != wanted[name]:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, it must be {tuple(wanted[name])}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1 token")
    # A chunk of one token is the recurrence in more steps.
    fastest, sizes = "torch" if T > 1 else "reference", {"heads": 2, "groups": 1, "head_dim": P, "state_size": N}
    backend = choose("ssd", backend, [*BACKENDS, "triton", "mamba_ssm"], fastest, x, **sizes)
    if backend == "mamba_ssm":
        if dt is None or A.dim() > 1 or cu_seqlens is not None:
            raise ValueError("backend 'mamba_ssm' of ssd takes a dt, A [H] and no cu_seqlens: choose another backend")
        found = _mamba_ssm()(
            x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
            dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states,
        )  # fmt: skip
        return found if return_final_states else (found, None)

    dtype = promote_types(x.dtype, float32)
    if dt is None:
        g = A.to(dtype).expand(1, T, H) if A.dim() == 1 else A.to(dtype)
    else:
        dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        if dt_limit != (0.0, math.inf):
            dt = dt.clamp(*dt_limit)
        g = dt * A.to(dtype)
    state = x.new_zeros(S, H, P, N, dtype=dtype) if initial_states is None else initial_states.to(dtype)
    # Autocast would round the decayed scores and the states to bfloat16.
    with autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        if backend == "triton":
            from kernels.ssd.operator import ssd_triton

            single = D is not None or z is not None  # so that y is rounded once, at the end
            y, final_states = ssd_triton(x, dt, g, B, C, state, cu_seqlens, single)
        else:
            run = partial(ssd_chunked, chunk_size=chunk_size) if backend == "torch" else BACKENDS[backend]
            if cu_seqlens is None:
                y, final_states = run(x, dt, g, B, C, state)
            else:
                y, final_states = one_by_one(run, [x, dt, g.expand(steps), B, C], state, cu_seqlens, like=x.to(dtype))
    y = y if D is None else y + D.to(y.dtype)[:, None] * x
    y = y if z is None else y * F.silu(z.to(y.dtype))
    return y.to(x.dtype), final_states if return_final_states else None


def _mamba_ssm():
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError as error:
        raise ValueError(
            f"backend 'mamba_ssm' of ssd needs the package mamba-ssm ({error}): pip install 'archipelago[cuda]', or "
            f"choose from auto, {', '.join(BACKENDS)}, triton"
        ) from error
    return mamba_chunk_scan_combined
