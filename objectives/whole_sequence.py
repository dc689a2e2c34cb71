"""Passes of a model over whole noised sequences, in training and in sampling alike.

Shape letters: B sequences, T tokens, D model width, V token ids of the model, N positions picked out of a batch.
"""

from torch import Tensor

from archs.language_model import LanguageModel
from archs.visibility import BIDIRECTIONAL, Visibility
from objectives.contracts import Model, Samples


def hidden_of(model: Model, noised_BT: Tensor, visibility: Visibility, noised_B: Tensor | None) -> Tensor:
    """Return the hidden vectors [B, T, D]. noised_B: the fraction of noise that a timed model is told; None for a model
    that is not timed."""
    time = {} if noised_B is None else {"time": noised_B.to(noised_BT.device)[:, None]}
    return model.hidden(noised_BT, visibility, **time)


def logits_at(
    model: Model, noised_BT: Tensor, where_BT: Tensor, visibility: Visibility, noised_B: Tensor | None
) -> Tensor:
    """Return the logits [N, V] at the N positions where where_BT is true; noised_B as in `hidden_of`."""
    return model.logits(hidden_of(model, noised_BT, visibility, noised_B)[where_BT])


def sampling_flops(model: LanguageModel, samples: Samples) -> float:
    """Return the FLOPs per sequence of passes over the whole of each, and of the head where it was read."""
    T = samples.tokens_BT.shape[1]
    return samples.evaluations * model.flops(T, BIDIRECTIONAL, 0.0) + samples.predictions * model.head_flops
