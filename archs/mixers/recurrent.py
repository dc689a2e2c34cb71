"""The body that recurrent mixers share: one or both directions, the short convolution, decays, states and their cost.

Shape letters: B sequences, T tokens, L tokens of one copy of a sequence, D model width, W taps of the convolution, C
its channels, H heads, N documents.
"""

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.contracts import Mixer
from archs.state import RecurrentState
from archs.visibility import Kind, Visibility
from kernels import causal_conv1d, causal_conv1d_flops

STEPS = 1e-3, 0.1  # range of time steps at the start, as Mamba-2 and Gated DeltaNet have it


class RecurrentMixer(Mixer[RecurrentState]):
    """Project, scan the sequence, read out. One kind of recurrent mixer writes these three, `scan_flops` and, in
    `__init__`, its parameters: `in_proj` and `out_proj`, the taps `conv_weight` [C, W] with `conv_bias` [C] or None,
    and `memory_shape`, the shape of the memory of one sequence, or None where there is none.

    Under bidirectional visibility the scan runs over the sequence in both directions with the same weights, and the two
    outputs are added before the read-out: projections are paid once, the scan twice. So a recurrent backbone serves a
    denoiser without a second set of weights.
    """

    in_proj: nn.Linear
    out_proj: nn.Linear
    conv_weight: nn.Parameter
    conv_bias: nn.Parameter | None
    memory_shape: tuple[int, ...] | None

    @property
    def visibilities(self) -> frozenset[Kind]:
        return frozenset({Kind.CAUSAL, Kind.BIDIRECTIONAL})

    @abstractmethod
    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what is scanned, each [B, T, ...], and what the read-out needs besides."""

    @abstractmethod
    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the streams of `project` through the recurrence, by the convention of the kernels: from the state or from
        nothing, and with cu_seqlens [N + 1] as packed documents in a batch of one.

        Returns:
            What the memory answers [B, T, ...], the last inputs of the convolution [B, W - 1, C] and the memory.
        """

    @abstractmethod
    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        """Bring what the memory answered to [B, T, D]."""

    @abstractmethod
    def scan_flops(self, T: int) -> int:
        """Forward FLOPs of the recurrence over one sequence in one direction, without the convolution."""

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mix x; see `Mixer`.

        Raises:
            ValueError: for packed documents that are to continue a state.
        """
        streams, gate = self.project(x_BTD)
        both = visibility.kind is Kind.BIDIRECTIONAL
        if visibility.starts_BL is not None:
            if state is not None:
                raise ValueError("packed documents start from nothing: run them without a state")
            y = self._scan_packed(streams, visibility.cu_seqlens(), both).unflatten(1, x_BTD.shape[:2])[0]
        elif both:
            forth, back = self.scan(tuple(torch.cat([s, s.flip(1)]) for s in streams), None, None)[0].chunk(2)
            y, state = forth + back.flip(1), None
        else:
            y, conv, memory = self.scan(streams, state, None)
            if state is not None:
                state = RecurrentState(conv, memory, state.length + x_BTD.shape[1])
        return self.read_out(y, gate), state

    def _scan_packed(self, streams: tuple[Tensor, ...], cu_seqlens: Tensor, both: bool) -> Tensor:
        """[1, B T, ...]: all sequences end to end, and behind them, where both directions are wanted, in reverse."""
        rows = tuple(s.flatten(0, 1)[None] for s in streams)
        if not both:
            return self.scan(rows, None, cu_seqlens)[0]
        rows = tuple(torch.cat([r, r.flip(1)], dim=1) for r in rows)
        reverse = 2 * cu_seqlens[-1] - cu_seqlens.flip(0)
        forth, back = self.scan(rows, None, torch.cat([cu_seqlens, reverse[1:]]))[0].chunk(2, dim=1)
        return forth + back.flip(1)

    def convolve(
        self, x_BTC: Tensor, state: RecurrentState | None, cu_seqlens: Tensor | None, activation: str | None = "silu"
    ) -> tuple[Tensor, Tensor]:
        """x after the short convolution, and its last W - 1 inputs."""
        return causal_conv1d(
            x_BTC,
            self.conv_weight,
            self.conv_bias,
            initial_state=None if state is None else state.conv,
            activation=activation,
            cu_seqlens=cu_seqlens,
        )

    def residual_projections(self) -> tuple[nn.Linear]:
        return (self.out_proj,)

    def empty_state(self, batch: int) -> RecurrentState:
        weight, (channels, taps) = self.in_proj.weight, self.conv_weight.shape
        memory = None
        if self.memory_shape is not None:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            memory = weight.new_zeros(batch, *self.memory_shape, dtype=dtype)
        return RecurrentState(weight.new_zeros(batch, taps - 1, channels), memory)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and convolution and scan once per direction."""
        projections = 2 * T * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        directions = 2 if visibility.kind is Kind.BIDIRECTIONAL else 1
        return projections + directions * (causal_conv1d_flops(T, *self.conv_weight.shape) + self.scan_flops(T))

    @torch.no_grad()
    def reset_convolution(self) -> None:
        """Start the taps as PyTorch starts those of its convolutions."""
        bound = self.conv_weight.shape[1] ** -0.5
        for taps in (self.conv_weight, self.conv_bias):
            if taps is not None:
                nn.init.uniform_(taps, -bound, bound)


@torch.no_grad()
def reset_decay(A_log_H: Tensor, dt_bias_H: Tensor, least: float) -> None:
    """Start decay rates as U(least, 16) and time steps as log-U(1e-3, 0.1), as Mamba-2 and Gated DeltaNet do."""
    A_log_H.uniform_(least, 16).log_()
    dt = torch.empty_like(dt_bias_H).uniform_(*map(math.log, STEPS)).exp_()
    dt_bias_H.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def log_decay(a_BTH: Tensor, A_log_H: Tensor, dt_bias_H: Tensor) -> Tensor:
    """-exp(A_log) softplus(a + dt_bias), [B, T, H], in the dtype of a, which is to be float32 or wider: gates lose
    small decays in half precision."""
    dtype = a_BTH.dtype
    return -A_log_H.to(dtype).exp() * F.softplus(a_BTH + dt_bias_H.to(dtype))


def gated(y: Tensor, norm: nn.Module, gate: Tensor) -> Tensor:
    """The norm of each head's answer [B, T, H, ...] times SiLU(gate), as [B, T, D] in the gate's dtype."""
    return (norm(y) * F.silu(gate.view_as(y))).flatten(2).to(gate.dtype)


def normalised(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x over its L2 norm along the last axis, in `dtype`."""
    x = x.to(dtype)
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
