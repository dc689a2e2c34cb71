"""The gated delta rule (Yang et al., Gated Delta Networks, arXiv 2412.06464, equation 10)."""

from torch import Tensor

from kernels.gated_delta_rule.reference import gated_delta_rule_reference
from kernels.gated_delta_rule.torch import gated_delta_rule_chunked

BACKENDS = {"reference": gated_delta_rule_reference, "torch": gated_delta_rule_chunked}


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - e^{g_t} S_{t-1}^T k_t))^T;  o_t = scale * S_t^T q_t.

    Args:
        q, k: [B, T, H, K]; the caller normalises them where the architecture asks for it.
        v: [B, T, HV, V] with HV a multiple of H; value head i reads key head i // (HV / H).
        g: [B, T, HV], log of the decay, at most 0.
        beta: [B, T, HV], the writing strength, 0 to 1.
        scale: factor on the output; K ** -0.5 where None.
        initial_state: [B, HV, K, V], zeros where None.
        output_final_state: whether to return the state after the last token.
        backend: "auto" (the fastest that runs here), "torch" (chunked) or "reference" (token by token).

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [B, HV, K, V] in float32 (float64 for float64
        inputs) or None.

    Raises:
        ValueError: for shapes that do not fit together or an unknown backend.
    """
    B, T, H, K = q.shape
    HV, V = v.shape[2:]
    if k.shape != q.shape or v.shape[:2] != (B, T) or g.shape != (B, T, HV) or beta.shape != g.shape:
        raise ValueError(
            "gated_delta_rule takes q, k [B, T, H, K], v [B, T, HV, V] and g, beta [B, T, HV]; got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, g {tuple(g.shape)}, beta {tuple(beta.shape)}"
        )
    if HV % H:
        raise ValueError(f"{HV} value heads are not a multiple of {H} key heads")
    if initial_state is not None and initial_state.shape != (B, HV, K, V):
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}, it must be {(B, HV, K, V)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r} for gated_delta_rule: choose from auto, {', '.join(BACKENDS)}")
    run = BACKENDS["torch" if backend == "auto" else backend]
    scale = K**-0.5 if scale is None else scale
    o, final_state = run(q, k, v, g, beta, scale, initial_state)
    return o, final_state if output_final_state else None
