"""DeltaNet and Gated DeltaNet: a matrix memory per head, written by the (gated) delta rule.

Shape letters: B sequences, T tokens, D model width, H value heads, V dimensions of a value head.
"""

import torch
from torch import Tensor, nn

from archs.mixers.heads import cut_heads
from archs.mixers.recurrent import RecurrentMixer, gated, reset_decay
from archs.state import RecurrentState
from archs.visibility import Visibility
from kernels import gated_delta_rule, gated_delta_rule_flops, gated_delta_step


class GatedDelta(RecurrentMixer):
    """Gated delta-rule mixer (Yang et al., arXiv 2412.06464; laid out as in Qwen3-Next).

    Queries, keys and values pass a short causal convolution with SiLU; queries and keys are L2-normalised; the
    decay is g = -exp(A_log) softplus(a + dt_bias) and the writing strength beta = sigmoid(b); the output goes
    through an RMSNorm gated by SiLU(z).
    Without the decay, g = 0, the mixer is DeltaNet (Yang et al., arXiv 2406.06484).

    Args:
        width: model width.
        head_dim: dimension that values of a head are to have, nearly (see `cut_heads`), and keys too.
        value_heads_per_key_head: value heads that read the same key head (2 in Qwen3-Next).
        conv_width: taps of the short convolution.
        heads: exactly so many value heads, of exactly head_dim or, where that is None, of equal parts of the width.
        key_dim: exact dimension of a head's keys, where it is not to be that of its values.
        decay: whether the memory decays; without, the mixer is DeltaNet.
        norm_eps: added to the mean square in the norm; None is the input's machine epsilon (1e-6 in Qwen3-Next).

    Raises:
        ValueError: when the width cannot be cut into such heads, or the value heads share key heads unevenly.
    """

    def __init__(
        self,
        width: int,
        *,
        head_dim: int | None,
        value_heads_per_key_head: int,
        conv_width: int,
        heads: int | None = None,
        key_dim: int | None = None,
        decay: bool = True,
        norm_eps: float | None = None,
    ):
        super().__init__()
        heads, head_dim = cut_heads(width, heads, head_dim, multiple=value_heads_per_key_head)
        if heads % value_heads_per_key_head:
            raise ValueError(
                f"{heads} value heads cannot share key heads in groups of {value_heads_per_key_head}: choose a "
                "value_heads_per_key_head that divides the heads"
            )
        self.value_heads, self.value_dim = heads, head_dim
        self.key_dim = head_dim if key_dim is None else key_dim
        self.memory_shape = heads, self.key_dim, head_dim
        keys, values = heads // value_heads_per_key_head * self.key_dim, heads * head_dim
        # q, k, v (through the convolution), then z, a, b
        self.sizes = [keys, keys, values, values, heads if decay else 0, heads]
        self.in_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, conv_width))
        self.conv_bias = None
        self.A_log = nn.Parameter(torch.empty(heads)) if decay else None
        self.dt_bias = nn.Parameter(torch.empty(heads)) if decay else None
        self.norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.out_proj = nn.Linear(values, width, bias=False)
        if self.A_log is not None and self.dt_bias is not None:
            reset_decay(self.A_log, self.dt_bias, least=1e-3)
        self.reset_convolution()

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: RecurrentState | None = None
    ) -> tuple[Tensor, RecurrentState | None]:
        if state is None or state.memory is None or x_BTD.shape[1] != 1 or torch.is_grad_enabled():
            return super().forward(x_BTD, visibility, state)
        return self._step(x_BTD, state, state.memory)

    def _step(self, x_B1D: Tensor, state: RecurrentState, memory: Tensor) -> tuple[Tensor, RecurrentState]:
        """One token more, without gradients: all between the two projections at once."""
        qkv, z, a, b = self._projected(x_B1D[:, 0])
        y_BHV, conv, memory = gated_delta_step(
            qkv,
            None if self.A_log is None else a,
            b,
            z.unflatten(-1, (self.value_heads, self.value_dim)),
            state.conv,
            memory,
            self.conv_weight,
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            eps=torch.finfo(qkv.dtype).eps if self.norm.eps is None else self.norm.eps,
        )
        return self.out_proj(y_BHV.flatten(1))[:, None], RecurrentState(conv, memory, state.length + 1)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.in_proj(x).split([sum(self.sizes[:3]), *self.sizes[3:]], dim=-1)

    def project(self, x_BTD: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        qkv, z, a, b = self._projected(x_BTD)
        return (qkv, a, b.to(torch.promote_types(x_BTD.dtype, torch.float32)).sigmoid()), z

    def scan(
        self, streams: tuple[Tensor, ...], state: RecurrentState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        qkv, a, beta = streams
        qkv, conv = self.convolve(qkv, state, cu_seqlens)
        q, k, v = qkv.split(self.sizes[:3], dim=-1)
        q, k, v = (x.unflatten(-1, (-1, dim)) for x, dim in ((q, self.key_dim), (k, self.key_dim), (v, self.value_dim)))
        o_BTHV, memory = gated_delta_rule(
            q,
            k,
            v,
            None if self.A_log is None else a,
            beta,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_qk_l2norm=True,
            initial_state=None if state is None else state.memory,
            output_final_state=state is not None,
            cu_seqlens=cu_seqlens,
        )
        return o_BTHV, conv, memory

    def read_out(self, y: Tensor, gate: Tensor) -> Tensor:
        return self.out_proj(gated(y, self.norm, gate))

    def scan_flops(self, T: int) -> int:
        return gated_delta_rule_flops(T, self.value_heads, self.key_dim, self.value_dim)
