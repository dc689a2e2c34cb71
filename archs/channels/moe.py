"""Mixture of experts.

Shape letters: B sequences, T tokens of each, N tokens in all, D model width, E experts, K experts per token, P = N K
pairs of a token and an expert, sorted by expert.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from archs.channels.experts import ExpertLinear
from archs.channels.mlp import MLP, activate, check_activation, hidden_width
from archs.channels.pairs import Pairs
from archs.channels.router import Router
from archs.contracts import Channel

if TYPE_CHECKING:  # needs a build of torch that has processes
    from archs.channels.exchange import Exchange


class MoE(Channel):
    """Mixture of experts (Shazeer et al., arXiv 1701.06538): each token goes through the `top_k` experts that its
    router chooses, weighted by their gates, and through the shared experts (DeepSeekMoE, arXiv 2401.06066).

    No expert has a capacity, so no token is dropped. Experts that no token chose in a training step get a gradient
    of zero.

    exchange: the way to the processes of experts that are dealt out; None where all are here.

    Args:
        width: model width.
        experts: number of routed experts.
        top_k: routed experts that a token goes through.
        activation: of all experts, as in `MLP`.
        gated: as in `MLP`.
        expansion: that of the dense MLP which costs a token as much (router aside): an expert's hidden width is
            expansion * width / (top_k + shared), rounded up to a multiple.
        multiple_of: see `expansion`.
        hidden: exact hidden width of an expert, in place of `expansion`.
        bias: biases in router and experts.
        shared: number of shared experts.
        shared_hidden: exact hidden width of each shared expert, with `hidden`; None for that of a routed one.
        shared_gate: whether a sigmoid of the token weighs the shared experts (Qwen2-MoE, Qwen3-Next).
        routing: options of `Router`.

    Raises:
        ValueError: for what `Router` and `MLP` refuse, or options of shared experts where there are none.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        activation: str,
        gated: bool,
        expansion: float | None = None,
        multiple_of: int = 1,
        hidden: int | None = None,
        bias: bool = False,
        shared: int = 0,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        **routing,
    ):
        super().__init__()
        check_activation(activation, gated)
        if shared < 0 or (not shared and (shared_gate or shared_hidden is not None)):
            raise ValueError(f"shared {shared} must be at least 1 for shared_hidden or shared_gate, and never negative")
        if expansion is not None and shared_hidden is not None:
            raise ValueError("shared_hidden goes with hidden; expansion sets the width of shared experts by itself")
        self.router = Router(width, experts=experts, top_k=top_k, bias=bias, **routing)
        hidden = hidden_width(width, expansion and expansion / (top_k + shared), multiple_of, hidden)
        self.activation, self.gated = activation, gated
        self.gate_up = ExpertLinear(experts, width, 2 * hidden if gated else hidden, bias, top_k)
        self.out_proj = ExpertLinear(experts, hidden, width, bias, top_k)
        self.shared = self.shared_gate = None
        if shared:
            # Several shared experts are one whose hidden layer is theirs side by side.
            shared_hidden = shared * (hidden if shared_hidden is None else shared_hidden)
            self.shared = MLP(width, activation=activation, gated=gated, hidden=shared_hidden, bias=bias)
        if shared_gate:
            self.shared_gate = nn.Linear(width, 1, bias=False)
        self.exchange: Exchange | None = None
        # Of the last training forward: choices of each expert, and pairs of a token and an expert asked and computed.
        self.load_E: Tensor | None = None
        self.asked = self.computed = 0

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Bring each token of x through its experts."""
        x_ND = x_BTD.flatten(0, 1)
        gates_NK, chosen_NK, load_E = self.router(x_ND)
        pairs = Pairs.of(chosen_NK)
        x_PD = pairs.spread(x_ND)
        y_PD = self._routed(x_PD, load_E) if self.exchange is None else self.exchange(self._routed, x_PD, load_E)
        y_ND = pairs.collect(y_PD, gates_NK.to(y_PD.dtype))
        if self.training:
            self.load_E, self.asked, self.computed = load_E, chosen_NK.numel(), len(y_PD)
        y_BTD = y_ND.view(x_BTD.shape)
        if self.shared is None:
            return y_BTD
        shared_BTD = self.shared(x_BTD)
        return y_BTD + (shared_BTD if self.shared_gate is None else self.shared_gate(x_BTD).sigmoid() * shared_BTD)

    def _routed(self, x_PD: Tensor, load_E: Tensor) -> Tensor:
        """Bring rows x [P, D], sorted by expert, through the experts that are here."""
        hidden = activate(self.gate_up(x_PD, load_E), self.activation, self.gated)
        return self.out_proj(hidden, load_E)

    def residual_projections(self) -> tuple[nn.Module, ...]:
        return (self.out_proj,) if self.shared is None else (self.out_proj, self.shared.out_proj)

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """The router's losses in the last forward, coefficients included: "balance", "router_z"; none in evaluation."""
        return self.router.losses

    def after_step(self) -> None:
        """Move the router's choice biases."""
        self.router.update_bias()

    def telemetry(self) -> dict[str, float]:
        """Figures of the last training forward, none before it.

        expert_load: the largest load over the mean load; 1 is even, E / top_k is all tokens to the same experts.
        router_entropy: in nats, of the routing distribution averaged over tokens; log E where all are used alike.
        dead_experts: fraction of the experts that no token chose.
        dropped_tokens: fraction of the chosen (token, expert) pairs that were not computed.
        """
        if self.load_E is None:
            return {}
        loads = self.load_E.tolist()
        return {
            "expert_load": max(loads) * len(loads) / self.asked,
            "router_entropy": torch.special.entr(self.router.fraction_E).sum().item(),
            "dead_experts": loads.count(0) / len(loads),
            "dropped_tokens": 1 - self.computed / self.asked,
        }

    @property
    def inactive_params(self) -> int:
        """Parameters of the experts that a token does not go through."""
        routed = sum(p.numel() for layer in (self.gate_up, self.out_proj) for p in layer.parameters())
        return routed // self.router.experts * (self.router.experts - self.router.top_k)

    def flops(self, T: int) -> int:
        """Forward FLOPs of one sequence of T tokens: router, top_k experts and shared experts."""
        router = self.router.linear.weight.numel()
        experts = self.router.top_k * (self.gate_up.weight[0].numel() + self.out_proj.weight[0].numel())
        gate = 0 if self.shared_gate is None else self.shared_gate.weight.numel()
        return 2 * T * (router + experts + gate) + (0 if self.shared is None else self.shared.flops(T))
