"""A penalty on the length of wiring, which is to make networks modular.

Shape letters: O units that a layer writes, I units that it reads.
"""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from archs.channels.mlp import MLP
from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from objectives.contracts import Batch, Objective
from objectives.post_training.tuning import Tuning

GAP = 0.1  # between a layer and the next, as in the published code


class Wiring(Tuning):
    """The base's loss and strength * sum of |w_ij| d_ij over the weights of all linear layers of the blocks (Liu, Gan
    and Tegmark, arXiv 2305.08746, section 2; without swapping neurons).

    The units that a layer reads stand evenly on a line of length 1, those that it writes on another, GAP away; d_ij is
    the distance along the line and GAP. Units are those of the residual stream, which have the same places throughout,
    and what a part projects onto it: the hidden layer of an MLP, the outputs of heads. A unit has one place, whatever
    goes into it: gate and value, or query, key and value.

    The penalty is for training alone: what text is worth and how it is written is the base's. Its few additions and
    products per weight and step count no FLOPs, as those of AdamW.

    Args:
        base: the likelihood. eot: see `Tuning`.
        strength: at least 0, in nats.
        by_length: whether d_ij is the distance; if not, all wires of a layer have its mean length, so that of plain L1
            remains the same cost of weights that do not go by the place.

    Raises:
        ValueError: for a strength below 0.
    """

    def __init__(self, base: Objective, eot: int, strength: float = 1e-4, by_length: bool = True):
        super().__init__(base, eot)
        if not strength >= 0:
            raise ValueError(f"strength={strength} must be at least 0")
        self.strength, self.by_length, self.reads_weights = strength, by_length, True

    def check(self, model: LanguageModel, sequence_length: int) -> None:
        """As in `Objective`; and refuses a model whose units have no place."""
        super().check(model, sequence_length)
        for _ in wires(model):
            pass

    def loss(self, model: LanguageModel, batch: Batch, generator: Generator) -> Tensor:
        """As in `Objective`: that of the base and the penalty."""
        loss, cost = self.base.loss(model, batch, generator), self.cost(model)
        self.figures = self.base.telemetry() | {"wiring": cost.detach().item()}
        return loss + self.strength * cost * batch.share

    def cost(self, model: LanguageModel) -> Tensor:
        """The sum of |w_ij| d_ij, a scalar with gradients."""
        costs = []
        for layer, copies in wires(model):
            length_OI = lengths(layer, copies)
            costs.append((layer.weight.abs() * (length_OI if self.by_length else length_OI.mean())).sum())
        return torch.stack(costs).sum()


def wires(model: LanguageModel) -> Iterator[tuple[nn.Linear, int]]:
    """Yield the linear layers of the blocks, each with the number of its outputs that go into one unit.

    Raises:
        ValueError: for a part whose units it does not know.
    """
    for block in model.blocks:
        for part in (block.mixer, block.channel):
            if part is None:
                continue
            multi_head = isinstance(part, Attention) and part.kv_heads == part.heads
            if not multi_head and not isinstance(part, MLP):
                raise ValueError(
                    f"the wiring of {type(part).__name__} has no length: choose blocks of attention with as many "
                    "keys as queries and of a dense MLP, as arch=transformer has, or an objective without wiring"
                )
            (writing,) = (layer for layer in part.residual_projections() if isinstance(layer, nn.Linear))
            for layer in (layer for layer in part.modules() if isinstance(layer, nn.Linear)):
                yield layer, 1 if layer is writing else layer.out_features // writing.in_features


def lengths(layer: nn.Linear, copies: int) -> Tensor:
    """The lengths [O, I] of a layer's wires, of which so many go into each unit."""
    weight_OI = layer.weight
    from_I, to_O = (places(n, weight_OI) for n in (layer.in_features, layer.out_features // copies))
    return GAP + (to_O.repeat(copies)[:, None] - from_I).abs()


def places(units: int, like: Tensor) -> Tensor:
    """The places on a line of length 1 of so many units, evenly apart."""
    return (torch.arange(units, device=like.device, dtype=like.dtype) + 0.5) / units
