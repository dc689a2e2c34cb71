"""Mamba-2: a state space memory per head, with time steps, writes and reads chosen by the token."""

import math

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


class Mamba2(nn.Module):
    """Mamba-2 mixer (Dao and Gu, arXiv 2405.21060).

    One projection gives the gate z, the input x with B and C, and the time steps dt. A short causal convolution
    with SiLU passes over x, B and C; `ssd` runs with dt = softplus(dt + dt_bias) and A = -exp(A_log), D skips the
    memory, and an RMSNorm over each group's channels takes the gate SiLU(z).

    Under bidirectional visibility the convolution and the memory run over the sequence in both directions with the
    same weights, and the two outputs are added before the norm.

    Args:
        width: model width.
        head_dim: dimension that heads are to have, nearly, at `expand` times the width (see `heads_for`).
        state_size: numbers that the memory keeps for each channel (128 as published).
        groups: heads / groups heads share B and C, and their channels one norm.
        expand: width of all heads together, as a multiple of the model width.
        heads: exactly so many heads of exactly head_dim; `expand` then has no say.
        conv_width: taps of the short convolution.
        conv_bias: whether it has biases.
        bias: whether the projections have biases.
        norm: whether there is a norm; Falcon-H1 has only the gate.
        norm_before_gate: whether the norm comes before the gate, and not after it.
        norm_eps: added to the mean square in the norm.
        dt_limit: least and greatest time step (Nemotron-H has a least one).

    Raises:
        ValueError: when the width cannot be cut into such heads, or the heads into such groups.
    """

    visibilities = frozenset({CAUSAL, BIDIRECTIONAL})

    def __init__(
        self,
        width: int,
        *,
        head_dim: int,
        state_size: int,
        groups: int = 1,
        expand: float = 2,
        heads: int | None = None,
        conv_width: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        norm: bool = True,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-6,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ):
        super().__init__()
        if heads is None:
            inner = round(width * expand)
            heads = heads_for(inner, head_dim, multiple=groups)
            head_dim = inner // heads
        if heads % groups:
            raise ValueError(f"{heads} heads cannot share {groups} groups evenly: choose groups that divide the heads")
        self.heads, self.head_dim, self.groups, self.state_size = heads, head_dim, groups, state_size
        self.norm_before_gate, self.norm_eps, self.dt_limit = norm_before_gate, norm_eps, tuple(dt_limit)
        inner, shared = heads * head_dim, groups * state_size
        self.sizes = [inner, inner + 2 * shared, heads]  # z; x, B and C (through the convolution); dt
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=bias)
        self.conv_weight = nn.Parameter(torch.empty(inner + 2 * shared, conv_width))
        self.conv_bias = nn.Parameter(torch.empty(inner + 2 * shared)) if conv_bias else None
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(inner)) if norm else None
        self.out_proj = nn.Linear(inner, width, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decay rates from U(1, 16), time steps from log-U(1e-3, 0.1), D one, and taps as PyTorch's convolution."""
        self.A_log.uniform_(1, 16).log_()
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.D.fill_(1)
        bound = self.conv_weight.shape[1] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        if self.conv_bias is not None:
            nn.init.uniform_(self.conv_bias, -bound, bound)
        if self.norm_weight is not None:
            self.norm_weight.fill_(1)

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        z, xBC, dt = self.in_proj(x_BTD).split(self.sizes, dim=-1)
        if visibility is BIDIRECTIONAL:
            both = (torch.cat([t, t.flip(1)]) for t in (xBC, dt))
            ahead, back = self._scan(*both, None)[0].chunk(2)
            y, state = ahead + back.flip(1), None
        else:
            y, state = self._scan(xBC, dt, state)
        return self.out_proj(self._gated(y, z)), state

    def _scan(self, xBC: Tensor, dt: Tensor, state: RecurrentState | None) -> tuple[Tensor, RecurrentState | None]:
        conv = None if state is None else state.conv
        xBC, conv = causal_conv1d(xBC, self.conv_weight, self.conv_bias, initial_state=conv)
        shared = self.groups * self.state_size
        x, B, C = xBC.split([xBC.shape[-1] - 2 * shared, shared, shared], dim=-1)
        y_BTHP, memory = ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_log.to(torch.promote_types(dt.dtype, torch.float32)).exp(),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=None if state is None else state.memory,
            return_final_states=state is not None,
        )
        return y_BTHP.flatten(2), None if state is None else RecurrentState(conv, memory)

    def _gated(self, y: Tensor, z: Tensor) -> Tensor:
        y = y if self.norm_before_gate else y * F.silu(z)
        if self.norm_weight is not None:
            y_BTGC = y.unflatten(-1, (self.groups, -1))
            y = F.rms_norm(y_BTGC, y_BTGC.shape[-1:], eps=self.norm_eps).flatten(2) * self.norm_weight.to(y.dtype)
        return y * F.silu(z) if self.norm_before_gate else y

    def empty_state(self, batch: int) -> RecurrentState:
        channels, window = self.conv_weight.shape[0], self.conv_weight.shape[1] - 1
        weight = self.in_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.heads, self.head_dim, self.state_size, dtype=dtype)
        return RecurrentState(weight.new_zeros(batch, window, channels), memory)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and convolution and chunked scan once a direction."""
        projections = 2 * T * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        scan = causal_conv1d_flops(T, *self.conv_weight.shape)
        scan += ssd_flops(T, self.heads, self.groups, self.head_dim, self.state_size)
        return projections + (2 if visibility is BIDIRECTIONAL else 1) * scan
