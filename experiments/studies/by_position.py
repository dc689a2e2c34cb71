"""Reports of what a trained model makes of its context: bits per byte by the position in a window, and recall by the
distance to what is recalled.

Shape letters: B windows, T tokens, K ranges of positions or distances, V token ids, N tokens that count.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Generator, Tensor

from experiments.harness.data_module import heldout_batches
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from objectives.contracts import Batch
from objectives.likelihood import nats_at

TOKENS_AT_ONCE = 1 << 14


def at_length(finished: FinishedRun, length: int) -> FinishedRun:
    """Return the same model with data cut into windows of another length, whatever it was trained with.

    Raises:
        ValueError: for a length below 1, and where the data has no windows of that length.
    """
    if length < 1:
        raise ValueError(f"lengths={length} must be at least 1 token")
    config = finished.config.copy()
    _set_lengths(config.data, length)
    return replace(finished, config=config, data=open_data(config))


@torch.no_grad()
def bits_by_position(finished: FinishedRun) -> pd.DataFrame:
    """Held-out bits per byte by the position in a window, of all windows of `data.sequence_length`: one row for the
    positions 0, 1, 2 to 3, 4 to 7 and so on, with `first`, `last`, `bits_per_byte`, its standard error over windows and
    the number of `tokens` that were scored there.

    A token counts as the bytes of one in the mean, so that the mean over all tokens is the run's bits per byte.

    Raises:
        ValueError: where the objective does not score a window as the sum of its tokens, each from those before it.
    """
    sums, counts = [], []
    for batch in _windows(finished):
        logits_NV = finished.objective.logits(finished.model, batch)
        nats_BT = nats_at(logits_NV, batch.tokens_BT, batch.counted_BT).double()
        if not sums:
            likelihood = finished.objective.evaluate(finished.model, batch, Generator().manual_seed(0))
            if not likelihood.exact or not torch.allclose(likelihood.nats_B, nats_BT.sum(1), rtol=1e-4):
                name = type(finished.objective).__name__
                raise ValueError(f"{name} gives no bits by position: it takes a run whose likelihood is a chain rule")
        range_BT = _powers(torch.arange(batch.tokens_BT.shape[1])).expand_as(nats_BT)
        sums.append(_by_range(nats_BT, range_BT))
        counts.append(_by_range(batch.counted_BT.double(), range_BT))
    table = _ratios(torch.cat(sums), torch.cat(counts), "tokens")
    to_bits = table.tokens.sum() / math.log(2) / finished.data.heldout_bytes
    bits = {"bits_per_byte": table.ratio * to_bits, "bits_per_byte_se": table.se * to_bits}
    return table.assign(**bits)[["first", "last", *bits, "tokens"]]


@torch.no_grad()
def recall_by_distance(finished: FinishedRun) -> pd.DataFrame:
    """The fraction of held-out answers whose likeliest token is right, by how many tokens ago the token in front of the
    answer, its key, stood there before: one row for the distances 1, 2 to 3, 4 to 7 and so on, with `first`, `last`,
    `accuracy`, its standard error over windows and the number of `answers`.

    Raises:
        ValueError: for data that marks no answers, and for an answer whose key is not shown before it.
    """
    data = finished.data
    if data.heldout_answers is None:
        raise ValueError(f"{data.name} marks no answers: choose data that does, such as data=associative_recall")
    sums, counts = [], []
    for batch in _windows(finished):
        answers_BT, tokens_BT = batch.counted_BT, batch.tokens_BT
        right_N = finished.objective.logits(finished.model, batch).argmax(-1) == tokens_BT[answers_BT]
        right_BT = torch.zeros_like(answers_BT).masked_scatter(answers_BT, right_N)
        range_BT = _powers(distances(tokens_BT, answers_BT, data.name))
        sums.append(_by_range((right_BT & answers_BT).double(), range_BT))
        counts.append(_by_range(answers_BT.double(), range_BT))
    table = _ratios(torch.cat(sums), torch.cat(counts), "answers")
    return table.rename(columns={"ratio": "accuracy", "se": "accuracy_se"})


def distances(tokens_BT: Tensor, answers_BT: Tensor, name: str) -> Tensor:
    """Tokens between the key in front of each answer and where it stood last before, int64 [B, T]; 0 where there is no
    answer.

    Raises:
        ValueError: when a key did not stand before; names the data.
    """
    distance_BT = torch.zeros_like(tokens_BT)
    for b, t in answers_BT.nonzero().tolist():
        before = (tokens_BT[b, : max(t - 1, 0)] == tokens_BT[b, max(t - 1, 0)]).nonzero()
        if not len(before):
            raise ValueError(f"{name} has an answer at position {t} whose key is not shown before: it is no recall")
        distance_BT[b, t] = t - 1 - int(before[-1])
    return distance_BT


def _windows(finished: FinishedRun) -> Iterator[Batch]:
    """All held-out tokens once, as evaluation cuts them, on the model's device."""
    length, packed = finished.config.data.sequence_length, finished.config.data.packed
    device = next(finished.model.parameters()).device
    for batch in heldout_batches(finished.data, length, packed, TOKENS_AT_ONCE // length):
        yield batch.to(device)


def _powers(number: Tensor) -> Tensor:
    """The range that a number from 0 on lies in: 0, 1, 2 to 3, 4 to 7 and so on, counted from 0."""
    return torch.frexp(number.double()).exponent.long()


def _by_range(values_BT: Tensor, range_BT: Tensor) -> Tensor:
    """Sums [B, 63] of the values in each range."""
    return torch.zeros(len(values_BT), 63, dtype=torch.float64).scatter_add_(1, range_BT.cpu(), values_BT.cpu())


def _ratios(sums_BK: Tensor, counts_BK: Tensor, name: str) -> pd.DataFrame:
    """One row per range that has counts: their number, the ratio of both sums, and its standard error over windows."""
    B, count_K = len(sums_BK), counts_BK.sum(0)
    ratio_K = sums_BK.sum(0) / count_K
    spread_K = (sums_BK - ratio_K * counts_BK).square().sum(0) * (B / (B - 1) if B > 1 else math.nan)
    table = pd.DataFrame({"ratio": ratio_K, "se": spread_K.sqrt() / count_K, name: count_K.long()})
    first = [int(2 ** (k - 1)) for k in range(len(table))]
    last = [max(2 * n - 1, 0) for n in first]
    table = pd.concat([pd.DataFrame({"first": first, "last": last}), table], axis=1)
    return table[table[name] > 0].reset_index(drop=True)


def _set_lengths(node: DictConfig, length: int) -> None:
    """Set every sequence_length in the node of the data, all of which follow the first."""
    for name in node:
        if name == "sequence_length":
            node[name] = length
        elif isinstance(node[name], DictConfig):
            _set_lengths(node[name], length)
