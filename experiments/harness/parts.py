"""Parts of a run, built from the nodes of its config. Only what is built is imported, so that a run that is found
again need not wait for torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.data.token_data import TokenData

if TYPE_CHECKING:
    from archs.adapters import LoRA
    from archs.language_model import LanguageModel
    from objectives.contracts import Objective
    from objectives.post_training.tuning import Trained


def build(node: DictConfig, **arguments: Any) -> Any:
    """Return what a node of the config builds.

    Raises:
        ValueError: that of the part, without Hydra's words around it.
    """
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


def open_data(config: DictConfig) -> TokenData:
    """Return the data of a run."""
    return build(config.data.tokens)


def build_objective(
    config: DictConfig, data: TokenData, trained: Mapping[str, Trained] = MappingProxyType({})
) -> Objective:
    """Return the objective for the vocabulary of the data. trained: the models that it asks for, by name.

    Raises:
        ValueError: for rewards that neither the data nor a model gives.
    """
    node = config.objective
    if "base" not in node:
        return build(node.build, vocab_size=data.vocab_size, eot=data.eot)
    given: dict[str, Any] = dict(trained)
    if "reward" in node.get("models", {}):
        from experiments.harness.tasks import reward_of

        given["reward"] = reward_of(data, trained.get("reward"))
    # Not as settings: Hydra would take a model apart.
    return build(node.build, _partial_=True)(base=build_base(node, data), eot=data.eot, **given)


def build_base(node: DictConfig, data: TokenData) -> Objective:
    """Return the objective that says how a model of this node reads and writes, below all that tunes it."""
    while "base" in node:
        node = node.base
    return build(node.build, vocab_size=data.vocab_size, eot=data.eot)


def build_adapter(config: DictConfig) -> LoRA | None:
    """Return the adapters that are trained in the model's place, None where there are none."""
    return build(config.adapter) if config.get("adapter") else None


def build_model(config: DictConfig, objective: Objective) -> LanguageModel:
    """Return the backbone with what the objective needs of it: its vocabulary, and parts that it asks for."""
    model = build(config.arch.model, vocab_size=objective.model_vocab_size, **objective.model_options)
    return build(config.low_precision).convert(model) if config.get("low_precision") else model
