"""Context extension: trained on short windows, and then for a twentieth of the tokens on long ones, by what becomes of
the positions (Peng et al., arXiv 2309.00071; Xiong et al., 2309.16039)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from experiments.findings import Estimate, Verdict
from experiments.harness.assembly import measure
from experiments.harness.identity import run_of
from experiments.harness.parts import open_data
from experiments.harness.weights import FinishedRun
from experiments.report.figures import COLOURS, MARKERS
from experiments.studies.by_position import at_length, bits_by_position, recall_by_distance
from experiments.studies.sides import above, seeds_to_tell
from experiments.studies.study import Cell, Compose, Stages, Study

REPORTS = {"bits": bits_by_position, "recall": recall_by_distance}  # what a task is measured by
SHOWN_FROM = 16  # position in a window


@dataclass(frozen=True)
class ContextExtension(Study):
    """Trains each backbone on each task at the first length, and goes on from there at each of the others.

    trained: tokens of the first windows. lengths: of the longer ones. share: of the first training's tokens that each
    extension has. extension: overrides of all extensions. curves: name -> the blocks of its model for each task, and
    what its mixer `attention` has for `position` when it is extended, where that changes; a scaling gets its factor
    here. tasks: name -> overrides, the first training's tokens, depth, seeds of the extensions, and whether it reports
    "bits" or "recall". compared: the curve that the rule puts to the test, and the one that it is to beat.
    """

    trained: int
    lengths: list[int]
    share: float
    extension: list[str]
    curves: dict[str, dict]
    tasks: dict[str, dict]
    compared: list[str]

    def stages(self, compose: Compose) -> Stages:
        if missing := [name for name in self.compared if name not in self.curves]:
            raise ValueError(f"study.compared={missing[0]} is no curve: choose from {', '.join(self.curves)}")
        first, cells = {}, {}
        for task, settings in self.tasks.items():
            base = compose([*settings["overrides"], f"data.sequence_length={self.trained}"])
            for curve, config in self._configs(base, task, settings["tokens"]):
                run = run_of(config)
                first[task, curve] = run
                # Curves that differ in their extension alone have one beginning.
                cells.setdefault(run.id, Cell({"task": task, "curve": curve, "trained": self.trained, "seed": 0}, run))
        done = {cell.run.id for cell in (yield cells.values())}
        later = []
        for task, settings in self.tasks.items():
            for length in self.lengths:
                base = compose([*settings["overrides"], *self.extension, f"data.sequence_length={length}"])
                for curve, config in self._configs(base, task, round(settings["tokens"] * self.share)):
                    if first[task, curve].id not in done:
                        continue
                    config.init_from = first[task, curve].id
                    self._move(config, curve, length)
                    for seed in settings["seeds"]:
                        config.seed = seed
                        labels = {"task": task, "curve": curve, "trained": length, "seed": seed}
                        later.append(Cell(labels, run_of(config)))
        yield later

    def _configs(self, base: DictConfig, task: str, tokens: int) -> Iterator[tuple[str, DictConfig]]:
        """The config of each curve on a task, for so many tokens."""
        base = base.copy()
        if "train_sequences" in base.data.tokens:  # as many as are read once
            base.data.tokens.train_sequences = -(-tokens // base.data.sequence_length)
        data, mixers = open_data(base), base.arch.model.mixers
        for name, curve in self.curves.items():
            used = dict.fromkeys(entry.partition("+")[0] for entry in curve[task])
            if missing := [mixer for mixer in used if mixer not in mixers]:
                raise ValueError(f"curve {name!r} has a mixer {missing[0]!r}: choose from {', '.join(mixers)}")
            config = base.copy()
            config.arch.model.pattern, config.arch.model.depth = curve[task], self.tasks[task]["depth"]
            config.arch.model.mixers = {mixer: mixers[mixer] for mixer in used}
            config.session.arm = config.arch.name = "+".join(used)
            config.budget.flops = measure(config, data).costs.flops_per_token * tokens
            yield name, config

    def _move(self, config: DictConfig, curve: str, length: int) -> None:
        """Give a config the positions that a curve is extended with."""
        changes = self.curves[curve].get("position", {})
        if not changes:
            return
        if "scaling" in changes:
            changes = changes | {"scaling": changes["scaling"] | {"factor": length / self.trained}}
        attention = config.arch.model.mixers.attention
        attention.position = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(attention.position)), changes)

    def measure(self, cell: Cell, finished: FinishedRun) -> list[dict]:
        """One row per length of windows: that of the training, and after the first training the longer ones as well.
        Of bits their means before and beyond the position `trained`, of recall those of distances; and all ranges."""
        kind = self.tasks[cell.labels["task"]]["reports"]
        config, begun = finished.config.copy(), cell.labels["trained"] == self.trained
        if "train_sequences" in config.data.tokens:  # what is held out does not depend on it
            config.data.tokens.train_sequences = 1
        rows = []
        for length in [self.trained, *self.lengths] if begun else [cell.labels["trained"]]:
            report = REPORTS[kind](at_length(replace(finished, config=config), length))
            values, weights = report.iloc[:, 2], report.iloc[:, 4]
            row = {"length": length, "reports": kind}
            for name, inside in (("near", report["first"] < self.trained), ("far", report["first"] >= self.trained)):
                total = weights[inside].sum()
                row[name] = float((values * weights)[inside].sum() / total) if total else None
            rows.append(row | {f"@{first}": value for first, value in zip(report["first"], values, strict=True)})
        return rows

    def figure(self, table: pd.DataFrame) -> Figure:
        """One row of panels per task, one panel per length: its report by position or distance, one line per curve,
        and dotted the first training of each backbone."""
        canvas = Figure(figsize=(5.4 * len(self.lengths), 4.2 * len(self.tasks)), layout="constrained")
        panels = canvas.subplots(len(self.tasks), len(self.lengths), squeeze=False, sharey="row")
        for row, task in zip(panels, self.tasks, strict=True):
            for panel, length in zip(row, self.lengths, strict=True):
                self._panel(panel, table[(table.task == task) & (table.length == length)], task, length)
        canvas.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return canvas

    def _panel(self, panel: Axes, rows: pd.DataFrame, task: str, length: int) -> None:
        kind = self.tasks[task]["reports"]
        ranges = [column for column in map(str, rows) if column.startswith("@")]
        if kind == "bits":  # the first few bytes of a window would hide the rest
            ranges = [column for column in ranges if int(column[1:]) >= SHOWN_FROM]
        for i, name in enumerate(self.curves):
            for extended, style in ((True, "-"), (False, ":")):
                lines = rows[(rows.curve == name) & ((rows.trained == length) == extended)][ranges].mean().dropna()
                if len(lines):
                    at = [int(str(column)[1:]) for column in lines.index]
                    label = name if extended else f"{name}, not extended"
                    panel.plot(at, lines, style, color=COLOURS[i], marker=MARKERS[i], ms=4, label=label)
        panel.set_xscale("log", base=2)
        panel.set(title=f"{task}, windows of {length}")
        panel.set(xlabel="position in the window" if kind == "bits" else "distance to the key")
        panel.set(ylabel="bits per byte" if kind == "bits" else "fraction of answers recalled")
        panel.axvline(self.trained, color="grey", lw=0.8)
        panel.grid(alpha=0.3)

    def verdict(self, table: pd.DataFrame) -> Verdict:
        """From the longest windows of the first task, seed by seed."""
        task, length = next(iter(self.tasks)), max(self.lengths)
        done = table[(table.status == "done") & (table.task == task) & (table.trained == length)]
        far = done.pivot(index="seed", columns="curve", values="far")
        pair = far.reindex(columns=self.compared).dropna()
        if len(pair) < 2:
            return Verdict("cannot tell", f"{len(pair)} seeds are too few to compare.", None, self.rule)
        challenger, champion = self.compared
        effect = Estimate.of_mean(pair[champion] - pair[challenger])
        outcome = above(effect, 0.0)
        said = ", ".join(f"{name} {far[name].mean():.3f}" for name in self.curves if name in far)
        sentence = (
            f"From position {self.trained} on, in windows of {length}: {said} bits per byte; {champion} less "
            f"{challenger} is {effect:.3f}."
        )
        for other, settings in self.tasks.items():
            rows = table[(table.status == "done") & (table.task == other) & (table.trained == length)]
            if settings["reports"] == "recall" and len(rows):
                means = rows.groupby("curve", sort=False).far.mean()
                sentence += f" Recall from further away: {', '.join(f'{name} {x:.2f}' for name, x in means.items())}."
        sentence += seeds_to_tell(outcome, effect, 0.0, len(pair))
        return Verdict(outcome, sentence, effect, self.rule)
