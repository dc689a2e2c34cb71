"""Linear attention: a matrix memory per head to which every token is added, and which may decay."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.mixers.heads import heads_for
from archs.state import RecurrentState
from archs.visibility import BIDIRECTIONAL, CAUSAL, Visibility
from kernels.causal_conv1d import causal_conv1d
from kernels.causal_conv1d.torch import causal_conv1d_flops
from kernels.ssd import ssd
from kernels.ssd.torch import ssd_flops


class LinearAttention(nn.Module):
    """S_t = e^{g_t} S_{t-1} + v_t k_t^T, o_t = S_t q_t / sqrt(head_dim), for each head.

    The decay is what tells the members of the family apart:

    - "none": g = 0 (Katharopoulos et al., arXiv 2006.16236, with a norm of the output in place of the sum of
      weights, as Qin et al., arXiv 2210.10340).
    - "fixed": e^g = 1 - 2^{-5 - h} in head h = 0, 1, ... (RetNet, Sun et al., arXiv 2307.08621).
    - "gated": g = -exp(A_log) softplus(a + dt_bias) with a from the token, one gate a head (Mamba-2; gated RetNet,
      Sun et al., arXiv 2405.05254).

    All else is laid out as in `GatedDelta` with one value head a key head: short convolution with SiLU, L2-normalised
    queries and keys (as in DeltaNet, Yang et al., arXiv 2406.06484), and an RMSNorm of each head's output with the
    gate SiLU(z), as in RetNet and GLA. So "none" is to DeltaNet what "gated" is to
    Gated DeltaNet: at the same norm_eps, each pair differs only in that the delta rule erases before it writes.

    Under bidirectional visibility the convolution and the memory run over the sequence in both directions with the
    same weights, and the two outputs are added before the norm.

    Args:
        width: model width.
        head_dim: dimension that keys and values of a head are to have, nearly (see `heads_for`).
        decay: "none", "fixed" or "gated".
        conv_width: taps of the short convolution; 1 looks at no other token.
        heads: exactly so many heads of exactly head_dim.
        norm_eps: added to the mean square in the norm.

    Raises:
        ValueError: for an unknown decay, or when the width cannot be cut into such heads.
    """

    visibilities = frozenset({CAUSAL, BIDIRECTIONAL})

    def __init__(
        self,
        width: int,
        *,
        head_dim: int,
        decay: Literal["none", "fixed", "gated"],
        conv_width: int,
        heads: int | None = None,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if decay not in ("none", "fixed", "gated"):
            raise ValueError(f"unknown decay {decay!r} for linear attention: choose from none, fixed, gated")
        if heads is None:
            heads = heads_for(width, head_dim)
            head_dim = width // heads
        self.heads, self.head_dim, self.decay = heads, head_dim, decay
        inner, gated = heads * head_dim, decay == "gated"
        self.sizes = [3 * inner, inner, heads if gated else 0]  # q, k and v (through the convolution); z; a
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * inner, conv_width))
        self.A_log = nn.Parameter(torch.empty(heads)) if gated else None
        self.dt_bias = nn.Parameter(torch.empty(heads)) if gated else None
        self.norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As in `GatedDelta`: decay rates from U(0, 16) and time steps from log-U(1e-3, 0.1)."""
        if self.decay == "gated":
            self.A_log.uniform_(1e-3, 16).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        nn.init.uniform_(self.conv_weight, -(self.conv_weight.shape[1] ** -0.5), self.conv_weight.shape[1] ** -0.5)

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        qkv, z, a = self.in_proj(x_BTD).split(self.sizes, dim=-1)
        if visibility is BIDIRECTIONAL:
            both = (torch.cat([t, t.flip(1)]) for t in (qkv, a))
            ahead, back = self._scan(*both, None)[0].chunk(2)
            o_BTHV, state = ahead + back.flip(1), None
        else:
            o_BTHV, state = self._scan(qkv, a, state)
        gated = self.norm(o_BTHV) * F.silu(z.view_as(o_BTHV))
        return self.out_proj(gated.flatten(2).to(x_BTD.dtype)), state

    def _scan(self, qkv: Tensor, a: Tensor, state: RecurrentState | None) -> tuple[Tensor, RecurrentState | None]:
        qkv, conv = causal_conv1d(qkv, self.conv_weight, initial_state=None if state is None else state.conv)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        dtype = torch.promote_types(qkv.dtype, torch.float32)  # gates lose small decays in half precision
        q, k = (t.to(dtype) * (t.to(dtype).square().sum(-1, keepdim=True) + 1e-6).rsqrt() for t in (q, k))
        o_BTHV, memory = ssd(
            v,
            None,
            self._log_decay(a.to(dtype)),
            k,
            q * self.head_dim**-0.5,
            initial_states=None if state is None else state.memory,
            return_final_states=state is not None,
        )
        return o_BTHV, None if state is None else RecurrentState(conv, memory)

    def _log_decay(self, a: Tensor) -> Tensor:
        """[B, T, H] where it is the token's, [H] where it is the head's."""
        match self.decay:
            case "none":
                return a.new_zeros(self.heads)
            case "fixed":
                return torch.log1p(-(2.0 ** (-5 - torch.arange(self.heads, device=a.device, dtype=a.dtype))))
            case "gated":
                return -self.A_log.to(a.dtype).exp() * F.softplus(a + self.dt_bias.to(a.dtype))

    def empty_state(self, batch: int) -> RecurrentState:
        channels, window = self.conv_weight.shape[0], self.conv_weight.shape[1] - 1
        weight = self.in_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.heads, self.head_dim, self.head_dim, dtype=dtype)
        return RecurrentState(weight.new_zeros(batch, window, channels), memory)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and convolution and chunked scan once a direction."""
        projections = 2 * T * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        scan = causal_conv1d_flops(T, *self.conv_weight.shape)
        scan += ssd_flops(T, self.heads, self.heads, self.head_dim, self.head_dim)
        return projections + (2 if visibility is BIDIRECTIONAL else 1) * scan
