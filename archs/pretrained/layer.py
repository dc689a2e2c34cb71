"""What reading a layer of a public model takes: its tensors by name, and its config."""

from collections.abc import Callable

from torch import Tensor, nn

Weights = dict[str, Tensor]
Part = tuple[Callable[[int], nn.Module], Weights]  # what builds a mixer or channel, and its weights


def under(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names begin so, without the beginning."""
    return {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}


def norm_eps(config) -> float:
    """What the norms of a model add to the mean square."""
    names = ("rms_norm_eps", "layer_norm_epsilon", "norm_eps")
    return next(getattr(config, name) for name in names if hasattr(config, name))
