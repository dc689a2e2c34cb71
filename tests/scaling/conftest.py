"""Sweeps made from known laws, so that what the analysis should find is known."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.findings import write_json
from experiments.harness import ledger
from experiments.scaling import analysis, holdout
from experiments.scaling.calibration import PlantedLaw
from experiments.scaling.design import Design

BUDGETS = [1e12, 2e12, 4e12, 8e12]
HOLDOUT = 3.2e13


@dataclass
class Synthetic:
    """A finished sweep in memory: its ledger, its plan, and the held-out nats of each run by id."""

    rows: pd.DataFrame
    plan: dict
    nats: dict[str, np.ndarray]

    @property
    def design(self):
        return Design.from_plan(self.plan)

    def predict(self):
        return holdout.predict(self.rows, self.design, "2026-01-01T00:00:00+0000")

    def analyse(self, predict=False):
        return analysis.analyse(self.rows, self.design, self.predict() if predict else None)

    def write(self, folder):
        """Write the folder that a sweep leaves behind, with a prediction where the plan has a held-out budget."""
        folder.mkdir(parents=True)
        lines = [json.dumps(row) + "\n" for row in json.loads(self.rows.to_json(orient="records"))]
        (folder / "ledger.jsonl").write_text("".join(lines))
        write_json(folder / "plan.json", self.plan)
        write_json(folder / "prediction.json", self.predict())
        for name, nats in self.nats.items():
            (folder / "cells" / name).mkdir(parents=True)
            np.save(folder / "cells" / name / "heldout_nats.npy", nats)
        return folder


def make(laws, noise=0.0, seed=0, sizes=6, kinds=("tune", "fit", "holdout"), shift=0.0, seeds=1):
    """laws by arm -> runs that follow them with normal errors of ln(loss), sizes evenly about N = sqrt(C / 120).

    shift: of the fitted sizes in ln N. Tuning runs lie on a parabola in the log of the rate about 0.01.
    """
    rng = np.random.default_rng(seed)
    cells, rows, nats = [], [], {}
    for arm, law in laws.items():
        law = PlantedLaw(**law)
        wanted = [("fit", budget, np.linspace(-1.3, 1.3, sizes), 0.01) for budget in BUDGETS] * seeds
        wanted += [("holdout", HOLDOUT, np.linspace(-0.7, 0.7, 3), 0.01)]
        wanted += [("tune", BUDGETS[i], np.zeros(1), rate) for i in (0, 3) for rate in (0.005, 0.01, 0.02)]
        for number, (kind, budget, offsets, rate) in enumerate(wanted):
            for size, offset in enumerate(offsets):
                offset = offset + (shift if kind == "fit" else 0.0)
                params = round(math.sqrt(budget / 120) * math.exp(offset))
                tokens = round(budget / 6 / params)
                loss = law.loss(params, tokens) * math.exp(0.05 * math.log(rate / 0.01) ** 2)
                loss *= math.exp(rng.normal(0, noise) if noise else 0)
                name = f"{len(cells):012x}"
                cells.append({"kind": kind, "arm": arm, "flops": budget, "tokens": tokens})
                if kind in kinds:
                    rows.append(dict.fromkeys(ledger.COLUMNS) | {
                        "id": name, "status": "done", "kind": kind, "arm": arm, "arch": arm, "objective": "o",
                        "budget_flops": budget, "flops": budget, "flops_6nd": 0.9 * budget, "params_total": params,
                        "width": 8, "tokens": tokens, "learning_rate": rate,
                        "seed": number + 100 * size if kind == "fit" else 0,
                        "bits_per_byte": loss, "bits_per_byte_se": 0.0, "bits_per_byte_kind": law.kind,
                        "wall_seconds": 10.0, "train_seconds": 9.0, "tokens_per_second": 1e4,
                        "peak_memory_bytes": 1e9, "state_bytes": 1e5, "mfu": 0.1, "device": "test",
                        "versions": {"torch": "2"},
                    })  # fmt: skip
                    nats[name] = rng.normal(loss * math.log(2) * 128, 5, 64)
    plan = {
        "name": "synthetic", "arms": list(laws), "budgets": BUDGETS, "holdout_budget": HOLDOUT, "cells": cells,
        "commands": ["python -m experiments.sweep"], "prior": {},
        "corpus": {"name": "none", "digest": "0", "train_tokens": 10**9, "heldout_bytes": 64 * 128},
    }  # fmt: skip
    return Synthetic(pd.DataFrame(rows, columns=ledger.COLUMNS), plan, nats)


@pytest.fixture(scope="session")
def make_sweep():
    return make


@pytest.fixture(scope="session")
def reported(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a finished sweep of three arms with its report, to be read only, and the lines that sum it up."""
    arms = {"reference": {}, "new": {"multiplier": 1.5}, "masked": {"E": 2.2, "kind": "bound"}}
    from experiments.report import report

    folder = make(arms, noise=0.002).write(tmp_path_factory.mktemp("sweep") / "reported")
    return folder, report.write(folder)
