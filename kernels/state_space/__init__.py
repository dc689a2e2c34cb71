"""The state space dual form of Mamba-2 (Dao and Gu, arXiv 2405.21060): linear attention with a scalar decay.

Shape letters, beside the parameters A, B, C and D, which are named as in the paper: S sequences, T tokens, H heads of
P channels, G groups of heads, N numbers of a state per channel.
"""

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from kernels.common.arguments import (
    at_least_float32,
    check_packed,
    check_shape,
    check_tensors,
    state_or_zeros,
    without_autocast,
)
from kernels.common.dispatch import choose_backend, refuse_transforms
from kernels.common.operation import Operation
from kernels.common.packing import run_each_sequence, sequence_count
from kernels.state_space.chunked import CHUNK, ssd_chunked, ssd_flops
from kernels.state_space.problems import KEPT, random_problem
from kernels.state_space.reference import ssd_reference

__all__ = ["OPERATION", "ssd", "ssd_flops"]

BACKENDS = "reference", "torch"
NO_LIMIT = (0.0, math.inf)


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
    dt_limit: tuple[float, float] = NO_LIMIT,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return state_t = e^{dt_t A} state_{t-1} + dt_t x_t B_t^T;  y_t = (state_t C_t + D x_t) silu(z_t).

    With dt = None and log decays A this is linear attention: x are the values, B the keys and C the queries.

    Args:
        x: [S, T, H, P]; with cu_seqlens [1, T, H, P], and all other tensors of tokens likewise.
        dt: [S, T, H], the time step of each token; None is a step of 1 everywhere.
        A: [H], or [S, T, H] where it differs from token to token; at most 0.
        B, C: [S, T, G, N] with H a multiple of G; head i reads group i // (H / G).
        chunk_size: tokens that the "torch" backend takes at once; it changes the cost, not the result.
        D: [H], weight of the direct path from x to y.
        z: [S, T, H, P], gate of the output.
        dt_bias: [H], added to dt.
        dt_softplus: whether softplus is applied to dt (after the bias).
        dt_limit: least and greatest time step (after softplus).
        initial_states: [S, H, P, N], zeros where None.
        return_final_states: whether to return the states after the last token.
        cu_seqlens: [S + 1] int32 or int64: the batch of one row holds S sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]. One may be empty: its state stays.
        backend: "auto" (see `choose_backend`), "torch" (chunked), "reference" (token by token), "triton" (float32,
            bfloat16 and float16) or "mamba_ssm" (the package, where it is installed; it takes the same decay for every
            token, a dt and no cu_seqlens).

    Returns:
        y [S, T, H, P] in x's dtype, and the final states [S, H, P, N] in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: for tensors, shapes or boundaries that do not fit together (see `check_tensors`, `check_packed`),
            options of dt without a dt, a chunk size below 1, or a backend that does not exist or that cannot run here.
    """
    check_tensors(
        "ssd", x=(x, "S T H P"), dt=(dt, "S T H"), A=(A, "H or S T H"), B=(B, "S T G N"), C=(C, "S T G N"), D=(D, "H"),
        z=(z, "S T H P"), dt_bias=(dt_bias, "H"), initial_states=(initial_states, "S H P N"),
    )  # fmt: skip
    rows, T, H, P = x.shape
    G, N = B.shape[2:]
    steps = (rows, T, H)
    if B.shape != (rows, T, G, N) or C.shape != B.shape or A.shape not in ((H,), steps):
        raise ValueError(
            "ssd takes x [S, T, H, P], A [H] or [S, T, H] and B, C [S, T, G, N]; got "
            f"x {tuple(x.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}"
        )
    if H % G:
        raise ValueError(f"{H} heads are not a multiple of {G} groups")
    if dt is None and (dt_bias is not None or dt_softplus or dt_limit != NO_LIMIT):
        raise ValueError("dt_bias, dt_softplus and dt_limit change dt, which is None: give dt, or leave them out")
    check_packed(rows, T, cu_seqlens, like=x)
    state_shape = (sequence_count(rows, cu_seqlens), H, P, N)
    check_shape("dt", dt, steps)
    check_shape("D", D, (H,))
    check_shape("z", z, x.shape)
    check_shape("dt_bias", dt_bias, (H,))
    check_shape("initial_states", initial_states, state_shape)
    if chunk_size < 1:
        raise ValueError(f"chunk_size {chunk_size} must be at least 1 token")
    backend = refuse_transforms("ssd", backend, x, dt, A, B, C, D, z, dt_bias, initial_states)
    backend = choose_backend(
        OPERATION, backend, [*BACKENDS, "triton", "mamba_ssm"], "torch", x, heads=2, groups=1, head_dim=P, state_size=N
    )
    if backend == "mamba_ssm":
        if dt is None or A.dim() > 1 or cu_seqlens is not None:
            raise ValueError("backend 'mamba_ssm' of ssd takes a dt, A [H] and no cu_seqlens: choose another backend")
        found = _mamba_ssm()(
            x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states,
            dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states,
        )  # fmt: skip
        return found if return_final_states else (found, None)
    if backend == "triton" and x.numel():
        from kernels.state_space.triton_operators import ssd_triton

        least, most = dt_limit if dt_limit != NO_LIMIT else (-math.inf, math.inf)
        y, final_states = ssd_triton(
            x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, dt_softplus, least, most
        )
        return y, final_states if return_final_states else None

    dtype = at_least_float32(x)
    if dt is None:
        g = A.to(dtype).expand(1, T, H) if A.dim() == 1 else A.to(dtype)
    else:
        dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
        dt = F.softplus(dt) if dt_softplus else dt
        if dt_limit != NO_LIMIT:
            dt = dt.clamp(*dt_limit)
        g = dt * A.to(dtype)
    state = state_or_zeros(initial_states, state_shape, like=x)
    # Autocast would round the decayed scores and the states to bfloat16.
    with without_autocast(x):
        run = ssd_reference if backend == "reference" else partial(ssd_chunked, chunk_size=chunk_size)
        y, final_states = run_each_sequence(run, [x, dt, g, B, C], state, cu_seqlens, like=x.to(dtype))
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


OPERATION = Operation(ssd, random_problem, KEPT)
