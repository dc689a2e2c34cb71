"""The trace that a window has left in a model, by how long ago it was read (after Tirumala et al., arXiv 2205.10770).

Shape letters: B windows, T tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Generator, Tensor

from experiments.findings import Estimate, Verdict
from experiments.harness.assembly import measure, spend
from experiments.harness.data_module import DataModule
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.study import Cell, Compose, Study, check_named
from objectives.contracts import Batch

AT_ONCE = 128  # windows
HALF = 0.5  # of what is remembered of the latest windows: less of the earliest is overwritten


@dataclass(frozen=True)
class Overwriting(Study):
    """Trains a model on as many tokens in each arm and from each seed, every seed on windows that no other reads.

    What a model remembers of windows is how much less it loses on them than the models of the other seeds, who have
    not read them, beyond what it loses less on windows that neither has read: documents that are easy, and seeds that
    are better than others, are not taken for memory.

    train_tokens: read in all, whole windows of which every arm's epochs are. arms: name -> `epochs` in which they are
    read and `overrides` of the config. once, often: the arms that are compared. seeds: of runs and of parts of the
    corpus. lags: fractions of the run, rising to 1; windows are told apart by the two that the time since they were
    last read lies between, 0 before the first. windows: looked at between two lags, at most.
    """

    train_tokens: int
    arms: dict[str, dict]
    once: str
    often: str
    seeds: list[int]
    lags: list[float]
    windows: int

    def cells(self, compose: Compose) -> Iterator[Cell]:
        check_named("compares", (self.once, self.often), self.arms)
        for name, arm in self.arms.items():
            base = compose(arm["overrides"])
            base.session.arm = name
            base.data.tokens = {
                "_target_": "experiments.data.window_parts.part_of_windows",
                "data": base.data.tokens,
                "sequence_length": base.data.sequence_length,
                "train_tokens": self.train_tokens // arm["epochs"],
                "part": 0,
            }
            cost = measure(base, open_data(base)).costs.flops_per_token
            for seed in self.seeds:
                config = base.copy()
                config.seed = config.data.tokens.part = seed
                config.budget.flops = cost * self.train_tokens
                yield Cell({"arm": name, "epochs": arm["epochs"], "seed": seed}, run_of(config))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per part of the corpus and time since it was last read by the run of its own seed: this model's bits
        per byte there."""
        rows = []
        for part in self.seeds:
            config = finished.config.copy()
            config.seed = config.data.tokens.part = part
            lags = [lag for lag in self.lags if lag <= 1 / cell.labels["epochs"]]
            for latest, earliest, windows_BT in last_read(config, lags, self.windows):
                place = {"part": part, "latest": latest, "earliest": earliest, "windows": len(windows_BT)}
                rows.append(place | {"bits": bits_per_byte(finished, windows_BT)})
        return rows

    def figure(self, table: pd.DataFrame) -> Figure:
        """Bits per byte remembered against the time since windows were last read, one curve per arm."""
        canvas = Figure(figsize=(7.5, 4.8), layout="constrained")
        axes, found = canvas.subplots(), remembered(table)
        for i, name in enumerate(self.arms):
            lags = found[found.arm == name].groupby("earliest").bits
            means = lags.mean()
            reach = [Estimate.of_mean(bits).high - bits.mean() if len(bits) > 1 else 0.0 for _, bits in lags]
            look = {"color": COLOURS[i], "marker": MARKERS[i], "capsize": 3, "label": name.replace("_", " ")}
            axes.errorbar(means.index * 1.04 ** (i - len(self.arms) / 2), means, reach, **look)
        axes.axhline(0, color="0.4", lw=1)
        axes.set(xscale="log", xlabel="read last at most this part of the run ago, and more than the point before")
        axes.set(ylabel="bits per byte less than where never read")
        axes.set_xticks(self.lags, [f"1/{1 / lag:.3g}" if lag < 1 else "1" for lag in self.lags])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        found = remembered(table).pivot(index="part", columns=["arm", "earliest"], values="bits")
        oldest = max((lag for lag in self.lags if lag <= 1 / self.arms[self.often]["epochs"]), default=math.nan)
        wanted = [(self.once, self.lags[0]), (self.once, self.lags[-1]), (self.once, oldest), (self.often, oldest)]
        if any(place not in found for place in wanted) or len(found := found[wanted].dropna()) < 2:
            return Verdict("cannot tell", f"{len(found)} seeds are too few to compare.", None, self.rule)
        latest, earliest, then, repeated = (found[place] for place in wanted)
        fresh, mended = Estimate.of_mean(latest), Estimate.of_mean(repeated - then)
        sentence = (
            f"Read once, windows of the last {self.lags[0]:.3g} of the run cost {fresh:.4f} bits per byte less than "
            f"where never read, those of its first {1 - self.lags[-2]:.3g} {Estimate.of_mean(earliest):.4f}"
        )
        if fresh.low <= 0:
            return Verdict("cannot tell", f"{sentence}: there is nothing to overwrite.", None, self.rule)
        kept = Estimate.of_mean(earliest / latest)
        outcome = "cannot tell"
        if kept.high < HALF and mended.low > 0:
            outcome = "holds"
        elif kept.low > HALF or mended.high < 0:
            outcome = "does not hold"
        epochs = self.arms[self.often]["epochs"]
        sentence += (
            f", of the former {kept:.2f}. At a lag of up to {oldest:.3g}, {epochs} epochs of the same tokens leave "
            f"{Estimate.of_mean(repeated):.4f} where one leaves {Estimate.of_mean(then):.4f}: {mended:.4f} more."
        )
        return Verdict(outcome, sentence, kept, self.rule)


