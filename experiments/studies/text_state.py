"""What a byte-level model knows of the state of its text: single units beside probes of whole layers (Karpathy et al.,
arXiv 1506.02078; Radford et al., 1704.01444; Alain and Bengio, 1610.01644).

Shape letters: B windows, T tokens, N bytes that are looked at, F features of one, S states of the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from archs.language_model import LanguageModel
from experiments.data.windows import heldout_windows
from experiments.findings import Estimate, Verdict
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.hidden_states import hidden_states, untrained
from experiments.studies.probes import best_unit, one_hot, probe, standardised
from experiments.studies.python_source import Region, read_documents
from experiments.studies.study import Cell, Compose, Study, over_seeds

STATES = ("string", "comment", "bracket", "indented")
INDENTED = 8  # columns from which on a line counts as indented: mostly that of a method
AT_ONCE = 64  # windows
TRAINED, UNTRAINED, TEXT = "trained", "untrained", "text"  # what is probed


@dataclass(frozen=True)
class TextState(Study):
    """Trains each architecture from each seed, and looks for the states of the text in what it computes.

    architectures: name -> overrides of the config. seeds: of the runs. state: of the verdict, one of `STATES`. margin:
    which part of a probe's skill (twice the area under its ROC curve, less one) is nearly all of it. skip: bytes at the
    beginning of a window that are not looked at, at least last - 1. every: of those after them one in so many is. last:
    bytes that the probe of the text itself sees.
    """

    architectures: dict[str, list[str]]
    seeds: list[int]
    state: str
    margin: float
    skip: int
    every: int
    last: int

    def cells(self, compose: Compose) -> Iterator[Cell]:
        if self.state not in STATES or self.skip < self.last - 1:
            raise ValueError(
                f"state={self.state} must be one of {', '.join(STATES)}, and skip={self.skip} at least last - 1, "
                f"with last={self.last}"
            )
        return over_seeds(compose, self.architectures, self.seeds)

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per state of the text, model and place in it: what `probe` and `best_unit` find there."""
        tokens_BT, _ = heldout_windows(finished.data.heldout, finished.config.data.sequence_length)
        tokens = tokens_BT.flatten().numpy()
        states, scored, other = labels(tokens, finished.data.eot)
        looked_BT = np.zeros(tokens_BT.shape, bool)
        looked_BT[:, self.skip : -1 : self.every] = True  # no model reads the last byte of a window
        where = np.flatnonzero(scored & looked_BT.ravel())
        states_NS, other_N = states[where], other[where]

        def lines(found: dict[str, np.ndarray], **place: str | int) -> list[dict]:
            return [
                {"state": state} | place | {name: values[i].item() for name, values in found.items()}
                for i, state in enumerate(STATES)
            ]

        inputs_BT, rows = F.pad(tokens_BT[:, :-1], (1, 0), value=finished.data.eot), []
        for name, model in ((TRAINED, finished.model), (UNTRAINED, untrained(finished))):
            # What stands at a byte has been computed from it, a place later than it is predicted.
            for (place, layer), x_NF in gathered(model, inputs_BT, where + 1).items():
                x_NF = standardised(x_NF, other_N)
                found = probe(x_NF, states_NS, other_N) | best_unit(x_NF, states_NS, other_N)
                rows += lines(found, model=name, place=place, layer=layer)
        text = probe(one_hot(tokens, where, self.last, finished.data.vocab_size), states_NS, other_N)
        return [*rows, *lines(text, model=TEXT, place=f"last {self.last} bytes", layer=0)]

    def figure(self, table: pd.DataFrame) -> Figure:
        """Areas under the ROC curve by block, one panel per state: probes, single units, and what they are to beat."""
        canvas = Figure(figsize=(3.3 * len(STATES), 4.8), layout="constrained")
        panels = canvas.subplots(1, len(STATES), sharey=True)
        done = table[table.status == "done"]
        for panel, state in zip(panels, STATES, strict=True):
            rows = done[done.state == state]
            for i, name in enumerate(self.architectures):
                for model, alpha in ((TRAINED, 1.0), (UNTRAINED, 0.35)):
                    of = rows[(rows.architecture == name) & (rows.model == model)]
                    for column, line in (("probe", "-"), ("unit", "--")):
                        means = best(of, ["layer", "seed"], column).groupby("layer").mean()
                        look = {"color": COLOURS[i], "marker": MARKERS[i], "alpha": alpha, "ls": line, "ms": 4}
                        panel.plot(means.index, means, **look)
            panel.axhline(rows[rows.model == TEXT].probe.mean(), color="0.4", ls=":")
            panel.set(title=state, xlabel="block")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(alpha=0.3)
        panels[0].set(ylabel="area under the ROC curve, other documents")
        keys = [Line2D([], [], color=COLOURS[i], marker=MARKERS[i]) for i in range(len(self.architectures))]
        keys += [Line2D([], [], color="k", ls=line, alpha=alpha) for line, alpha in (("-", 1), ("--", 1), ("-", 0.35))]
        keys += [Line2D([], [], color="0.4", ls=":")]
        names = [name.replace("_", " ") for name in self.architectures]
        names += ["probe of all units", "best unit", "pale: untrained", f"probe of the last {self.last} bytes"]
        canvas.legend(keys, names, loc="outside lower center", ncols=4)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        found = summary(table)
        runs = found[found.state == self.state]
        seeds = runs.groupby("seed")[["part", "lead"]].mean()
        if len(seeds) < 2:
            return Verdict("cannot tell", f"{len(seeds)} seeds are too few to tell.", None, self.rule)
        part, lead = Estimate.of_mean(seeds.part), Estimate.of_mean(seeds.lead)
        outcome = "cannot tell"
        if part.low > self.margin and lead.low > 0:
            outcome = "holds"
        elif part.high < self.margin or lead.high < 0:
            outcome = "does not hold"
        means = runs.groupby("architecture")[["unit", "probe", "untrained"]].mean()
        said = ", ".join(
            f"{name} {means.unit[name]:.3f} of {means.probe[name]:.3f} ({means.untrained[name]:.3f})"
            for name in self.architectures
            if name in means.index
        )
        parts = found.groupby("state").part.mean()
        others = ", ".join(f"{state} {parts[state]:.2f}" for state in STATES if state != self.state)
        sentence = (
            f"Area under the ROC curve for {self.state} on other documents, best unit of best probe (untrained unit): "
            f"{said}; a probe of the last {self.last} bytes {runs.text.mean():.3f}. The unit has {part:.2f} of the "
            f"probe's skill ({others}), and leads the better of the untrained unit and the last bytes by {lead:.3f}."
        )
        return Verdict(outcome, sentence, part, self.rule)


