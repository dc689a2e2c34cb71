"""Low-rank adapters (LoRA): a small trained product beside each frozen matrix.

    LoRA(rank=8, alpha=32).adapt(model)   # the base stays as it is, the adapters learn
    merge(model)                          # a plain model again, of the same logits

Shape letters: T tokens, P pairs of a token and an expert, sorted by expert, E experts, D width of a layer's input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from archs.channels.experts import ExpertLinear
from archs.language_model import LanguageModel
from archs.low_rank import LowRank
from archs.parameters import Linear, block_layers, linear_layers, products
from archs.visibility import Visibility

SCALES = {"standard": 1.0, "rank_stabilised": 0.5}  # the power of the rank that alpha is divided by
LAYERS = {"all": "", "mixers": ".mixer.", "channels": ".channel."}  # what stands in their names


class LowRankLinear(LowRank, nn.Linear):
    """A linear layer and its adapter."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float):
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        _begin(self, layer, rank, scale)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.scale * self.lora_B(self.lora_A(input))


class LowRankExperts(LowRank, ExpertLinear):
    """The linear layers of experts, each with an adapter of its own."""

    def __init__(self, layer: ExpertLinear, rank: int, scale: float):
        with torch.device("meta"):
            super().__init__(
                len(layer.weight), layer.in_features, layer.out_features, layer.bias is not None, layer.top_k
            )
        _begin(self, layer, rank, scale)

    def forward(self, x_PD: Tensor, counts_E: Tensor) -> Tensor:
        low = self.lora_B(self.lora_A(x_PD, counts_E), counts_E)
        return super().forward(x_PD, counts_E) + self.scale * low


Adapted = LowRankLinear | LowRankExperts


def _begin(adapted: Adapted, layer: Linear, rank: int, scale: float) -> None:
    """Take over the weights of a layer and put an adapter that does nothing yet beside them."""
    adapted.weight, adapted.bias, adapted.scale = layer.weight, layer.bias, scale
    with layer.weight.device:
        adapted.lora_A = _alike(layer, layer.in_features, rank, bias=False).to(layer.weight.dtype)
        adapted.lora_B = _alike(layer, rank, layer.out_features, bias=False).to(layer.weight.dtype)
    bound = layer.in_features**-0.5
    nn.init.uniform_(adapted.lora_A.weight, -bound, bound)
    nn.init.zeros_(adapted.lora_B.weight)
    adapted.train(layer.training)


