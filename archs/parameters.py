"""The roles of a model's parameters, which initialisation, optimisers and adapters go by."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from torch import nn

from archs.channels.experts import ExpertLinear
from archs.channels.router import Router
from archs.low_rank import LowRank

Linear = nn.Linear | ExpertLinear


class Role(Enum):
    """MATRIX: the weight of a linear layer inside the blocks, whose sums run over its fan-in. HEAD: that of the head.
    EMBEDDING: one vector per token id, position or time. VECTOR: all else (norms, biases, taps, decay rates)."""

    MATRIX = "matrix"
    HEAD = "head"
    EMBEDDING = "embedding"
    VECTOR = "vector"


@dataclass(frozen=True, eq=False)
class RoleParameter:
    """fan_in: how many products each output of a MATRIX or HEAD sums, 1 for the others."""

    name: str
    parameter: nn.Parameter
    role: Role
    fan_in: int


def linear_layers(module: nn.Module) -> Iterator[Linear]:
    """Every linear layer inside a module, those of experts included, in the order of registration."""
    return (layer for layer in module.modules() if isinstance(layer, Linear))


def block_layers(model: nn.Module) -> dict[str, Linear]:
    """The linear layers in the blocks of a model, those that look ahead included, by name, but for routers'."""
    routers = {id(m.linear) for m in model.modules() if isinstance(m, Router)}
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear) and name.startswith(("blocks.", "ahead.")) and id(layer) not in routers
    }


def products(layer: Linear) -> int:
    """Multiply-adds of one token in the weight of a linear layer, in those of the top_k where there are experts."""
    if isinstance(layer, ExpertLinear):
        return layer.top_k * layer.in_features * layer.out_features
    return layer.in_features * layer.out_features


def adapter_products(module: nn.Module) -> int:
    """Multiply-adds of one token in the adapters inside a module."""
    adapters = (a for layer in module.modules() if isinstance(layer, LowRank) for a in (layer.lora_A, layer.lora_B))
    return sum(map(products, adapters))
