"""How much a backbone recalls for the bytes of its decode state: python -m experiments.recall

Multi-query associative recall (Arora et al., arXiv 2312.04927). Every point of every curve in configs/recall.yaml is
trained once for each learning rate, as a run of its own in <root>/cells; a second start goes on where the first was
stopped. Writes <out>.csv, one row a run, and <out>.png: the run of the best learning rate of each point.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import hydra
import pandas as pd
import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from archs.language_model import LanguageModel
from experiments.data.token_data import TokenData
from experiments.data.windows import heldout_windows
from experiments.harness.run import execute, measure, open_data
from experiments.sample import load
from experiments.scaling.figures import COLOURS, MARKERS

AT_ONCE = 64  # sequences evaluated together
KEPT = ("id", "status", "arch", "learning_rate", "state_bytes", "params_total", "steps", "tokens", "flops")
KEPT += ("bits_per_byte", "train_seconds", "device")


def cells(config: DictConfig, data: TokenData) -> Iterator[DictConfig]:
    """The config of every run: a curve's pattern, one value of its dial, one learning rate; equal steps for all.

    Raises:
        ValueError: for a pattern with a mixer that the arch does not have, or an objective that it cannot do.
    """
    mixers = config.arch.model.mixers
    for name, curve in config.recall.curves.items():
        used = [entry.partition("+")[0] for entry in curve.pattern]
        if missing := sorted({*used} - {*mixers}):
            raise ValueError(f"curve {name!r} has a mixer {missing[0]!r}: choose from {', '.join(mixers)}")
        for value in curve.at:
            for learning_rate in config.recall.learning_rates:
                cell = config.copy()
                cell.arch.name, cell.arm = name, f"{name} {value}"
                cell.arch.model.pattern, cell.arch.model.depth = curve.pattern, len(curve.pattern)
                # Without the others, so that a mixer added to the config leaves the runs of these what they are.
                cell.arch.model.mixers = {mixer: mixers[mixer] for mixer in dict.fromkeys(used)}
                OmegaConf.update(cell.arch, curve.dial, value)
                cell.optim.learning_rate = learning_rate
                cost, _ = measure(cell, data)
                tokens = config.recall.steps * config.optim.batch_tokens
                cell.budget.flops = cost.flops_per_token * tokens
                yield cell


@torch.no_grad()
def accuracy(model: LanguageModel, objective, data: TokenData, sequence_length: int) -> dict[int, float]:
    """Share of held-out answers whose likeliest token is right, by the number of answers in a sequence."""
    tokens_NT, answers_NT = (
        heldout_windows(stream, sequence_length)[0] for stream in (data.heldout, data.heldout_answers)
    )
    rows = []
    for tokens_BT, answers_BT in zip(tokens_NT.split(AT_ONCE), answers_NT.bool().split(AT_ONCE), strict=True):
        right_N = objective.answer_logits(model, tokens_BT, answers_BT).argmax(-1) == tokens_BT[answers_BT]
        right_BT = torch.zeros_like(answers_BT).masked_scatter(answers_BT, right_N)
        rows.append(pd.DataFrame({"answers": answers_BT.sum(1), "right": right_BT.sum(1)}))
    sums = pd.concat(rows).assign(sequences=1).groupby("answers", as_index=False).sum()
    return dict(zip(sums.answers.tolist(), (sums.right / (sums.answers * sums.sequences)).tolist(), strict=True))


def run(config: DictConfig, data: TokenData) -> dict:
    """Train one cell, or find it done, and evaluate it: a row of the table."""
    row = execute(config, data)
    result = {key: row[key] for key in KEPT}
    if row["status"] == "done":
        model, objective, _ = load(Path(config.root) / "cells" / row["id"], data)
        shares = accuracy(model, objective, data, config.data.sequence_length)
        result |= {f"accuracy@{pairs}": share for pairs, share in shares.items()}
    return result


def best(table: pd.DataFrame) -> pd.DataFrame:
    """Of each point the run with the learning rate that recalls most, all numbers of pairs together."""
    shares = [column for column in table if column.startswith("accuracy@")]
    done = table[table.status == "done"].assign(accuracy=table[shares].mean(axis=1))
    return done.sort_values("accuracy").groupby(["arch", "state_bytes"], sort=False).tail(1)


def figure(table: pd.DataFrame) -> Figure:
    """Accuracy against the bytes of the decode state, one panel a number of pairs, one curve a backbone."""
    shares = [column for column in table if column.startswith("accuracy@")]
    canvas = Figure(figsize=(4.2 * len(shares), 4.6), layout="constrained")
    panels = canvas.subplots(1, len(shares), sharey=True, squeeze=False)[0]
    rows = best(table)
    for panel, share in zip(panels, shares, strict=True):
        for i, name in enumerate(dict.fromkeys(table.arch)):
            curve = rows[rows.arch == name].sort_values("state_bytes")
            panel.plot(curve.state_bytes, curve[share], color=COLOURS[i], marker=MARKERS[i], label=name)
        panel.set(xscale="log", title=f"{share.partition('@')[2]} pairs", xlabel="bytes of decode state")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="share of answers recalled", ylim=(-0.02, 1.02))
    canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return canvas


def table_of(config: DictConfig) -> pd.DataFrame:
    """One row a run: what it is, what it cost, and the share of answers recalled for each number of pairs.

    Raises:
        ValueError: as `cells`, before anything is trained.
    """
    data = open_data(config)
    planned = list(cells(config, data))
    rows = Parallel(n_jobs=config.jobs, return_as="generator")(delayed(run)(cell, data) for cell in planned)
    return pd.DataFrame(track(rows, total=len(planned), description="runs"))


@hydra.main(version_base="1.3", config_path="../configs", config_name="recall")
def main(config: DictConfig) -> None:
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        table = table_of(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    table.to_csv(out.with_suffix(".csv"), index=False, float_format="%.6g")
    figure(table).savefig(out.with_suffix(".png"), dpi=110)
    shown = best(table)
    print(shown[["arch", "state_bytes", "learning_rate", *(c for c in shown if "@" in c)]].to_string(index=False))
    print(f"written to {out}.csv and {out}.png")


if __name__ == "__main__":
    main()
