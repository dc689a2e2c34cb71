"""Sweep folders made from known laws, so that what the analysis should find is known."""

import json
import math

import numpy as np
import pytest

from experiments.harness import ledger

BUDGETS = [1e12, 2e12, 4e12, 8e12]
HOLDOUT = 3.2e13
REFERENCE = {"E": 0.0, "level": 3.0, "slope": 0.08, "curvature": 0.05}


def frontier(law, budget):
    return law["level"] * (budget / BUDGETS[0]) ** -law["slope"]


@pytest.fixture
def make_sweep(tmp_path):
    """laws by arm -> a sweep folder whose runs follow them: L = L*(C) (1 + k (ln N - ln N*(C))^2) with noise."""

    def make(laws, noise=0.0, seed=0, sizes=6, kinds=("tune", "fit", "holdout"), shift=0.0):
        rng = np.random.default_rng(seed)
        folder = tmp_path / f"sweep{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        cells, rows = [], []
        for arm, law in laws.items():
            law = REFERENCE | law
            wanted = [("fit", budget, np.linspace(-1.3, 1.3, sizes)) for budget in BUDGETS]
            wanted += [("holdout", HOLDOUT, np.linspace(-0.7, 0.7, 3)), ("tune", BUDGETS[0], np.zeros(3))]
            for kind, budget, offsets in wanted:
                for i, offset in enumerate(offsets):
                    offset = offset + (shift if kind == "fit" else 0.0)
                    params = round(math.sqrt(budget / 120) * math.exp(offset))
                    loss = (
                        frontier(law, budget)
                        * (1 + law["curvature"] * offset**2)
                        * math.exp(rng.normal(0, noise) if noise else 0)
                    )
                    rate = [0.005, 0.01, 0.02][i] if kind == "tune" else 0.01
                    loss += 0.1 if kind == "tune" and rate != 0.01 else 0.0
                    name = f"{len(cells):012x}"
                    row = {column: None for column in ledger.COLUMNS} | {
                        "id": name, "status": "done", "kind": kind, "arm": arm, "arch": arm, "objective": "o", "budget_flops": budget,
                        "flops": budget, "flops_6nd": 0.9 * budget, "params_total": params, "width": 8, "learning_rate": rate,
                        "bits_per_byte": loss, "bits_per_byte_se": 0.0, "bits_per_byte_kind": law.get("kind", "exact"),
                        "wall_seconds": 10.0, "train_seconds": 9.0, "tokens_per_second": 1e4, "peak_memory_bytes": 1e9,
                        "state_bytes": 1e5, "mfu": 0.1, "seed": 0, "device": "test", "versions": {"torch": "2"},
                        "tokens": round(budget / 6 / params),
                    }  # fmt: skip
                    cells.append({"kind": kind, "arm": arm})
                    if kind in kinds:
                        rows.append(row)
                        (folder / "cells" / name).mkdir(parents=True)
                        nats = rng.normal(loss * math.log(2) * 128, 5, 64)
                        np.save(folder / "cells" / name / "heldout_nats.npy", nats)
        (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plan = {
            "name": "synthetic", "arms": list(laws), "budgets": BUDGETS, "holdout_budget": HOLDOUT, "cells": cells,
            "commands": ["python -m experiments.sweep"], "prior": {},
            "corpus": {"name": "none", "digest": "0", "train_tokens": 10**9, "heldout_bytes": 64 * 128},
        }  # fmt: skip
        (folder / "plan.json").write_text(json.dumps(plan))
        return folder

    return make
