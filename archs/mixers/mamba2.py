"""Mamba-2: a state space memory per head, with time steps, writes and reads chosen by the token.

Shape letters: B sequences, T tokens, D model width, H heads, P channels of a head, G groups, E channels of a group.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.mixers.heads import cut_heads
from archs.mixers.recurrent import RecurrentMixer, reset_decay
from archs.state import RecurrentState
from kernels import ssd, ssd_flops


class Mamba2(RecurrentMixer):
    """Mamba-2 mixer (Dao and Gu, arXiv 2405.21060).

    One projection gives the gate z, the input x with B and C, and the time steps dt. A short causal convolution
    with SiLU passes over x, B and C; `ssd` runs with dt = softplus(dt + dt_bias) and A = -exp(A_log), D skips the
    memory, and an RMSNorm over each group's channels takes the gate SiLU(z).

    Args:
        width: model width.
        head_dim: dimension that heads are to have, nearly, at `expand` times the width (see `cut_heads`).
        state_size: numbers that the memory keeps for each channel (128 as published).
        groups: heads / groups heads share B and C, and their channels one norm.
        expand: width of all heads together, as a multiple of the model width.
        heads: exactly so many heads, of exactly head_dim or, where that is None, of equal parts of that.
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

    def __init__(
        self,
        width: int,
        *,
        head_dim: int | None,
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
        heads, head_dim = cut_heads(round(width * expand), heads, head_dim, multiple=groups)
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
        self.D = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(inner)) if norm else None
        self.out_proj = nn.Linear(inner, width, bias=bias)
        self.memory_shape = heads, head_dim, state_size
        reset_decay(self.A_log, self.dt_bias, least=1.0)
        self.reset_convolution()

    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        z, xBC, dt = self.in_proj(x_BTD).split(self.sizes, dim=-1)
        return (xBC, dt), z

    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        xBC, dt = streams
        xBC, conv = self.convolve(xBC, state, cu_seqlens)
        shared = self.groups * self.state_size
        x, key, query = xBC.split([xBC.shape[-1] - 2 * shared, shared, shared], dim=-1)
        y_BTHP, memory = ssd(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_log.to(torch.promote_types(dt.dtype, torch.float32)).exp(),
            key.unflatten(-1, (self.groups, -1)),
            query.unflatten(-1, (self.groups, -1)),
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            initial_states=None if state is None else state.memory,
            return_final_states=state is not None,
            cu_seqlens=cu_seqlens,
        )
        return y_BTHP.flatten(2), conv, memory

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        y = y if self.norm_before_gate else y * F.silu(gate)
        if self.norm_weight is not None:
            y_BTGE = y.unflatten(-1, (self.groups, -1))
            y = F.rms_norm(y_BTGE, y_BTGE.shape[-1:], eps=self.norm_eps).flatten(2) * self.norm_weight.to(y.dtype)
        return self.out_proj(y * F.silu(gate) if self.norm_before_gate else y)

    def scan_flops(self, T: int) -> int:
        return ssd_flops(T, self.heads, self.groups, self.head_dim, self.state_size)
