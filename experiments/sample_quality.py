"""What samples are worth and what they cost, sampler by sampler: python -m experiments.sample_quality

On the hidden Markov language, whose law is known: the exact negative log-likelihood of samples (quality), the entropy of
their pairs of neighbours (diversity) and the distance of these pairs from the true law (both), against passes of the
network and wall time. Every objective trains one model with the same FLOPs; each sampler is also run on the language
itself in place of a model, which leaves only the sampler's own error. A second start trains nothing again. Writes
<out>.csv, one row a point, and <out>.png.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

from experiments.data.hidden_markov import HiddenMarkovLanguage
from experiments.data.optimal import OptimalModel
from experiments.harness.run import execute, measure, open_data
from experiments.sample import load
from experiments.scaling.figures import COLOURS, MARKERS
from objectives.uniform_diffusion import UniformDiffusion

MEASURES = {
    "nats": "-log p of a symbol under the true law, nats",
    "pair_entropy": "entropy of pairs of neighbours, nats",
    "pair_distance": "total variation of pairs from the true law",
}

LOOKS = [*zip(COLOURS, MARKERS, strict=True), ("#888888", "*")]


def judge(language: HiddenMarkovLanguage, tokens_BT: Tensor) -> dict:
    """Quality, diversity and distance of samples. Sequences with an id that is no symbol have probability zero: their
    share is given, and they are left out of the rest."""
    possible_BT = tokens_BT[(tokens_BT < language.symbols).all(1)]
    V, T = language.symbols, tokens_BT.shape[1]
    nats_B = -language.log_likelihood(possible_BT) / T
    pairs = (possible_BT[:, :-1] * V + possible_BT[:, 1:]).flatten()
    share = torch.bincount(pairs, minlength=V * V) / len(pairs)
    law = language.log_likelihood(torch.cartesian_prod(torch.arange(V), torch.arange(V))).exp()
    return {
        "impossible": 1 - len(possible_BT) / len(tokens_BT),
        "nats": nats_B.mean().item(),
        "nats_se": (nats_B.std() / len(nats_B) ** 0.5).item(),
        "pair_entropy": -torch.special.xlogy(share, share).sum().item(),
        "pair_distance": 0.5 * (share - law).abs().sum().item(),
    }


def points(config: DictConfig):
    """Name of the curve, its objective and sampler, for every value of its dial."""
    for name, curve in config.quality.curves.items():
        for value in curve.get("at", [None]):
            sampler = curve.get("sampler")
            if sampler is not None:
                sampler = instantiate(OmegaConf.merge(sampler, {curve.dial: value}))
            yield name, curve.objective, value, sampler


def draw_samples(objective, model, length: int, samples: int, batch: int, sampler) -> tuple[Tensor, dict]:
    """Tokens [samples, length], and the cost of one sequence."""
    generator, tokens, cost = torch.Generator().manual_seed(0), [], defaultdict(float)
    started = time.perf_counter()
    for start in range(0, samples, batch):
        prompt_BT = torch.zeros(min(batch, samples - start), 0, dtype=torch.long)
        drawn = objective.sample(model, prompt_BT, length, generator, sampler=sampler)
        tokens.append(drawn.tokens_BT)
        share = len(prompt_BT) / samples
        cost["evaluations"] += share * drawn.evaluations
        cost["predictions"] += share * drawn.predictions
        if isinstance(model, torch.nn.Module):
            cost["flops"] += share * objective.sampling_flops(model, drawn)
    seconds = time.perf_counter() - started
    return torch.cat(tokens), cost | {"tokens_per_second": samples * length / seconds, "seconds": seconds / samples}


def table_of(config: DictConfig, overrides: list[str]) -> pd.DataFrame:
    """One row a sampler and setting, on the trained model and on the language itself, and one of the language's own
    sequences, as many.

    Raises:
        ValueError: for an objective that the arch cannot do.
    """
    q, length = config.quality, config.data.sequence_length
    cells = {}
    for name in dict.fromkeys(curve.objective for curve in q.curves.values()):
        cells[name] = hydra.compose("sample_quality", [*overrides, f"objective={name}"])
    data = open_data(config)
    for cell in cells.values():
        measure(cell, data)
    rows = dict(
        zip(cells, Parallel(n_jobs=config.jobs)(delayed(execute)(cell) for cell in cells.values()), strict=True)
    )
    if failed := [name for name, row in rows.items() if row["status"] != "done"]:
        raise ValueError(f"the run of {failed[0]} ended with {rows[failed[0]]['error']}: nothing to sample from")

    language = instantiate(config.data.tokens.language)
    truth = language.sample(q.samples, length, torch.Generator().manual_seed(1))
    table = [{"curve": "the language's own sequences"} | judge(language, truth)]
    for curve, name, value, sampler in track(list(points(config)), description="samplers"):
        build = cells[name].objective.build
        exact = instantiate(build, vocab_size=language.symbols, eot=language.symbols)
        optimal = OptimalModel(language, exact.model_vocab_size - language.symbols, isinstance(exact, UniformDiffusion))
        model, objective, _ = load(Path(config.root) / "cells" / rows[name]["id"], data)
        for kind, parts in (("trained", (objective, model)), ("optimal", (exact, optimal))):
            if kind == "trained" or q.optimal:
                tokens_BT, cost = draw_samples(*parts, length, q.samples, q.batch, sampler)
                what = {"curve": curve, "objective": name, "model": kind, "setting": value}
                table.append(
                    what | cost | judge(language, tokens_BT) | {"bits_per_symbol": rows[name]["bits_per_byte"]}
                )
    return pd.DataFrame(table)


def figure(table: pd.DataFrame) -> Figure:
    """Three measures (rows) against passes of trained and of optimal models and against wall time (columns)."""
    canvas = Figure(figsize=(13, 11), layout="constrained")
    grid = canvas.subplots(3, 3, sharey="row")
    truth, curves = table.iloc[0], table.iloc[1:]
    columns = [("optimal", "evaluations", "passes, the language itself as model")]
    columns += [
        ("trained", "evaluations", "passes, trained model"),
        ("trained", "seconds", "seconds a sequence, trained model"),
    ]
    for axes_row, (measure_, title) in zip(grid, MEASURES.items(), strict=True):
        for axes, (kind, x, label) in zip(axes_row, columns, strict=True):
            for i, name in enumerate(dict.fromkeys(curves.curve)):
                rows = curves[(curves.curve == name) & (curves.model == kind)].sort_values(x)
                axes.plot(rows[x], rows[measure_], label=name, color=LOOKS[i][0], marker=LOOKS[i][1])
            axes.axhline(truth[measure_], color="grey", lw=1)
            axes.set(xscale="log", xlabel=label)
            axes.grid(alpha=0.3)
        axes_row[0].set_ylabel(title)
    canvas.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    canvas.suptitle("grey: as many sequences of the language itself")
    return canvas


def where_it_pays(table: pd.DataFrame, tolerance: float = 0.2) -> list[str]:
    """For every parallel sampler its fewest passes whose pairs are as near to the true law as those of autoregression,
    but for `tolerance`: of the language itself as model, which is the sampler's own price, and of a trained model, with
    its speed beside cached autoregression."""
    lines = []
    for kind in ("optimal", "trained"):
        rows = table[table.model == kind]
        base = rows[rows.objective == "next_token"].iloc[0]
        for name, curve in rows[rows.objective != "next_token"].groupby("curve", sort=False):
            good = curve[curve.pair_distance <= base.pair_distance * (1 + tolerance)]
            if good.empty:
                best = curve.loc[curve.pair_distance.idxmin()]
                line = f"never as good: {best.pair_distance:.3f} at best, autoregression {base.pair_distance:.3f}"
            else:
                first = good.loc[good.evaluations.idxmin()]
                line = f"as good from {first.evaluations:.1f} passes on, autoregression {base.evaluations:.0f}"
                if kind == "trained":
                    line += f", at {base.seconds / first.seconds:.2f} times its speed"
                    line += f" and {first.flops / base.flops:.2f} times its FLOPs"
            lines.append(f"{name}, {kind} model: {line}")
    return lines


@hydra.main(version_base="1.3", config_path="../configs", config_name="sample_quality")
def main(config: DictConfig) -> None:
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    given = [o for o in HydraConfig.get().overrides.task if not o.startswith("objective=")]
    try:
        table = table_of(config, given)
    except ValueError as error:
        sys.exit(f"error: {error}")
    table.to_csv(out.with_suffix(".csv"), index=False, float_format="%.6g")
    figure(table).savefig(out.with_suffix(".png"), dpi=100)
    shown = ["curve", "model", "setting", "evaluations", "tokens_per_second", *MEASURES]
    print(table[shown].to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    print(*where_it_pays(table), sep="\n")
    print(f"written to {out}.csv and {out}.png")


if __name__ == "__main__":
    main()