def labels(tokens: np.ndarray, eot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of a stream of documents of bytes the states behind each, bool [tokens, S]; where they can be told (not at
    quotes and ends of documents); and where a document is one of those that probes are not fitted on, every second."""
    source, end = read_documents(tokens, eot), tokens == eot
    string, comment = source.region == Region.STRING, source.region == Region.COMMENT
    states = np.stack([string, comment, source.depth > 0, source.indent >= INDENTED], axis=1)
    return states, (source.region != Region.QUOTE) & ~end, (np.cumsum(end) - end) % 2 == 1


def gathered(model: LanguageModel, inputs_BT: Tensor, where: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    """Return what `hidden_states` gives at some of the inputs, counted through all windows, [len(where), F] a place."""
    chosen_BT = torch.zeros(inputs_BT.numel(), dtype=torch.bool)
    chosen_BT[torch.from_numpy(where)] = True
    chosen_BT = chosen_BT.view(inputs_BT.shape)
    parts: dict[tuple[str, int], list[Tensor]] = {}
    device = next(model.parameters()).device
    for tokens_BT, at_BT in zip(inputs_BT.split(AT_ONCE), chosen_BT.split(AT_ONCE), strict=True):
        for place, x in hidden_states(model, tokens_BT.to(device)).items():
            parts.setdefault(place, []).append(x[at_BT.to(device)].float().cpu())
    return {place: torch.cat(part).numpy() for place, part in parts.items()}


def best(rows: pd.DataFrame, by: list[str], column: str) -> pd.Series:
    """Returns for each group the area of the probe or the unit at the place that fitted best."""
    best_rows = rows.loc[rows.groupby(by)[f"{column}_fitted"].idxmax()]
    return best_rows.set_index(by)[column]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run and state: the areas of the best `unit`, the best `probe`, the best unit `untrained` and
    the `text`'s probe, which `part` of the probe's skill the unit has, and its `lead` on the better of the last two."""
    done, by = table[table.status == "done"], ["architecture", "seed", "state"]
    trained = done[done.model == TRAINED]
    found = pd.DataFrame(
        {
            "unit": best(trained, by, "unit"),
            "probe": best(trained, by, "probe"),
            "untrained": best(done[done.model == UNTRAINED], by, "unit"),
            "text": best(done[done.model == TEXT], by, "probe"),
        }
    ).reset_index()
    lead = found.unit - found[["untrained", "text"]].max(axis=1)
    return found.assign(part=(2 * found.unit - 1) / (2 * found.probe - 1), lead=lead)
