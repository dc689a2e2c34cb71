"""Batches for Lightning: every one a function of the seed and the step alone, so a resumed run reads on exactly."""

from collections.abc import Iterator

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.data.token_data import TokenData
from experiments.data.windows import TrainWindows, heldout_windows
from experiments.harness.budget import Allocation


class TrainBatches:
    """tokens_BT of the steps from `start` on. Its length is that of the whole run, which is what Lightning counts
    against when it resumes in the middle."""

    def __init__(self, windows: TrainWindows, allocation: Allocation, start: int):
        self.windows, self.allocation, self.start = windows, allocation, start

    def __len__(self) -> int:
        return self.allocation.steps

    def __iter__(self) -> Iterator[Tensor]:
        for step in range(self.start, self.allocation.steps):
            first, end = (self.allocation.first_sequence(s) for s in (step, step + 1))
            yield self.windows.batch(first, end - first)


class DataModule(L.LightningDataModule):
    """Training windows in the seed's order, and all held-out tokens in one order for every run."""

    def __init__(self, data: TokenData, allocation: Allocation, seed: int, evaluation_batch: int):
        super().__init__()
        self.data, self.allocation = data, allocation
        self.windows = TrainWindows(data.train, allocation.sequence_length, seed)
        self.evaluation_batch = evaluation_batch

    def train_dataloader(self) -> TrainBatches:
        return TrainBatches(self.windows, self.allocation, self.trainer.global_step)

    def val_dataloader(self) -> DataLoader:
        """All held-out tokens once: full windows in batches, then the shorter rest by itself."""
        full_NT, tail_1T = heldout_windows(self.data.heldout, self.allocation.sequence_length)
        batches = list(full_NT.split(self.evaluation_batch)) if len(full_NT) else []
        batches += [] if tail_1T is None else [tail_1T]
        return DataLoader(batches, batch_size=None)
