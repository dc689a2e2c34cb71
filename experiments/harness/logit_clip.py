"""Clipping of the logits of attention through the weights that make them (`+trainer.clip_logits=...`).

Shape letters: H query heads.
"""

import math

import torch
from torch.distributed.tensor.experimental import implicit_replication

from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from archs.mixers.latent_attention import LatentAttention
from archs.mixers.sparse_attention import SparseAttention
from experiments.harness import processes


class LogitClip:
    """Scales the logits of each head whose largest one in a step exceeded `most`, by most over that: QK-Clip, as in
    MuonClip (Kimi K2, arXiv 2507.20534, section 2.1, where `most` is 100), after any optimiser.

    The largest logit is that of the forward passes of the step, before its update, over all processes. To find it takes
    the scores of attention once more, without sums and gradients; the run's FLOPs have them in. The state of the
    optimiser is left as it is.

    Attributes:
        clipped: how often a head was scaled.
        largest: the largest logit of the last step, of all heads.

    Raises:
        ValueError: as `watched` does.
    """

    def __init__(self, model: LanguageModel, most: float):
        self.attentions, self.most, self.clipped, self.largest = watched(model), most, 0, math.nan

    def after_step(self) -> None:
        """Scale the heads that exceeded, and begin to look anew."""
        found = processes.largest(torch.cat([attention.watch_logits() for attention in self.attentions]))
        factors = torch.where(found > self.most, self.most / found, 1.0)
        with implicit_replication():  # every process has all factors, and of weights that are cut its part
            for attention, factor_H in zip(
                self.attentions, factors.split([a.heads for a in self.attentions]), strict=True
            ):
                attention.scale_logits(factor_H)
        self.clipped += int((factors < 1).sum())
        self.largest = float(found.max())


def watched(model: LanguageModel) -> list[Attention]:
    """Return the attention of a model, block by block, which looks for its largest logits from now on.

    Raises:
        ValueError: for a model without attention, with QK-norm, or with attention whose logits do not follow the
            weights of each head's queries and keys by themselves.
    """
    other = [type(part).__name__ for part in model.modules() if isinstance(part, LatentAttention | SparseAttention)]
    if other:
        raise ValueError(f"it has {other[0]}, whose heads are not clipped: set trainer.clip_logits=null")
    found = [part for part in model.modules() if isinstance(part, Attention)]
    if not found:
        raise ValueError("it has no attention, and so no logits of it: set trainer.clip_logits=null")
    for attention in found:
        attention.watch_logits()
    return found
