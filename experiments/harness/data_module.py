"""Batches for Lightning: every one a function of the seed and the step alone, so a resumed run reads on exactly."""

from collections.abc import Iterator

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.data.token_data import TokenData
from experiments.data.windows import Batch, TrainWindows, heldout_windows
from experiments.harness.budget import Allocation


class TrainBatches:
    """Batches of the steps from `start` on. Its length is that of the whole run, which is what Lightning counts
    against when it resumes in the middle."""

    def __init__(self, windows: TrainWindows, answers: TrainWindows | None, allocation: Allocation, start: int):
        self.windows, self.answers, self.allocation, self.start = windows, answers, allocation, start

    def __len__(self) -> int:
        return self.allocation.steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start, self.allocation.steps):
            first, end = (self.allocation.first_sequence(s) for s in (step, step + 1))
            answers_BT = None if self.answers is None else self.answers.batch(first, end - first).bool()
            yield Batch(self.windows.batch(first, end - first), answers_BT)


class DataModule(L.LightningDataModule):
    """Training windows in the seed's order, and all held-out tokens in one order for every run."""

    def __init__(self, data: TokenData, allocation: Allocation, seed: int, evaluation_batch: int):
        super().__init__()
        self.data, self.allocation = data, allocation
        # Both are cut and ordered by length and seed alone, so their windows go together.
        self.windows, self.answers = (
            None if stream is None else TrainWindows(stream, allocation.sequence_length, seed)
            for stream in (data.train, data.train_answers)
        )
        self.evaluation_batch = evaluation_batch

    def train_dataloader(self) -> TrainBatches:
        return TrainBatches(self.windows, self.answers, self.allocation, self.trainer.global_step)

    def val_dataloader(self) -> DataLoader:
        """All held-out tokens once: full windows in batches, then the shorter rest by itself."""
        tokens = self._in_order(self.data.heldout)
        if self.data.heldout_answers is None:
            answers = [None] * len(tokens)
        else:
            answers = [answers_BT.bool() for answers_BT in self._in_order(self.data.heldout_answers)]
        return DataLoader(list(map(Batch, tokens, answers)), batch_size=None)

    def _in_order(self, stream: np.ndarray) -> list[Tensor]:
        full_NT, tail_1T = heldout_windows(stream, self.allocation.sequence_length)
        batches = list(full_NT.split(self.evaluation_batch)) if len(full_NT) else []
        return batches + ([] if tail_1T is None else [tail_1T])
