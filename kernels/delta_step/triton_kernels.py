"""A step of a gated delta mixer in Triton: one program per sequence and value head holds that head's whole memory.

The value heads of a group read the same queries and keys: each convolves them for itself, which costs less than a
launch, and the first of the group writes what the convolution keeps of them.

Shape letters: H key heads of K dimensions, HV value heads of V dimensions, C channels, W taps.
"""

import triton
import triton.language as tl

from kernels.common.tiles import softplus


@triton.jit
def convolved(qkv, conv, conv_weight, conv_after, sequence, channels, exist, writes, C, W: tl.constexpr):
    """Return the channels [block] after convolution and SiLU, and store what the convolution keeps where `writes`."""
    now = tl.load(qkv + sequence * C + channels, mask=exist, other=0.0).to(tl.float32)
    total = now * tl.load(conv_weight + channels * W + W - 1, mask=exist, other=0.0).to(tl.float32)
    before = conv + sequence * (W - 1) * C + channels
    after = conv_after + sequence * (W - 1) * C + channels
    for w in tl.static_range(W - 1):
        x = tl.load(before + w * C, mask=exist, other=0.0).to(tl.float32)
        total += x * tl.load(conv_weight + channels * W + w, mask=exist, other=0.0).to(tl.float32)
        if w > 0:
            tl.store(after + (w - 1) * C, x.to(conv_after.dtype.element_ty), mask=exist & writes)
    if W > 1:
        tl.store(after + (W - 2) * C, now.to(conv_after.dtype.element_ty), mask=exist & writes)
    return total * tl.sigmoid(total)


@triton.jit
def normalised(x):
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@triton.jit(do_not_specialize=["HV", "H", "C", "eps", "scale"])
def step_kernel(
    qkv, a, b, z, conv, memory, conv_weight, A_log, dt_bias, norm_weight, y, conv_after, memory_after, eps, scale, HV,
    H, C, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    DECAYS: tl.constexpr,
):  # fmt: skip
    """Store y, and the convolution's inputs and the memory after the token."""
    sequence, hv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = HV // H
    h, first = hv // group, hv % group == 0
    i, j = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q_K = convolved(qkv, conv, conv_weight, conv_after, sequence, h * K + i, i < K, first, C, W)
    k_K = convolved(qkv, conv, conv_weight, conv_after, sequence, (H + h) * K + i, i < K, first, C, W)
    v_V = convolved(qkv, conv, conv_weight, conv_after, sequence, 2 * H * K + hv * V + j, j < V, hv >= 0, C, W)
    q_K, k_K = normalised(q_K) * scale, normalised(k_K)

    head = sequence * HV + hv
    at, exist = (head * K + i[:, None]) * V + j[None], (i < K)[:, None] & (j < V)[None]
    S = tl.load(memory + at, mask=exist, other=0.0)
    if DECAYS:
        x = tl.load(a + head).to(tl.float32) + tl.load(dt_bias + hv).to(tl.float32)
        S *= tl.exp(-tl.exp(tl.load(A_log + hv).to(tl.float32)) * softplus(x))
    beta = tl.sigmoid(tl.load(b + head).to(tl.float32))
    S += k_K[:, None] * (beta * (v_V - tl.sum(S * k_K[:, None], 0)))[None]
    tl.store(memory_after + at, S, mask=exist)

    o_V = tl.sum(S * q_K[:, None], 0)
    gate = tl.load(z + head * V + j, mask=j < V, other=0.0).to(tl.float32)
    o_V *= tl.rsqrt(tl.sum(o_V * o_V, 0) / V + eps) * gate * tl.sigmoid(gate)
    o_V *= tl.load(norm_weight + j, mask=j < V, other=0.0).to(tl.float32)
    tl.store(y + head * V + j, o_V.to(y.dtype.element_ty), mask=j < V)
