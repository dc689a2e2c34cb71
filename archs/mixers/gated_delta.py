"""DeltaNet and Gated DeltaNet: a matrix memory per head, written by the (gated) delta rule."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archs.mixers.heads import heads_for
from archs.state import RecurrentState
from archs.visibility import BIDIRECTIONAL, CAUSAL, Visibility
from kernels import causal_conv1d, gated_delta_rule
from kernels.causal_conv1d.torch import causal_conv1d_flops
from kernels.gated_delta_rule.torch import gated_delta_rule_flops


class GatedDelta(nn.Module):
    """Gated delta-rule mixer (Yang et al., arXiv 2412.06464; laid out as in Qwen3-Next).

    Queries, keys and values pass a short causal convolution with SiLU; queries and keys are L2-normalised; the
    decay is g = -exp(A_log) softplus(a + dt_bias) and the writing strength beta = sigmoid(b); the output goes
    through an RMSNorm gated by SiLU(z).
    Without the decay, g = 0, the mixer is DeltaNet (Yang et al., arXiv 2406.06484).

    Under bidirectional visibility the convolution and the delta rule run over the sequence in both directions
    with the same weights, and the two outputs are added before the norm: projections are paid once, the scan
    twice. So a recurrent backbone serves a denoiser without a second set of weights.

    Args:
        width: model width.
        head_dim: dimension that values of a head are to have, nearly (see `heads_for`), and keys too.
        value_heads_per_key_head: value heads that read the same key head (2 in Qwen3-Next).
        conv_width: taps of the short convolution.
        heads: exactly so many value heads of exactly head_dim.
        key_dim: exact dimension of a head's keys, where it is not to be that of its values.
        decay: whether the memory decays; without, the mixer is DeltaNet.
        norm_eps: added to the mean square in the norm; None is the input's machine epsilon (1e-6 in Qwen3-Next).

    Raises:
        ValueError: when the width cannot be cut into such heads, or the value heads share key heads unevenly.
    """

    visibilities = frozenset({CAUSAL, BIDIRECTIONAL})

    def __init__(
        self,
        width: int,
        *,
        head_dim: int,
        value_heads_per_key_head: int,
        conv_width: int,
        heads: int | None = None,
        key_dim: int | None = None,
        decay: bool = True,
        norm_eps: float | None = None,
    ):
        super().__init__()
        if heads is None:
            heads = heads_for(width, head_dim, multiple=value_heads_per_key_head)
            head_dim = width // heads
        if heads % value_heads_per_key_head:
            raise ValueError(
                f"{heads} value heads cannot share key heads in groups of {value_heads_per_key_head}: choose a "
                "value_heads_per_key_head that divides the heads"
            )
        self.value_heads, self.value_dim = heads, head_dim
        self.key_dim = head_dim if key_dim is None else key_dim
        keys, values = heads // value_heads_per_key_head * self.key_dim, heads * head_dim
        # q, k, v (through the convolution), then z, a, b
        self.sizes = [keys, keys, values, values, heads if decay else 0, heads]
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, conv_width))
        self.A_log = nn.Parameter(torch.empty(heads)) if decay else None
        self.dt_bias = nn.Parameter(torch.empty(heads)) if decay else None
        self.norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Decay rates from U(0, 16) and time steps from log-U(1e-3, 0.1), as Mamba-2 and Gated DeltaNet do."""
        if self.A_log is not None:
            self.A_log.uniform_(1e-3, 16).log_()
            dt = torch.empty_like(self.dt_bias).uniform_(-6.9078, -2.3026).exp_()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        nn.init.uniform_(self.conv_weight, -(self.conv_weight.shape[1] ** -0.5), self.conv_weight.shape[1] ** -0.5)

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        qkv, z, a, b = self.in_proj(x_BTD).split([sum(self.sizes[:3]), *self.sizes[3:]], dim=-1)
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)  # gates lose small decays in half precision
        beta = b.to(dtype).sigmoid()
        if self.A_log is None:
            g = torch.zeros_like(beta)
        else:
            g = -self.A_log.to(dtype).exp() * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))
        if visibility is BIDIRECTIONAL:
            both = (torch.cat([x, x.flip(1)]) for x in (qkv, g, beta))
            ahead, back = self._scan(*both, None)[0].chunk(2)
            o_BTHV, state = ahead + back.flip(1), None
        else:
            o_BTHV, state = self._scan(qkv, g, beta, state)
        gated = self.norm(o_BTHV) * F.silu(z.view_as(o_BTHV))
        return self.out_proj(gated.flatten(2).to(x_BTD.dtype)), state

    def _scan(
        self, qkv: Tensor, g: Tensor, beta: Tensor, state: RecurrentState | None
    ) -> tuple[Tensor, RecurrentState | None]:
        qkv, conv = causal_conv1d(qkv, self.conv_weight, initial_state=None if state is None else state.conv)
        q, k, v = qkv.split(self.sizes[:3], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in ((q, self.key_dim), (k, self.key_dim), (v, self.value_dim)))
        q, k = (x.to(g.dtype) * (x.to(g.dtype).square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
        memory = None if state is None else state.memory
        o_BTHV, memory = gated_delta_rule(q, k, v, g, beta, initial_state=memory, output_final_state=state is not None)
        return o_BTHV, None if state is None else RecurrentState(conv, memory)

    def empty_state(self, batch: int) -> RecurrentState:
        channels, window = self.conv_weight.shape[0], self.conv_weight.shape[1] - 1
        weight = self.in_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.value_heads, self.key_dim, self.value_dim, dtype=dtype)
        return RecurrentState(weight.new_zeros(batch, window, channels), memory)

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence: projections, and convolution and chunked scan once a direction."""
        projections = 2 * T * (self.in_proj.weight.numel() + self.out_proj.weight.numel())
        scan = causal_conv1d_flops(T, *self.conv_weight.shape)
        scan += gated_delta_rule_flops(T, self.value_heads, self.key_dim, self.value_dim)
        return projections + (2 if visibility is BIDIRECTIONAL else 1) * scan
