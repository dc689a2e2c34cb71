"""Linear attention: a matrix memory per head to which every token is added, and which may decay.

Shape letters: B sequences, T tokens, D model width, H heads, V dimensions of a head.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from archs.mixers.heads import cut_heads
from archs.mixers.recurrent import RecurrentMixer, gated, log_decay, normalised, reset_decay
from archs.state import RecurrentState
from kernels import ssd, ssd_flops


class LinearAttention(RecurrentMixer):
    """S_t = e^{g_t} S_{t-1} + v_t k_t^T, o_t = S_t q_t / sqrt(head_dim), for each head.

    The decay is what tells the members of the family apart:

    - "none": g = 0 (Katharopoulos et al., arXiv 2006.16236, with a norm of the output in place of the sum of
      weights, as Qin et al., arXiv 2210.10340).
    - "fixed": e^g = 1 - 2^{-5 - h} in head h = 0, 1, ... (RetNet, Sun et al., arXiv 2307.08621).
    - "gated": g = -exp(A_log) softplus(a + dt_bias) with a from the token, one gate per head (Mamba-2; gated RetNet,
      Sun et al., arXiv 2405.05254).

    All else is laid out as in `GatedDelta` with one value head per key head: short convolution with SiLU, L2-normalised
    queries and keys (as in DeltaNet, Yang et al., arXiv 2406.06484), and an RMSNorm of each head's output with the
    gate SiLU(z), as in RetNet and GLA. So "none" is to DeltaNet what "gated" is to
    Gated DeltaNet: at the same norm_eps, each pair differs only in that the delta rule erases before it writes.

    Args:
        width: model width.
        head_dim: dimension that keys and values of a head are to have, nearly (see `cut_heads`).
        decay: "none", "fixed" or "gated".
        conv_width: taps of the short convolution; 1 looks at no other token.
        heads: exactly so many heads, of exactly head_dim or, where that is None, of equal parts of the width.
        norm_eps: added to the mean square in the norm.

    Raises:
        ValueError: for an unknown decay, or when the width cannot be cut into such heads.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int | None,
        decay: Literal["none", "fixed", "gated"],
        conv_width: int,
        heads: int | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if decay not in ("none", "fixed", "gated"):
            raise ValueError(f"unknown decay {decay!r} for linear attention: choose from none, fixed, gated")
        heads, head_dim = cut_heads(width, heads, head_dim)
        self.heads, self.head_dim, self.decay = heads, head_dim, decay
        self.memory_shape = heads, head_dim, head_dim
        inner, has_gate = heads * head_dim, decay == "gated"
        self.sizes = [3 * inner, inner, heads if has_gate else 0]  # q, k and v (through the convolution); z; a
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * inner, conv_width))
        self.conv_bias = None
        self.A_log = nn.Parameter(torch.empty(heads)) if has_gate else None
        self.dt_bias = nn.Parameter(torch.empty(heads)) if has_gate else None
        self.norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)
        if self.A_log is not None and self.dt_bias is not None:
            reset_decay(self.A_log, self.dt_bias, least=1e-3)
        self.reset_convolution()

    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        qkv, z, a = self.in_proj(x_BTD).split(self.sizes, dim=-1)
        return (qkv, a), z

    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        qkv, a = streams
        qkv, conv = self.convolve(qkv, state, cu_seqlens)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        o_BTHV, memory = ssd(
            v,
            None,
            self._log_decay(a.to(dtype)),
            normalised(k, dtype),
            normalised(q, dtype) * self.head_dim**-0.5,
            initial_states=None if state is None else state.memory,
            return_final_states=state is not None,
            cu_seqlens=cu_seqlens,
        )
        return o_BTHV, conv, memory

    def _log_decay(self, a: Tensor) -> Tensor:
        """[B, T, H] where it is the token's, [H] where it is the head's."""
        if self.A_log is not None and self.dt_bias is not None:
            return log_decay(a, self.A_log, self.dt_bias)
        if self.decay == "none":
            return a.new_zeros(self.heads)
        return torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads, device=a.device, dtype=a.dtype))))

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(gated(y, self.norm, gate))

    def scan_flops(self, T: int) -> int:
        return ssd_flops(T, self.heads, self.heads, self.head_dim, self.head_dim)
