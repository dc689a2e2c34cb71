"""The router: the choice of a token's experts, and what keeps their loads even.

Shape letters: N tokens, D model width, E experts, K experts per token.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Scores every expert for a token, chooses `top_k` of them and weighs them. Always in float32 or wider.

    A softmax over the chosen experts alone (gpt-oss, Granite) is gate="softmax" with `normalise`: renormalising
    what a softmax over all gave is the same number.

    Loads are kept even by any of three means, all off by default. `bias_update_rate` adds to each score a bias that
    only the choice sees (Wang et al., arXiv 2408.15664): no gradient reaches it, `update_bias` moves it once an
    optimiser step by rate * sign(mean load - load). `balance_loss` weighs E * sum_e f_e P_e (Fedus et al., Switch
    Transformer, arXiv 2101.03961, equation 4), f_e being the fraction of all choices that fell on e and P_e the mean of
    e's score, scores of a token made to sum to one; it is taken over all tokens of one forward pass, not over each
    sequence, and is 1 at even loads; where processes share a batch, f_e is that of all of them. `z_loss` weighs the
    mean squared log-sum-exp of the logits (Zoph et al., ST-MoE, arXiv 2202.08906, equation 5), which keeps them small.

    Args:
        width: model width.
        experts: E, number of experts.
        top_k: experts that a token goes to.
        gate: "softmax" over all experts, or "sigmoid" of each (DeepSeek-V3).
        normalise: whether the chosen experts' scores are divided by their sum.
        bias: bias in the logits.
        route_scale: factor on the gates.
        groups: number of groups, consecutive and of equal size, that experts form.
        group_limit: groups that a token may choose from, those with the largest sums of their two best scores
            (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
        bias_update_rate: gamma; 0 keeps the biases that were loaded, None has none.
        balance_loss: coefficient of the balance loss.
        z_loss: coefficient of the z-loss.

    Raises:
        ValueError: for choices that cannot be made (top_k out of range, groups that do not divide the experts or leave
            fewer than top_k), an unknown gate, or a negative rate or coefficient.
    """

    def __init__(
        self,
        width: int,
        *,
        experts: int,
        top_k: int,
        gate: str,
        normalise: bool,
        bias: bool = False,
        route_scale: float = 1.0,
        groups: int = 1,
        group_limit: int = 1,
        bias_update_rate: float | None = None,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k {top_k} must lie between 1 and the {experts} experts")
        if gate not in ("softmax", "sigmoid"):
            raise ValueError(f"gate {gate!r} is not known: choose 'softmax' or 'sigmoid'")
        if groups < 1 or experts % groups or (groups > 1 and experts // groups < 2):
            raise ValueError(f"{experts} experts do not form {groups} equal groups of two or more: change groups")
        if not 1 <= group_limit <= groups or group_limit * (experts // groups) < top_k:
            raise ValueError(
                f"group_limit {group_limit} must lie between 1 and the {groups} groups, and so many groups of "
                f"{experts // groups} experts must hold top_k {top_k}"
            )
        for name, value in (("bias_update_rate", bias_update_rate), ("balance_loss", balance_loss), ("z_loss", z_loss)):
            if value is not None and value < 0:
                raise ValueError(f"{name} {value} must not be negative")
        self.experts, self.top_k, self.gate, self.normalise = experts, top_k, gate, normalise
        self.route_scale, self.groups, self.group_limit = route_scale, groups, group_limit
        self.bias_update_rate, self.balance_loss, self.z_loss = bias_update_rate, balance_loss, z_loss
        self.linear = nn.Linear(width, experts, bias=bias)
        self.choice_bias: Tensor | None
        self.register_buffer("choice_bias", None if bias_update_rate is None else torch.zeros(experts))
        self.load_E: Tensor | None = None  # choices since the last update; no buffer, for a step starts without any
        self.fraction_E: Tensor | None = None  # mean routing distribution of the last training forward
        self.losses: dict[str, Tensor] = {}

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gates [N, K] in float32 or wider, chosen experts [N, K] and loads [E], int64, of tokens x [N, D].

        In training it also sets `losses` (name -> scalar, coefficient included) and adds to the loads of the step.
        """
        dtype = torch.promote_types(x_ND.dtype, torch.float32)
        with torch.autocast("cpu" if x_ND.is_meta else x_ND.device.type, enabled=False):
            weight, bias = self.linear.weight.to(dtype), self.linear.bias
            logits_NE = F.linear(x_ND.to(dtype), weight, None if bias is None else bias.to(dtype))
            scores_NE = logits_NE.softmax(-1) if self.gate == "softmax" else logits_NE.sigmoid()
            chosen_NK = self._choose(scores_NE.detach())
            gates_NK = scores_NE.gather(-1, chosen_NK)
            if self.normalise:
                gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
            flat = chosen_NK.flatten()
            load_E = flat.new_zeros(self.experts).scatter_add_(0, flat, torch.ones_like(flat))
            self.losses = self._observe(logits_NE, scores_NE, load_E) if self.training else {}
        return gates_NK * self.route_scale, chosen_NK, load_E

    def _choose(self, scores_NE: Tensor) -> Tensor:
        if self.choice_bias is not None:
            scores_NE = scores_NE + self.choice_bias
        if self.group_limit < self.groups:
            grouped = scores_NE.unflatten(-1, (self.groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.group_limit, dim=-1).indices
            barred = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
            scores_NE = grouped.masked_fill(barred[..., None], -torch.inf).flatten(-2)
        return scores_NE.topk(self.top_k, dim=-1).indices

    def _observe(self, logits_NE: Tensor, scores_NE: Tensor, load_E: Tensor) -> dict[str, Tensor]:
        if self.choice_bias is not None:
            self.load_E = load_E if self.load_E is None else self.load_E + load_E
        fraction_E = (scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)).mean(0)
        self.fraction_E = fraction_E.detach()
        losses = {}
        if self.balance_loss:
            load_E = over_processes(load_E)
            losses["balance"] = self.balance_loss * self.experts * (load_E / load_E.sum() * fraction_E).sum()
        if self.z_loss:
            losses["router_z"] = self.z_loss * logits_NE.logsumexp(-1).square().mean()
        return losses

    @torch.no_grad()
    def update_bias(self) -> None:
        """Move the choice biases by the loads of the forward passes since the last update, summed over processes; those
        of a frozen router stay."""
        load_E, self.load_E = self.load_E, None
        frozen = not self.linear.weight.requires_grad
        if load_E is None or self.choice_bias is None or self.bias_update_rate is None or frozen:
            return
        # A pass that is run again to save memory has counted twice, all experts alike, which leaves the signs.
        load_E = over_processes(load_E).to(self.choice_bias.dtype)
        self.choice_bias += self.bias_update_rate * torch.sign(load_E.mean() - load_E)


def over_processes(load_E: Tensor) -> Tensor:
    """Return loads summed over the processes that share a batch."""
    if not (dist.is_available() and dist.is_initialized()):
        return load_E
    total_E = load_E.clone()
    dist.all_reduce(total_E)
    return total_E
