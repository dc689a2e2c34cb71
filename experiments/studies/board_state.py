"""The board behind a model of moves: probes for it, and edits of it that should change what is legal (Li et al., arXiv
2210.13382; Nanda et al., 2309.00941).

Shape letters: G games, T plies, N positions, D model width, F features, S squares, V token ids.
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
from experiments.data.othello import EOT, Othello
from experiments.data.windows import heldout_windows
from experiments.findings import Estimate, Verdict
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.board_edits import ERRORS, draw_flips, edits
from experiments.studies.hidden_states import hidden_states, untrained
from experiments.studies.probes import Features, least_squares, one_hot
from experiments.studies.sides import on_their_sides
from experiments.studies.study import Cell, Compose, Study, over_seeds

AT_ONCE = 256  # games
TRAINED, UNTRAINED, MOVES = "trained", "untrained", "moves"  # what is probed


@dataclass(frozen=True)
class BoardState(Study):
    """Trains each architecture from each seed on moves alone, probes its residual stream for the board, and flips
    squares there.

    Every second held-out game is what probes are fitted on, and layers and strengths chosen; the others are judged.

    architectures: name -> overrides of the config. seeds: of the runs. strengths: of edits, of which each layer takes
    the best; 1 makes the probe say the flipped colour as surely as its labels do.
    """

    architectures: dict[str, list[str]]
    seeds: list[int]
    strengths: list[float]

    def cells(self, compose: Compose) -> Iterator[Cell]:
        return over_seeds(compose, self.architectures, self.seeds)

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per model and layer, and one of the moves: the fraction of squares that the probe tells, of all and
        of those with a piece; for the trained model which part of its likeliest tokens is legal, and behind each block
        but the last, what `edits` finds."""
        rules = Othello(finished.config.data.tokens.size)
        tokens_GT, _ = heldout_windows(finished.data.heldout, finished.config.data.sequence_length)
        inputs_GT = F.pad(tokens_GT[:, :-1], (1, 0), value=EOT)
        mine_GT, theirs_GT = rules.boards(tokens_GT.numpy())
        allowed_GTV = rules.allowed(mine_GT, theirs_GT)
        looked_GT = rules.playable(mine_GT, theirs_GT) != 0
        boards_NS3 = squares(rules, mine_GT[looked_GT], theirs_GT[looked_GT])
        other_N = np.nonzero(looked_GT)[0] % 2 == 1
        flips, random, rows = draw_flips(rules, mine_GT, theirs_GT), np.random.default_rng(finished.config.seed), []
        fraction_legal = legal(finished.model.eval(), inputs_GT, allowed_GTV, looked_GT)
        for name, model in ((TRAINED, finished.model), (UNTRAINED, untrained(finished))):
            for layer, x_GTD in streams(model, inputs_GT).items():
                x_ND = x_GTD[looked_GT].astype(np.float64)
                x_ND = x_ND - x_ND[~other_N].mean(0)
                weights_DS3, said_NS3, found = read_boards(x_ND, boards_NS3, other_N)
                if name == TRAINED and layer < model.depth:
                    said_GTS3 = np.zeros((*looked_GT.shape, *said_NS3.shape[1:]))
                    said_GTS3[looked_GT] = said_NS3
                    moves_ND = flips.directions(weights_DS3, said_GTS3)
                    found |= edits(model, inputs_GT, flips, layer, moves_ND, self.strengths, random)
                if name == TRAINED:
                    found["legal"] = fraction_legal
                rows.append({"model": name, "layer": layer} | found)
        _, _, found = read_boards(text(inputs_GT.numpy(), looked_GT, rules.vocab_size), boards_NS3, other_N)
        return [*rows, {"model": MOVES, "layer": 0} | found]

    def figure(self, table: pd.DataFrame) -> Figure:
        """By block: the fraction of squares told, and the errors about edited boards."""
        canvas = Figure(figsize=(10, 4.9), layout="constrained")
        left, right = canvas.subplots(1, 2)
        done = table[table.status == "done"]
        for i, name in enumerate(self.architectures):
            rows = done[done.architecture == name]
            look = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 4}
            for model, alpha in ((TRAINED, 1.0), (UNTRAINED, 0.35)):
                for _, run in rows[rows.model == model].groupby("seed"):
                    left.plot(run.layer, run.accuracy, alpha=alpha, **look)
            for _, run in rows[rows.model == TRAINED].dropna(subset=ERRORS[0]).groupby("seed"):
                for column, line in zip(ERRORS, ("-", "--", ":"), strict=True):
                    right.plot(run.layer, run[column], ls=line, **look)
        left.axhline(done[done.model == MOVES].accuracy.mean(), color="0.4", ls=":")
        left.set(ylabel="fraction of squares told, other games", title="a linear probe for empty, mine, theirs")
        right.set(ylabel="errors per position", ylim=(0, None), title="legal moves of the edited board")
        for axes in (left, right):
            axes.set(xlabel="behind block")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(alpha=0.3)
        keys = [Line2D([], [], color=COLOURS[i], marker=MARKERS[i]) for i in range(len(self.architectures))]
        keys += [Line2D([], [], color="k", alpha=0.35), Line2D([], [], color="0.4", ls=":")]
        keys += [Line2D([], [], color="k", ls=line) for line in ("-", "--", ":")]
        names = [
            *(name.replace("_", " ") for name in self.architectures),
            "pale: untrained",
            "left: probe of the moves",
        ]
        names += ["right: square flipped", "right: random edit as long", "right: no edit"]
        canvas.legend(keys, names, loc="outside lower center", ncols=4)
        return canvas

    def verdict(self, table: pd.DataFrame) -> Verdict:
        found = summary(table)
        parts = found.pivot(index="seed", columns="architecture", values=["probe", "edit"])
        parts.columns = [f"{kind} of {name}" for kind, name in parts.columns]
        names = [f"{kind} of {name}" for name in self.architectures for kind in ("probe", "edit")]
        outcome, name, effect = on_their_sides(parts, above=names, below=(), threshold=0.0)
        if effect is None:
            return Verdict(outcome, f"The {name} has too few seeds to judge.", None, self.rule)
        means = found.groupby("architecture").mean(numeric_only=True)
        said = "; ".join(
            f"{arch}: {row.legal:.3f} of its likeliest moves are legal, squares told {row.trained:.3f} (untrained "
            f"{row.untrained:.3f}, a probe of the moves themselves {row.moves:.3f}), errors about the edited board "
            f"{row.edited:.2f} with the flip, {row.random:.2f} with a random edit and {row.unedited:.2f} with none, no "
            f"error in {row.exact:.2f}, {row.exact_random:.2f} and {row.exact_unedited:.2f} of positions"
            for arch, row in ((arch, means.loc[arch]) for arch in self.architectures)
        )
        avoided = ", ".join(f"{part} {Estimate.of_mean(parts[part]):.2f}" for part in names)
        sentence = f"{said}. Part of the errors avoided of the best to compare with: {avoided}. Read from the {name}."
        return Verdict(outcome, sentence, effect, self.rule)


