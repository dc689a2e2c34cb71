"""Batches for Lightning: every one a function of the seed and the step alone, so a resumed run reads on exactly.

Shape letters: B sequences, T tokens, N windows.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.data.token_data import TokenData
from experiments.data.windows import TrainWindows, document_starts, heldout_windows
from experiments.harness import processes
from experiments.harness.budget import Allocation
from objectives.contracts import Batch


class DataModule(L.LightningDataModule):
    """Training windows in the seed's order, and all held-out tokens in one order for every run.

    Args:
        data: the tokens; where answers are marked, only they count.
        packed: whether the documents of a window are kept apart.
        evaluation_batch: held-out windows at a time.
    """

    def __init__(self, data: TokenData, allocation: Allocation, seed: int, packed: bool, evaluation_batch: int):
        super().__init__()
        self.data, self.allocation, self.packed = data, allocation, packed
        # Both are cut and ordered by length and seed alone, so their windows go together.
        self.windows = TrainWindows(data.train, allocation.sequence_length, seed, data.group)
        marks = data.train_answers
        self.answers = None if marks is None else TrainWindows(marks, allocation.sequence_length, seed, data.group)
        self.evaluation_batch = evaluation_batch

    def train_dataloader(self) -> "TrainBatches":
        return TrainBatches(self, 0 if self.trainer is None else self.trainer.global_step)

    def val_dataloader(self) -> DataLoader:
        """All held-out tokens once (see `heldout_batches`), of which each process takes every n-th batch; some take one
        more that is another's, since all are to take as many."""
        length = self.allocation.sequence_length
        batches = heldout_batches(self.data, length, self.packed, self.evaluation_batch)
        self.heldout_batches, n = len(batches), processes.number()
        mine: Any = [batches[i % len(batches)] for i in range(processes.rank(), -(-len(batches) // n) * n, n)]
        return DataLoader(mine, batch_size=None)


def heldout_batches(data: TokenData, sequence_length: int, packed: bool, at_once: int) -> list[Batch]:
    """Return all held-out tokens once: full windows, at most `at_once` together or one group of them, and then the
    shorter rest by itself."""
    size = max(1, at_once // data.group) * data.group

    def in_order(stream: np.ndarray | None) -> list[Tensor]:
        if stream is None:
            return []
        full_NT, tail_1T = heldout_windows(stream, sequence_length)
        return [*(full_NT.split(size) if len(full_NT) else []), *([] if tail_1T is None else [tail_1T])]

    tokens, answers = in_order(data.heldout), in_order(data.heldout_answers)
    pairs = zip(tokens, answers or [None] * len(tokens), strict=True)
    return [batch_of(data, packed, tokens_BT, answers_BT) for tokens_BT, answers_BT in pairs]


def batch_of(data: TokenData, packed: bool, tokens_BT: Tensor, answers_BT: Tensor | None) -> Batch:
    """Return windows with their weights and, where they are packed, the starts of their documents."""
    batch = Batch.of(tokens_BT)
    if answers_BT is not None:
        batch = replace(batch, weights_BT=answers_BT.float())
    return replace(batch, starts_BT=document_starts(tokens_BT, data.eot)) if packed else batch


class TrainBatches:
    """Batches of the steps from `start` on. Its length is that of the whole run, which is what Lightning counts
    against when it resumes in the middle."""

    def __init__(self, module: DataModule, start: int):
        self.module, self.start = module, start

    def __len__(self) -> int:
        return self.module.allocation.steps

    def __iter__(self) -> Iterator[Batch]:
        allocation = self.module.allocation
        for step in range(self.start, allocation.steps):
            first, end = (allocation.first_sequence(s) for s in (step, step + 1))
            answers = self.module.answers
            answers_BT = None if answers is None else answers.batch(first, end - first)
            tokens_BT = self.module.windows.batch(first, end - first)
            yield batch_of(self.module.data, self.module.packed, tokens_BT, answers_BT)
