"""One decoded token of a gated delta mixer in one launch: short convolution, norms, gates, the delta rule, gated norm.

It is what `causal_conv1d`, `gated_delta_rule` and a gated RMSNorm give for one token (Gated DeltaNet, arXiv 2412.06464,
laid out as in Qwen3-Next), which by themselves are some forty launches; a decoded token is nothing but launches.

Shape letters: B sequences, H key heads of K dimensions, HV value heads of V dimensions, C = 2 H K + HV V channels of
the convolution, W its taps.
"""

import torch
from torch import Tensor

from kernels.common.arguments import check_shape
from kernels.common.dispatch import choose_backend
from kernels.common.operation import Operation
from kernels.convolution.depthwise import causal_conv1d_flops
from kernels.delta.chunked import gated_delta_rule_flops
from kernels.delta_step.problems import KEPT, random_problem
from kernels.delta_step.reference import gated_delta_step_reference

__all__ = ["OPERATION", "gated_delta_step", "gated_delta_step_flops"]


@torch.no_grad()
def gated_delta_step(
    qkv: Tensor,
    a: Tensor | None,
    b: Tensor,
    z: Tensor,
    conv: Tensor,
    memory: Tensor,
    conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one token reads, and the states after it. There are no gradients.

    With x the convolution of qkv and of the inputs before it, SiLU behind it, q and k its heads over their L2 norms
    (1e-6 under the root) and v the rest, g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b):

        S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = K^-0.5 S^T q;  y = RMSNorm(o) norm_weight SiLU(z)

    Args:
        qkv: [B, C], queries and keys of H heads and values of HV heads, one behind the other, before the convolution.
        a: [B, HV], or None, with A_log and dt_bias, for a memory that does not decay (DeltaNet).
        b: [B, HV].
        z: [B, HV, V], gate of the output.
        conv: [B, W - 1, C], the inputs before this one.
        memory: [B, HV, K, V] in float32, or float64 for float64 inputs.
        conv_weight: [C, W], the last column weighs the current token.
        A_log, dt_bias: [HV].
        norm_weight: [V].
        eps: added to the mean square of o; 1e-6 in Qwen3-Next.
        backend: "auto" (see `choose_backend`), "reference", or "triton" (float32, bfloat16 and float16, heads of up
            to 128 dimensions).

    Returns:
        y [B, HV, V] in z's dtype, and conv and memory after the token, in new tensors of their dtypes.

    Raises:
        ValueError: for shapes that do not fit together, or a backend that does not exist or that cannot run here.
    """
    (B, C), (HV, K, V), W = qkv.shape, memory.shape[1:], conv_weight.shape[1]
    H = (C - HV * V) // (2 * K)
    if C != 2 * H * K + HV * V or H < 1 or HV % H:
        raise ValueError(
            f"{C} channels are not the queries and keys of some heads of {K} and the values of {HV} heads of {V}, a "
            "multiple of those"
        )
    gates = [x is not None for x in (a, A_log, dt_bias)]
    if any(gates) != all(gates):
        raise ValueError("a, A_log and dt_bias go together: give all three, or None for a memory that does not decay")
    for name, x, shape in (
        ("a", a, (B, HV)),
        ("b", b, (B, HV)),
        ("z", z, (B, HV, V)),
        ("conv", conv, (B, W - 1, C)),
        ("memory", memory, (B, HV, K, V)),
        ("conv_weight", conv_weight, (C, W)),
        ("A_log", A_log, (HV,)),
        ("dt_bias", dt_bias, (HV,)),
        ("norm_weight", norm_weight, (V,)),
    ):
        check_shape(name, x, shape)
    backend = choose_backend(
        OPERATION, backend, ["reference", "triton"], "reference", qkv, key_heads=1, heads=2, head_dim=K, value_dim=V
    )
    inputs = (qkv, a, b, z, conv, memory, conv_weight, A_log, dt_bias, norm_weight)
    if backend == "triton":
        from kernels.delta_step.triton_operators import gated_delta_step_triton

        return gated_delta_step_triton(*inputs, eps)
    return gated_delta_step_reference(*inputs, eps)


def gated_delta_step_flops(heads: int, key_heads: int, head_dim: int, value_dim: int, taps: int = 4) -> int:
    """Return the FLOPs of a step of one sequence: those of the convolution and of the delta rule on one token."""
    channels = 2 * key_heads * head_dim + heads * value_dim
    return causal_conv1d_flops(1, channels, taps) + gated_delta_rule_flops(1, heads, head_dim, value_dim)


OPERATION = Operation(gated_delta_step, random_problem, KEPT, differentiable=False)