def _alike(layer: Linear, in_features: int, out_features: int, bias: bool) -> Linear:
    """A layer of other sizes, one per expert where the first is."""
    if isinstance(layer, ExpertLinear):
        return ExpertLinear(len(layer.weight), in_features, out_features, bias, layer.top_k)
    return nn.Linear(in_features, out_features, bias)


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation (Hu et al., arXiv 2106.09685): y = W x + s B (A x), where only A and B are trained.

    A [rank, in] begins uniform within 1 / sqrt(in), as peft has it, and B [out, rank] at zero. Every linear layer in
    the blocks has its adapter, each expert one of its own, since adapters on attention alone fall behind (Schulman et
    al., "LoRA Without Regret", 2025). Frozen and without one are routers and their choice biases (tuning of experts
    leaves them as they are: ESFT, Wang et al., arXiv 2407.01906), the embedding, the head, and all that is no matrix.

    Args:
        rank: of the product B A.
        alpha: s is alpha / rank, with which the best learning rate hardly depends on the rank.
        scale: "standard" for that, or "rank_stabilised" for alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732).
        layers: "all", or those of "mixers" or "channels" alone.

    Raises:
        ValueError: for a rank below 1, an alpha that is not above 0, or an unknown scale or set of layers.
    """

    rank: int
    alpha: float
    scale: str = "standard"
    layers: str = "all"

    def __post_init__(self):
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"adapter.rank={self.rank} must be a whole number of at least 1")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha={self.alpha} must be above 0")
        for name, value, known in (("scale", self.scale, SCALES), ("layers", self.layers, LAYERS)):
            if value not in known:
                raise ValueError(f"adapter.{name}={value!r} must be one of {', '.join(known)}")

    def adapt(self, model: LanguageModel) -> LanguageModel:
        """Freeze a model and give it adapters, in place; what it computes is the same at first. The names of its own
        weights stay as they are; those of an adapter end in lora_A.weight and lora_B.weight.

        Raises:
            ValueError: for a model that has adapters, or none of these layers, or has them in low precision.
        """
        if any(isinstance(module, LowRank) for module in model.modules()):
            raise ValueError("the model has adapters already: merge them first, or adapt the model that they are of")
        if not (chosen := self.chosen(model)):
            raise ValueError(f"adapter.layers={self.layers!r}: the model has no such layer; choose 'all'")
        if any(type(layer) not in (nn.Linear, ExpertLinear) for layer in chosen.values()):
            raise ValueError("layers of low precision take no adapters: set adapter=none or low_precision=none")
        model.requires_grad_(False)
        factor = self.alpha / self.rank ** SCALES[self.scale]
        for name, layer in chosen.items():
            experts = isinstance(layer, ExpertLinear)
            adapted = LowRankExperts(layer, self.rank, factor) if experts else LowRankLinear(layer, self.rank, factor)
            model.set_submodule(name, adapted)
        return model

    def chosen(self, model: LanguageModel) -> dict[str, Linear]:
        """The layers of a model, by name, that have or are to have adapters."""
        return {
            name: layer
            for name, layer in block_layers(model).items()
            if not name.endswith((".lora_A", ".lora_B")) and LAYERS[self.layers] in name
        }


def adapted_layers(model: LanguageModel) -> dict[str, Adapted]:
    """The layers of a model that have adapters, by name.

    Raises:
        ValueError: for a model without adapters.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Adapted)}
    if not layers:
        raise ValueError("the model has no adapters: adapt it first")
    return layers


@torch.no_grad()
def merge(model: LanguageModel) -> LanguageModel:
    """Add the adapters to the weights that they are of, in place: a plain model, all of which is trained again.

    Raises:
        ValueError: for a model without adapters.
    """
    for name, layer in adapted_layers(model).items():
        with torch.device("meta"):
            plain = _alike(layer, layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(layer.whole_weight()), layer.bias
        model.set_submodule(name, plain.train(layer.training))
    return model.requires_grad_(True)


def training_flops(model: LanguageModel, forward: Callable[[LanguageModel], float]) -> float:
    """FLOPs of the forward and backward passes of training, of a model that is frozen in part or not at all.

    Three times the forward pass, in which adapters count, less what is not computed: the gradients of frozen weights of
    linear layers (2 in out per token; of experts those of the top_k), of the head and of the time's map. All else is
    charged as ever, also what autograd leaves out besides: gradients of frozen taps, and gradients of what the first
    layers read, whose sources are frozen.

    Args:
        forward: the forward FLOPs of a model, as its `flops`, `head_flops` and `ahead_flops` give them. It is asked
            twice: of the model, and of its frozen weights alone.
    """
    return 3 * forward(model) - forward(cast(LanguageModel, FrozenWeights(model)))


@dataclass(frozen=True)
class FrozenWeights:
    """Counts as a model does, but of its products only those with frozen weights: as many FLOPs as the gradients of
    these weights would cost."""

    model: LanguageModel

    def flops(self, T: int, visibility: Visibility, predicted: float = 1.0) -> float:
        parts = [*self.model.blocks] if self.model.time is None else [*self.model.blocks, self.model.time]
        return 2 * T * sum(map(_frozen_products, parts)) + T * predicted * self.head_flops

    @property
    def head_flops(self) -> int:
        return 2 * _frozen_products(self.model.head)

    def ahead_flops(self, T: int) -> int:
        return sum(
            (T - k) * (2 * _frozen_products(ahead) + self.head_flops)
            for k, ahead in enumerate(self.model.ahead, 1)
            if k < T
        )


def _frozen_products(module: nn.Module) -> int:
    return sum(products(layer) for layer in linear_layers(module) if not layer.weight.requires_grad)
