"""Choice of experts: by the byte, or by the kind of text that it stands in (Jiang et al., arXiv 2401.04088,
section 5; Fedus et al., 2101.03961).

Shape letters: B windows, T tokens, N bytes that are looked at, K experts per byte.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from archs.language_model import LanguageModel
from experiments.data.windows import heldout_windows
from experiments.findings import Estimate, Verdict
from experiments.harness.identity import run_of
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS
from experiments.studies.hidden_states import chosen_experts, untrained
from experiments.studies.python_source import Region, read_documents
from experiments.studies.study import Cell, Compose, Study

KINDS = (Region.CODE, Region.COMMENT, Region.STRING)
AT_ONCE = 64  # windows
TRAINED, UNTRAINED = "trained", "untrained"


@dataclass(frozen=True)
class ExpertKinds(Study):
    """Trains a mixture of experts from each seed, and asks what its routers' choices tell of held-out bytes.

    seeds: of the runs. margin: the part of what is told that is hardly any of it. skip: bytes at the beginning of a
    window that are not looked at.
    """

    seeds: list[int]
    margin: float
    skip: int

    def cells(self, compose: Compose) -> Iterator[Cell]:
        for seed in self.seeds:
            yield Cell({"seed": seed}, run_of(compose([f"seed={seed}"])))

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per model and block: bits that the choice tells of the byte, `byte`, of the kind of text, `kind`, and
        of the kind to somebody who knows the byte, `kind_beyond`, each less what it tells of them shuffled; and
        `choice` and `kinds`, the entropies of both."""
        tokens_BT, _ = heldout_windows(finished.data.heldout, finished.config.data.sequence_length)
        tokens = tokens_BT.flatten().numpy()
        source = read_documents(tokens, finished.data.eot)
        looked_BT = np.zeros(tokens_BT.shape, bool)
        looked_BT[:, self.skip : -1] = True  # no model reads the last byte of a window
        where = np.flatnonzero(np.isin(source.region, KINDS) & (tokens != finished.data.eot) & looked_BT.ravel())
        inputs_BT, rows = F.pad(tokens_BT[:, :-1], (1, 0), value=finished.data.eot), []
        for name, model in ((TRAINED, finished.model), (UNTRAINED, untrained(finished))):
            for block, chosen_BTK in choices(model, inputs_BT).items():
                # A byte is read a place later than it is predicted.
                chosen_NK = chosen_BTK.flatten(0, 1).numpy()[where + 1]
                rows.append({"model": name, "block": block} | told(chosen_NK, tokens[where], source.region[where]))
        return rows

    def figure(self, table: pd.DataFrame) -> Figure:
        """Bits that the choice of an expert tells, by block: of the byte, and of the kind of text beyond it."""
        canvas = Figure(figsize=(7.5, 4.4), layout="constrained")
        panels = canvas.subplots(1, 2, sharey=True)
        for panel, model in zip(panels, (TRAINED, UNTRAINED), strict=True):
            rows = table[(table.status == "done") & (table.model == model)]
            means = rows.groupby("block")[["byte", "kind_beyond", "choice"]].mean()
            panel.bar(means.index, means.byte, color=COLOURS[0], label="of the byte")
            beyond = {"bottom": means.byte, "color": COLOURS[1], "label": "of the kind of text beyond the byte"}
            panel.bar(means.index, means.kind_beyond, **beyond)
            panel.plot(means.index, means.choice, "_", color="k", ms=30, label="entropy of the choice")
            panel.set(title=model, xlabel="block", xticks=list(means.index))
        panels[0].set(ylabel="bits that the choice of an expert tells")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        done = table[table.status == "done"]
        trained = done[done.model == TRAINED].groupby("seed")[["byte", "kind", "kind_beyond", "choice", "kinds"]].mean()
        if len(trained) < 2:
            return Verdict("cannot tell", f"{len(trained)} seeds are too few to tell.", None, self.rule)
        part = Estimate.of_mean(trained.kind_beyond / (trained.byte + trained.kind_beyond))
        outcome = "holds" if part.high < self.margin else "does not hold" if part.low > self.margin else "cannot tell"
        before = done[done.model == UNTRAINED][["byte", "kind_beyond"]].mean()
        mean = trained.mean()
        sentence = (
            f"The choice of an expert, {mean.choice:.2f} bits, tells {mean.byte:.2f} bits of the byte and "
            f"{mean.kind_beyond:.3f} of the kind of text (code, comment, string) beyond the byte, {part:.3f} of both "
            f"together (untrained {before.kind_beyond / (before.byte + before.kind_beyond):.3f}); by itself it gives "
            f"away {mean.kind / mean.kinds:.3f} of the {mean.kinds:.2f} bits of the kind."
        )
        return Verdict(outcome, sentence, part, self.rule)


def choices(model: LanguageModel, inputs_BT: Tensor) -> dict[int, Tensor]:
    """Return what `chosen_experts` gives for all windows."""
    device = next(model.parameters()).device
    parts = [chosen_experts(model, part_BT.to(device)) for part_BT in inputs_BT.split(AT_ONCE)]
    return {block: torch.cat([part[block].cpu() for part in parts]) for block in parts[0]}


def told(chosen_NK: np.ndarray, byte_N: np.ndarray, kind_N: np.ndarray) -> dict[str, float]:
    """Return bits of mutual information between a byte's experts, each of them by itself, and the byte, the kind of
    text, and the kind given the byte, each less that with the latter shuffled, the last among places of the same byte;
    and the entropies of experts and kinds."""
    rng, K = np.random.default_rng(0), chosen_NK.shape[1]
    byte_N, kind_N = byte_N.astype(np.int64), kind_N.astype(np.int64)
    shuffled_N, within_N = rng.permutation(len(byte_N)), np.empty_like(kind_N)
    within_N[np.argsort(byte_N, kind="stable")] = kind_N[np.lexsort((rng.random(len(byte_N)), byte_N))]
    columns = (byte_N, kind_N, byte_N[shuffled_N], kind_N[shuffled_N], within_N)
    byte, kind, other_byte, other_kind, within = (np.tile(column, K) for column in columns)
    expert = chosen_NK.T.ravel()
    return {
        "byte": information(expert, byte) - information(expert, other_byte),
        "kind": information(expert, kind) - information(expert, other_kind),
        "kind_beyond": information(expert, kind, byte) - information(expert, within, byte),
        "choice": entropy(expert),
        "kinds": entropy(kind),
    }


def information(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    """Return the mutual information in bits of two columns, given a third, by the frequencies: I(x; y | g) = H(x, g) +
    H(y, g) - H(x, y, g) - H(g)."""
    g = [] if given is None else [given]
    return entropy(x, *g) + entropy(y, *g) - entropy(x, y, *g) - (entropy(*g) if g else 0.0)


def entropy(*columns: np.ndarray) -> float:
    """Return the joint entropy in bits of columns of small non-negative integers, by their frequencies."""
    counts = np.unique(np.ravel_multi_index(columns, sizes(columns)), return_counts=True)[1]
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def sizes(columns: Sequence[np.ndarray]) -> tuple[int, ...]:
    """Return how many values each column may have."""
    return tuple(int(column.max()) + 1 for column in columns)
