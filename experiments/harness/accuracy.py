"""Accuracy: how often the likeliest token is right, in windows that a model is trained on and in others.

Shape letters: N tokens that count.
"""

from dataclasses import replace

import numpy as np
import torch

from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.harness.data_module import heldout_batches
from experiments.harness.tasks import estimate
from objectives.contracts import Objective

AT_ONCE = 1024  # windows


@torch.no_grad()
def accuracy(
    model: LanguageModel, objective: Objective, data: TokenData, sequence_length: int, packed: bool, windows: int
) -> dict[str, dict[str, list[float]]]:
    """The fraction of the tokens that count, which are the answers where these are marked, whose likeliest token is
    right: {"train": {"accuracy": ...}, "heldout": ...}, each over the first windows of its part and with its 95 %
    interval as [value, low, high]."""
    end, found = windows * sequence_length, {}
    parts = {"train": (data.train, data.train_answers), "heldout": (data.heldout, data.heldout_answers)}
    device = model.embedding.weight.device
    for name, (tokens, answers) in parts.items():
        part = replace(data, heldout=tokens[:end], heldout_answers=None if answers is None else answers[:end])
        batches = (batch.to(device) for batch in heldout_batches(part, sequence_length, packed, AT_ONCE))
        right_N = [objective.logits(model, batch).argmax(-1) == batch.tokens_BT[batch.counted_BT] for batch in batches]
        found[name] = {"accuracy": estimate(torch.cat(right_N).cpu().numpy().astype(np.float64))}
    return found
