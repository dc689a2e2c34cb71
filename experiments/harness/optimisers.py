"""Optimisers, each with the rule by which its learning rate is transferred across widths and lengths of runs.

A rate is tuned at `base_width` and `base_tokens` and serves every width and length. Parameters are told apart by their
role (`archs.parameters`): the rule for a matrix is not that for a vector. Only matrices inside the blocks are decayed.

Over lengths the rate of all parameters goes with (base_tokens / D) ** length_exponent, D the tokens of the run: with
batches of one size the best rate of a short run is higher, by about D^-0.3 (Bjorck et al., arXiv 2409.19913). Where
batches grow with the run the two effects oppose each other, and 0 leaves the rate as it is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from archs.parameters import Role, RoleParameter

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # of a quintic that brings singular values near 1, from Muon's authors
STEPS = 5


class Optimiser(Protocol):
    """An optimiser as `optim=` builds it. learning_rate: the one that sweeps tune, for models of the base width and
    runs of the base tokens."""

    learning_rate: float

    def build(self, parameters: list[RoleParameter], width: int, tokens: int) -> torch.optim.Optimizer:
        """The optimiser of these parameters of a model of this width, for a run of so many tokens."""
        ...

    def flops(self, parameters: Iterable[RoleParameter]) -> float:
        """FLOPs of the matrix products of one step, which are charged to the run's budget."""
        ...


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Transfer: muP's rule for Adam (Yang et al., arXiv 2203.03466, table 8) in its simplest form. Matrices and the head,
    whose updates sum over the width, take learning_rate * base_width / width; embeddings and vectors take
    learning_rate. Together with the 1 / sqrt(fan-in) initialisation and a head that starts at zero this keeps the size
    of every update's effect independent of the width.

    Raises:
        ValueError: for a learning rate, base width or base length that is not above 0.
    """

    learning_rate: float
    base_width: int
    base_tokens: float
    length_exponent: float
    betas: tuple[float, float]
    weight_decay: float

    def __post_init__(self):
        _check(self)

    def build(self, parameters: list[RoleParameter], width: int, tokens: int) -> torch.optim.AdamW:
        rate = _over_length(self, tokens)
        transferred = rate * self.base_width / width
        matrices, head, rest = _by_role(parameters)
        groups = [
            {"params": matrices, "lr": transferred, "weight_decay": self.weight_decay},
            {"params": head, "lr": transferred, "weight_decay": 0.0},
            {"params": rest, "lr": rate, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], betas=tuple(self.betas), fused=True)

    def flops(self, parameters: Iterable[RoleParameter]) -> float:
        """None: its work is element by element."""
        return 0.0


@dataclass(frozen=True)
class Muon:
    """Muon on the matrices inside the blocks (Jordan et al., 2024), AdamW on all else.

    A matrix moves by its momentum with all singular values brought near one by five steps of Newton-Schulz, times 0.2
    sqrt(max(rows, columns)): entries then move as far as under AdamW, so one learning rate serves both (Moonlight, Liu
    et al., arXiv 2502.16982, section 2.2).

    Transfer: such an update has a spectral norm that grows with the square root of the width, and what keeps its effect
    independent of the width is a constant one (Yang et al., arXiv 2310.17813): matrices take learning_rate *
    sqrt(base_width / width). All else is transferred as in `AdamW`.

    Raises:
        ValueError: for a learning rate, base width or base length that is not above 0.
    """

    learning_rate: float
    base_width: int
    base_tokens: float
    length_exponent: float
    momentum: float
    betas: tuple[float, float]
    weight_decay: float

    def __post_init__(self):
        _check(self)

    def build(self, parameters: list[RoleParameter], width: int, tokens: int) -> "MuonWithAdamW":
        matrices, head, rest = _by_role(parameters)
        rate, ratio = _over_length(self, tokens), self.base_width / width
        groups = [
            {
                "params": matrices,
                "lr": rate * ratio**0.5,
                "weight_decay": self.weight_decay,
                "muon": True,
            },
            {"params": head, "lr": rate * ratio, "weight_decay": 0.0, "muon": False},
            {"params": rest, "lr": rate, "weight_decay": 0.0, "muon": False},
        ]
        return MuonWithAdamW([g for g in groups if g["params"]], self.momentum, tuple(self.betas))

    def flops(self, parameters: Iterable[RoleParameter]) -> float:
        """Those of Newton-Schulz: for m x n with m <= n, in each step X X^T, its square and one product with X."""
        total = 0.0
        for parameter in _by_role(parameters)[0]:
            small, large = sorted(parameter.shape[-2:])
            matrices = parameter.numel() // (small * large)
            total += matrices * STEPS * (2 * 2 * small**2 * large + 2 * small**3)
        return total


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for groups that say so, AdamW for the others, as one optimiser, which is what a schedule and a checkpoint
    want. `torch.optim.Muon` takes only two-dimensional matrices and no others beside them; the experts' are stacked."""

    def __init__(self, groups: list[dict], momentum: float, betas: tuple[float, float]):
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyrefly: ignore[bad-override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            step = self._muon if group["muon"] else self._adamw
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    step(parameter, parameter.grad, group, self.state[parameter])
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict, state: dict) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(state["momentum"], group["momentum"])  # Nesterov's
        scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
        parameter.add_(orthogonalised(update).to(parameter.dtype), alpha=-group["lr"] * scale)

    def _adamw(self, parameter: Tensor, gradient: Tensor, group: dict, state: dict) -> None:
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], root, value=-group["lr"] / (1 - beta1 ** state["step"]))


def orthogonalised(update: Tensor) -> Tensor:
    """U V^T of update = U S V^T, nearly: singular values come to lie between about 0.7 and 1.2. [..., m, n], in
    bfloat16 on a GPU and in float32 elsewhere (quintic Newton-Schulz, Jordan et al., 2024). One that is cut between
    processes is gathered, and each of them computes all of it and keeps its part."""
    if isinstance(update, DTensor):
        whole = orthogonalised(update.full_tensor())
        return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
    a, b, c = NEWTON_SCHULZ
    x = update.to(torch.bfloat16 if update.is_cuda else torch.float32)
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _by_role(parameters: Iterable[RoleParameter]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Matrices, the head and all else."""
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    for p in parameters:
        parts[{Role.MATRIX: 0, Role.HEAD: 1}.get(p.role, 2)].append(p.parameter)
    return parts


def _over_length(optimiser: AdamW | Muon, tokens: int) -> float:
    """The learning rate at the base width for a run of so many tokens."""
    return optimiser.learning_rate * (optimiser.base_tokens / tokens) ** optimiser.length_exponent


def _check(optimiser: AdamW | Muon) -> None:
    for name in ("learning_rate", "base_width", "base_tokens"):
        if not (value := getattr(optimiser, name)) > 0:
            raise ValueError(f"optim.{name}={value} must be above 0")