def last_read(config: DictConfig, lags: list[float], most: int) -> Iterator[tuple[float, float, Tensor]]:
    """Yield for each lag, a fraction of a run within its last pass over the corpus, the one before it, itself, and
    windows [B, T] that the run read last between the two before its end: all, or `most` of them evenly apart."""
    data = open_data(config)
    allocation = spend(config, data, measure(config, data))
    windows = DataModule(data, allocation, config.seed, config.data.packed, evaluation_batch=1).windows
    for latest, earliest in zip([0.0, *lags], lags, strict=False):
        first, end = (round(allocation.sequences * (1 - lag)) for lag in (earliest, latest))
        numbers = np.unique(np.linspace(first, end - 1, min(most, end - first)).round().astype(int))
        yield latest, earliest, torch.cat([windows.batch(number, 1) for number in numbers.tolist()])


@torch.no_grad()
def bits_per_byte(finished: FinishedRun, windows_BT: Tensor) -> float:
    """Return what windows cost a model, a token counting as the bytes of one in the mean over held-out text."""
    device, generator = next(finished.model.parameters()).device, Generator().manual_seed(0)
    nats = sum(
        finished.objective.evaluate(finished.model, Batch.of(part_BT.to(device)), generator).nats_B.sum().item()
        for part_BT in windows_BT.split(AT_ONCE)
    )
    bytes_per_token = finished.data.heldout_bytes / len(finished.data.heldout)
    return nats / math.log(2) / (windows_BT.numel() * bytes_per_token)


def remembered(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the bits per byte by which the run of a part's own seed loses less there than the runs of other seeds,
    beyond the same on the parts that neither has read: one row per arm, part and lag, with `bits`."""
    done, found = table[table.status == "done"], []
    for (arm, latest, earliest), rows in done.groupby(["arm", "latest", "earliest"], sort=False):
        bits = rows.pivot(index="seed", columns="part", values="bits")
        for own in bits.index.intersection(bits.columns):
            rest = bits.index.drop(own).intersection(bits.columns.drop(own))
            ahead = bits.loc[rest] - bits.loc[own]  # of the own run before each other one, by part
            elsewhere = [ahead.loc[other, rest.drop(other)].mean() for other in rest]
            place = {"arm": arm, "part": own, "latest": latest, "earliest": earliest}
            found.append(place | {"bits": float((ahead[own] - elsewhere).mean())})
    columns = ["arm", "part", "latest", "earliest", "bits"]
    return pd.DataFrame(found, columns=columns).dropna()
