"""The delta rule with separate read and write keys: fast weights (Schlag et al., arXiv 2102.11174) that decay, are
read, corrected and written at every token.

It has as cases DeltaNet (Yang et al., arXiv 2406.06484), the gated delta rule (2412.06464), Kimi delta attention
(2510.26692), gated linear attention (2312.06635), RWKV-7 (2503.14456), DeltaProduct (2502.10297) and the state space
dual form (2405.21060).

Shape letters: B rows of the batch, T tokens, H heads of K dimensions, HV value heads of V dimensions, R writes of a
token, N sequences: B, or those packed in the one row.
"""

from functools import partial, wraps
from typing import Any

from torch import Tensor

from kernels.common.arguments import (
    at_least_float32,
    check_dimensions,
    check_floating,
    check_heads,
    check_packed,
    check_shape,
    state_or_zeros,
    without_autocast,
)
from kernels.common.dispatch import backend_for_transforms, choose_backend
from kernels.common.operation import Operation
from kernels.common.packing import run_each_sequence, sequence_count
from kernels.fast_weights.chunked import delta_rule_chunked, delta_rule_flops
from kernels.fast_weights.problems import KEPT, random_problem
from kernels.fast_weights.reference import delta_rule_reference

__all__ = ["OPERATION", "delta_rule", "delta_rule_flops"]

BACKENDS = {"reference": delta_rule_reference, "torch": delta_rule_chunked}


def delta_rule(
    q: Tensor,
    k: Tensor,
    a: Tensor | None,
    u: Tensor,
    g: Tensor | None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Return S <- diag(e^{g_t}) S_{t-1};  S_t = S + k_t (u_t - S^T a_t)^T;  o_t = scale * S_t^T q_t.

    A token may write several times, one write after the other (micro-steps): k, a and u then have a dimension for the R
    writes. It decays once, before its first write, and is read once, after its last.

    Args:
        q: [B, T, H, K], the queries.
        k: [B, T, H, K] or [B, T, R, H, K], the write keys.
        a: [B, T, H, K] or [B, T, R, H, K], the read keys, by which the memory is corrected before it is written: beta k
            in the gated delta rule, with u = beta v. None for no erasing: linear attention.
        u: [B, T, HV, V] or [B, T, R, HV, V], the values. HV is a multiple of the heads H of q, k and a, which need not
            have equally many: value head i reads head i // (HV / H).
        g: [B, T, HV], log of the decay, or [B, T, HV, K], one per key channel; None for none. Of any strength: -inf
            empties the memory. A positive one makes it grow; where the sum of positive gates of a chunk of 64 tokens
            passes some 30, backends other than "reference" lose digits, and in float16 Triton gives NaN where it passes
            11, since e^11.1 is the largest float16.
        scale: factor on the output; K ** -0.5 where None.
        initial_state: [N, HV, K, V], zeros where None.
        output_final_state: whether to return the state after the last token.
        cu_seqlens: [N + 1] int32 or int64: the batch of one row holds N sequences one after the other, the n-th from
            cu_seqlens[n] to cu_seqlens[n + 1]. One may be empty: its state stays.
        backend: "auto" (see `choose_backend`; "reference" under transforms of torch.func, which no other knows),
            "torch" (chunked), "reference" (token by token, which is the fastest for one token) or "triton" (float32,
            bfloat16 and float16, heads of up to 256 dimensions).

    Returns:
        o [B, T, HV, V] in u's dtype, and the final state [N, HV, K, V] in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: for shapes or dtypes that do not fit together, or a backend that does not exist or that cannot run
            here.
    """
    check_dimensions("delta_rule", q, "q", "B, T, H, K")
    several = u.dim() == 5
    check_dimensions("delta_rule", u, "u", "B, T, R, HV, V" if several else "B, T, HV, V")
    (B, T, _, K), (HV, V) = q.shape, u.shape[-2:]
    tokens = (B, T, *u.shape[2:-2])
    check_shape("u", u, (*tokens, HV, V))
    for name, x in (("q", q), ("k", k), ("a", a)):
        if x is not None:
            check_heads(name, x, (B, T) if name == "q" else tokens, HV, K)
    if g is not None and g.shape not in ((B, T, HV), (B, T, HV, K)):
        raise ValueError(f"g is {tuple(g.shape)}, it must be {(B, T, HV)} or, per key channel, {(B, T, HV, K)}")
    check_packed(B, T, cu_seqlens)
    state_shape = (sequence_count(B, cu_seqlens), HV, K, V)
    check_shape("initial_state", initial_state, state_shape)
    check_floating("delta_rule", q=q, k=k, a=a, u=u, g=g, initial_state=initial_state)
    fastest = "torch" if T > 1 else "reference"  # a chunk of one token is the recurrence in more steps
    backend = backend_for_transforms(OPERATION, backend)
    sizes = {"heads": 2, "key_heads": 1, "head_dim": K, "value_dim": V, "erases": a is not None}
    sizes |= {"per_channel": g is not None and g.dim() == 4} | ({"writes": u.shape[2]} if several else {})
    backend = choose_backend(OPERATION, backend, [*BACKENDS, "triton"], fastest, u, **sizes)

    if g is None:
        g = q.new_zeros((B, T, HV), dtype=at_least_float32(q))
    g = g[..., None] if g.dim() == 3 else g
    if not several:
        k, u = k[:, :, None], u[:, :, None]
        a = None if a is None else a[:, :, None]
    scale = K**-0.5 if scale is None else scale
    if not u.numel():
        return u.sum(2), state_or_zeros(initial_state, state_shape, like=q) if output_final_state else None
    with without_autocast(u):
        if backend == "triton":
            from kernels.fast_weights.triton_operators import delta_rule_triton

            return delta_rule_triton(q, k, a, u, g, initial_state, scale, cu_seqlens, output_final_state)
        state = state_or_zeros(initial_state, state_shape, like=q)
        run = partial(BACKENDS[backend], scale=scale)
        o, final_state = run_each_sequence(run, [q, k, a, u, g], state, cu_seqlens, like=u[:, :, 0])
    return o, final_state if output_final_state else None


@wraps(delta_rule)
def _with_or_without_erasing(*, a: Tensor | None = None, **given: Any) -> tuple[Tensor, Tensor | None]:
    return delta_rule(a=a, **given)


OPERATION = Operation(_with_or_without_erasing, random_problem, KEPT)
