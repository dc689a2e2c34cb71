"""The gated delta rule (Yang et al., Gated Delta Networks, arXiv 2412.06464, equation 10)."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, float32, promote_types

from kernels.backend import choose
from kernels.gated_delta_rule.reference import gated_delta_rule_reference
from kernels.gated_delta_rule.torch import gated_delta_rule_chunked
from kernels.sequences import check_packed, one_by_one

BACKENDS = {"reference": gated_delta_rule_reference, "torch": gated_delta_rule_chunked}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - e^{g_t} S_{t-1}^T k_t))^T;  o_t = scale * S_t^T q_t.

    Without g it is the delta rule of DeltaNet. Linear attention with a scalar decay has no term that erases, which no
    switch here leaves out: it is `kernels.ssd`.

    Args:
        q, k: [B, T, H, K]; the caller normalises them where the architecture asks for it, or sets use_qk_l2norm.
        v: [B, T, HV, V] with HV a multiple of H; value head i reads key head i // (HV / H).
        g: [B, T, HV], log of the decay, at most 0; None for none.
        beta: [B, T, HV], the writing strength, 0 to 1.
        scale: factor on the output; K ** -0.5 where None.
        initial_state: [N, HV, K, V], zeros where None; N = B, or the number of sequences of cu_seqlens.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64: the batch of one holds N sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]. One may be empty: its state stays.
        A_log, dt_bias: [HV]; with them g is the input of the gate, -exp(A_log) softplus(g + dt_bias).
        use_qk_l2norm: whether q and k are divided by their norms, x / sqrt(sum(x^2) + 1e-6).
        backend: "auto" (see `choose`), "torch" (chunked), "reference" (token by token, which is
            the fastest for one token) or "triton" (float32,
            bfloat16 and float16, heads of up to 256 dimensions).

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in float32 (float64 for float64
        inputs) or None.

    Raises:
        ValueError: for shapes that do not fit together, or a backend that there is not or that cannot run here.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if g is None:
        if A_log is not None or dt_bias is not None:
            raise ValueError("A_log and dt_bias make a gate of g, which is None: give g, or leave them out")
        g = beta.new_zeros(beta.shape)
    if k.shape != q.shape or v.shape[:2] != (B, T) or g.shape != (B, T, HV) or beta.shape != g.shape:
        raise ValueError(
            "gated_delta_rule takes q, k [B, T, H, K], v [B, T, HV, V] and g, beta [B, T, HV]; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta {tuple(beta.shape)}"
        )
    if HV % H:
        raise ValueError(f"{HV} value heads are not a multiple of {H} key heads")
    if (A_log is None) != (dt_bias is None) or (A_log is not None and not A_log.shape == dt_bias.shape == (HV,)):
        raise ValueError(f"A_log and dt_bias go together, each [{HV}]")
    if cu_seqlens is not None:
        check_packed(B, T, cu_seqlens)
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is not None and initial_state.shape != (N, HV, K, V):
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, it must be {(N, HV, K, V)}")
    # A chunk of one token is the recurrence in more steps.
    fastest, sizes = "torch" if T > 1 else "reference", {"key_heads": 1, "heads": 2, "head_dim": K, "value_dim": V}
    backend = choose("gated_delta_rule", backend, [*BACKENDS, "triton"], fastest, v, **sizes)

    if A_log is not None:
        dtype = promote_types(g.dtype, float32)
        g = -A_log.to(dtype).exp() * F.softplus(g.to(dtype) + dt_bias.to(dtype))
    if use_qk_l2norm:
        dtype = promote_types(q.dtype, float32)
        q, k = (x.to(dtype) * (x.to(dtype).square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    scale = K**-0.5 if scale is None else scale
    dtype = promote_types(q.dtype, float32)
    state = q.new_zeros(N, HV, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if backend == "triton":
        from kernels.gated_delta_rule.operator import gated_delta_rule_triton

        o, final_state = gated_delta_rule_triton(q, k, v, g, beta, state, scale, cu_seqlens)
    elif cu_seqlens is None:
        o, final_state = BACKENDS[backend](q, k, v, g, beta, state, scale)
    else:
        run = partial(BACKENDS[backend], scale=scale)
        o, final_state = one_by_one(run, [q, k, v, g, beta], state, cu_seqlens, like=v)
    return o, final_state if output_final_state else None
