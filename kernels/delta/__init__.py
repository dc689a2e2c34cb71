"""The gated delta rule (Yang et al., Gated Delta Networks, arXiv 2412.06464, equation 10).

Shape letters: B rows of the batch, T tokens, H key heads of K dimensions, HV value heads of V dimensions, N
sequences: B, or those packed in the one row.
"""

from functools import partial

from torch import Tensor

from kernels.common.arguments import (
    check_dimensions,
    check_floating,
    check_packed,
    check_shape,
    state_or_zeros,
    without_autocast,
)
from kernels.common.dispatch import backend_for_transforms, choose_backend
from kernels.common.gates import log_decay, unit
from kernels.common.operation import Operation
from kernels.common.packing import run_each_sequence, sequence_count
from kernels.delta.chunked import gated_delta_rule_chunked, gated_delta_rule_flops
from kernels.delta.problems import KEPT, random_problem
from kernels.delta.reference import gated_delta_rule_reference

__all__ = ["OPERATION", "gated_delta_rule", "gated_delta_rule_flops"]

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
    """Return S_t = e^{g_t} S_{t-1} + k_t (beta_t (v_t - e^{g_t} S_{t-1}^T k_t))^T;  o_t = scale * S_t^T q_t.

    It is the case of `kernels.delta_rule` with write keys beta k and read keys k; that one also takes gates per
    channel, other read keys or none, and several writes per token. Without g it is the delta rule of DeltaNet.

    Args:
        q, k: [B, T, H, K]; the caller normalises them where the architecture asks for it, or sets use_qk_l2norm.
        v: [B, T, HV, V] with HV a multiple of H; value head i reads key head i // (HV / H).
        g: [B, T, HV], log of the decay; None for none. Of any strength: -inf empties the memory. A positive one
            makes it grow.
        beta: [B, T, HV], the writing strength, 0 to 1.
        scale: factor on the output; K ** -0.5 where None.
        initial_state: [N, HV, K, V], zeros where None.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64: the batch of one row holds N sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]. One may be empty: its state stays.
        A_log, dt_bias: [HV]; with them g is the input of the gate, -exp(A_log) softplus(g + dt_bias).
        use_qk_l2norm: whether q and k are divided by their norms, x / sqrt(sum(x^2) + 1e-6).
        backend: "auto" (see `choose_backend`; "reference" under transforms of torch.func, which no other knows),
            "torch" (chunked), "reference" (token by token, which is the fastest for one token) or "triton" (float32,
            bfloat16 and float16, heads of up to 256 dimensions).

    Returns:
        o [B, T, HV, V] in v's dtype, and the final state [N, HV, K, V] in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or a backend that does not exist or that cannot run
            here.
    """
    check_dimensions("gated_delta_rule", q, "q", "B, T, H, K")
    check_dimensions("gated_delta_rule", v, "v", "B, T, HV, V")
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
    if H == 0 or HV % H:
        raise ValueError(f"{HV} value heads are not a multiple of {H} key heads")
    of_gate = [x for x in (A_log, dt_bias) if x is not None]
    if len(of_gate) == 1 or any(x.shape != (HV,) for x in of_gate):
        raise ValueError(f"A_log and dt_bias go together, each [{HV}]")
    check_packed(B, T, cu_seqlens)
    state_shape = (sequence_count(B, cu_seqlens), HV, K, V)
    check_shape("initial_state", initial_state, state_shape)
    check_floating("gated_delta_rule", q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
    backend = backend_for_transforms(OPERATION, backend)
    fastest = "torch" if T > 1 else "reference"  # a chunk of one token is the recurrence in more steps
    backend = choose_backend(
        OPERATION, backend, [*BACKENDS, "triton"], fastest, v, key_heads=1, heads=2, head_dim=K, value_dim=V
    )

    scale = K**-0.5 if scale is None else scale
    if not v.numel():
        state = state_or_zeros(initial_state, state_shape, like=q)
        return v.clone(), state if output_final_state else None
    # Autocast would round what is read from the memory to bfloat16.
    with without_autocast(v):
        if backend == "triton":
            from kernels.delta.triton_operators import gated_delta_rule_triton

            return gated_delta_rule_triton(
                q, k, v, g, beta, initial_state, scale, cu_seqlens, A_log, dt_bias, use_qk_l2norm, output_final_state
            )
        if A_log is not None and dt_bias is not None:
            g = log_decay(g, A_log, dt_bias)
        if use_qk_l2norm:
            q, k = unit(q), unit(k)
        state = state_or_zeros(initial_state, state_shape, like=q)
        run = partial(BACKENDS[backend], scale=scale)
        o, final_state = run_each_sequence(run, [q, k, v, g, beta], state, cu_seqlens, like=v)
    return o, final_state if output_final_state else None


OPERATION = Operation(gated_delta_rule, random_problem, KEPT)