def squares(rules: Othello, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return of boards whether each square is empty, mine, theirs: bool [..., S, 3]."""
    return np.stack([rules.bits(~(mine | theirs)), rules.bits(mine), rules.bits(theirs)], axis=-1)


def read_boards(
    x_NF: Features, boards_NS3: np.ndarray, other_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Fit a linear probe to the boards that are not `other`, which takes of the three things that a square may be the
    one it finds most; return its weights [F, S, 3], what it says [N, S, 3], and the fractions of squares that are told:
    "accuracy_fitted", "accuracy" on the others and "accuracy_filled" on those of them that have a piece."""
    labels = boards_NS3.reshape(len(boards_NS3), -1)
    weights = least_squares(x_NF[~other_N], labels[~other_N])
    said_NS3 = (x_NF @ weights + labels[~other_N].mean(0)).reshape(boards_NS3.shape)
    right_NS = said_NS3.argmax(-1) == boards_NS3.argmax(-1)
    found = {"accuracy_fitted": right_NS[~other_N], "accuracy": right_NS[other_N]}
    found["accuracy_filled"] = right_NS[other_N][~boards_NS3[other_N, :, 0]]
    fractions = {name: float(right.mean()) for name, right in found.items()}
    return weights.reshape(-1, *boards_NS3.shape[1:]), said_NS3, fractions


def text(inputs_GT: np.ndarray, looked_GT: np.ndarray, vocab_size: int) -> Features:
    """Return which token stands how long ago in the inputs up to a place that is looked at."""
    T = inputs_GT.shape[1]
    padded = np.pad(inputs_GT, ((0, 0), (T, 0)), constant_values=EOT)
    where = np.flatnonzero(np.pad(looked_GT, ((0, 0), (T, 0))))
    return one_hot(padded.ravel(), where, T, vocab_size)


def streams(model: LanguageModel, inputs_GT: Tensor) -> dict[int, np.ndarray]:
    """Return the residual stream behind each block, [G, T, D], by its number from 1 on."""
    parts: dict[int, list[Tensor]] = {}
    device = next(model.parameters()).device
    for tokens in inputs_GT.split(AT_ONCE):
        for (place, layer), x in hidden_states(model, tokens.to(device)).items():
            if place == "stream":
                parts.setdefault(layer, []).append(x.float().cpu())
    return {layer: torch.cat(part).numpy() for layer, part in parts.items()}


@torch.no_grad()
def legal(model: LanguageModel, inputs_GT: Tensor, allowed_GTV: np.ndarray, looked_GT: np.ndarray) -> float:
    """Return which part of the likeliest next tokens of a model is allowed, where it is looked."""
    device = next(model.parameters()).device
    best_GT = torch.cat([model(tokens.to(device)).argmax(-1).cpu() for tokens in inputs_GT.split(AT_ONCE)]).numpy()
    return float(np.take_along_axis(allowed_GTV, best_GT[..., None], -1)[looked_GT].mean())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Returns one row per run: squares told by the best layer `trained` and `untrained` and by the `moves`, what the
    best edit does, and the parts of the errors avoided: `probe`, of the better of untrained and moves, and `edit`, of
    the fewer of no edit and a random one. Layers are chosen by what was fitted on."""
    done, by = table[table.status == "done"], ["architecture", "seed"]

    def best(rows: pd.DataFrame, scores: pd.Series) -> pd.DataFrame:
        return rows.loc[scores.dropna().groupby([rows[name] for name in by]).idxmax()].set_index(by)

    of = {model: done[done.model == model] for model in (TRAINED, UNTRAINED, MOVES)}
    found = pd.DataFrame({model: best(rows, rows.accuracy_fitted).accuracy for model, rows in of.items()})
    edit = best(of[TRAINED], -of[TRAINED].edited_fitted)
    columns = ["legal", *ERRORS, "exact", "exact_random", "exact_unedited"]
    found = found.join(edit[columns]).reset_index()
    probe = 1 - (1 - found.trained) / (1 - found[[UNTRAINED, MOVES]].max(axis=1))
    return found.assign(probe=probe, edit=1 - found.edited / found[["random", "unedited"]].min(axis=1))
