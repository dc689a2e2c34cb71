"""Kimi delta attention: the gated delta rule with a decay for each key channel.

Shape letters: B sequences, T tokens, D model width, H heads, K dimensions of a head's queries, keys and values.
"""

import torch
from torch import Tensor, nn

from archs.mixers.heads import cut_heads
from archs.mixers.recurrent import RecurrentMixer, log_decay, normalised, reset_decay
from archs.state import RecurrentState
from archs.visibility import Visibility
from kernels import delta_rule, delta_rule_flops


class KimiDelta(RecurrentMixer):
    """Kimi delta attention (Kimi Linear, arXiv 2510.26692, section 4).

    Queries, keys and values pass a short causal convolution with SiLU; queries and keys are L2-normalised. The decay
    of a key channel is g = -exp(A_log) softplus(up(down(x)) + dt_bias), through as many dimensions as a head has, and
    the writing strength beta = sigmoid(b). The output goes through an RMSNorm of each head and a sigmoid gate, which
    is made through as few dimensions.

    Args:
        width: model width.
        head_dim: dimension that a head is to have, nearly (see `cut_heads`).
        conv_width: taps of the short convolution.
        heads: exactly so many heads, of exactly head_dim or, where that is None, of equal parts of the width.
        norm_eps: added to the mean square in the norm; None is the input's machine epsilon.

    Raises:
        ValueError: when the width cannot be cut into such heads.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int | None,
        conv_width: int,
        heads: int | None = None,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.heads, self.head_dim = cut_heads(width, heads, head_dim)
        self.memory_shape = self.heads, self.head_dim, self.head_dim
        inner = self.heads * self.head_dim
        # q, k, v (through the convolution), then what the decays and the gate are made from, and b
        self.sizes = [3 * inner, self.head_dim, self.head_dim, self.heads]
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.decay_up = nn.Linear(self.head_dim, inner, bias=False)
        self.gate_up = nn.Linear(self.head_dim, inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(3 * inner, conv_width))
        self.conv_bias = None
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, self.head_dim))
        self.norm = nn.RMSNorm(self.head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(inner, width, bias=False)
        reset_decay(self.A_log, self.dt_bias, least=1.0)
        self.reset_convolution()

    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        qkv, decay, gate, b = self.in_proj(x_BTD).split(self.sizes, dim=-1)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        a_BTHK = self.decay_up(decay).unflatten(-1, (self.heads, -1))
        g_BTHK = log_decay(a_BTHK.to(dtype), self.A_log[:, None], self.dt_bias)
        return (qkv, g_BTHK, b.to(dtype).sigmoid()), self.gate_up(gate)

    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        qkv, g_BTHK, beta_BTH = streams
        qkv, conv = self.convolve(qkv, state, cu_seqlens)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, beta = normalised(q, g_BTHK.dtype), normalised(k, g_BTHK.dtype), beta_BTH[..., None]
        o_BTHK, memory = delta_rule(
            q,
            k,
            beta * k,
            beta * v,
            g_BTHK,
            initial_state=None if state is None else state.memory,
            output_final_state=state is not None,
            cu_seqlens=cu_seqlens,
        )
        return o_BTHK.to(v.dtype), conv, memory

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj((self.norm(y).flatten(2) * gate.sigmoid()).to(gate.dtype))

    def flops(self, T: int, visibility: Visibility) -> int:
        ups = self.decay_up.weight.numel() + self.gate_up.weight.numel()
        return super().flops(T, visibility) + 2 * T * ups

    def scan_flops(self, T: int) -> int:
        return delta_rule_flops(T, self.heads, self.head_dim, self.head_dim, per_channel=self.head_dim > 1)
