"""Overwriting: parts of a corpus, windows by when a run read them, and the verdict from what is left of them."""

import numpy as np
import pandas as pd
import pytest
import torch

from experiments.data.window_parts import part_of_windows
from experiments.harness.assembly import measure, spend
from experiments.harness.data_module import DataModule
from experiments.harness.parts import open_data
from experiments.studies.overwriting import Overwriting, last_read, remembered

LAGS = [0.25, 0.5, 1]
STUDY = Overwriting(
    "c", "s", "r", train_tokens=1, arms={"once": {"epochs": 1}, "often": {"epochs": 2}}, once="once", often="often",
    seeds=[0, 1, 2], lags=LAGS, windows=8,
)  # fmt: skip


def table(once, often=(0.5, 0.5), noise=(0.0, 0.01, -0.01)):
    """Losses where a model remembers so many bits of its own part, by lag, in parts and by models that differ."""
    rows = []
    for arm, memories, sign in (("once", once, 1), ("often", often, -1)):
        for seed, better in enumerate((0.0, 0.3, 0.1)):
            for part, harder in enumerate((0.2, 0.0, 0.5)):
                for lag, memory in zip(LAGS, memories, strict=False):
                    bits = 2.0 - better + harder - (memory + sign * noise[part]) * (seed == part)
                    place = {"arm": arm, "seed": seed, "part": part, "latest": 0.0, "earliest": lag}
                    rows.append(place | {"bits": bits, "bits_per_byte": 2.5 - better, "status": "done"})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("once", "often", "noise", "outcome"),
    [
        ((0.4, 0.2, 0.1), (0.5, 0.5), (0.0, 0.01, -0.01), "holds"),
        ((0.4, 0.3, 0.3), (0.5, 0.5), (0.0, 0.01, -0.01), "does not hold"),  # most is kept
        ((0.4, 0.2, 0.1), (0.5, 0.1), (0.0, 0.01, -0.01), "does not hold"),  # repetition makes it worse
        ((0.4, 0.2, 0.1), (0.5, 0.21), (0.0, 0.01, -0.01), "cannot tell"),  # or may mend it
        ((0.4, 0.2, 0.1), (0.5, 0.5), (0.0, 0.2, -0.2), "cannot tell"),
        ((0.0, 0.0, 0.0), (0.5, 0.5), (0.0, 0.01, -0.01), "cannot tell"),
    ],
)
def test_what_is_left_is_told_from_easy_parts_and_better_seeds(once, often, noise, outcome):
    made = table(once, often, noise)
    verdict = STUDY.verdict(made)
    assert verdict.outcome == outcome and verdict.rule == "r"
    found = remembered(made)
    assert found[(found.arm == "once") & (found.earliest == 0.5)].bits.tolist() == pytest.approx(
        once[1] + np.array(noise)
    )


def test_one_seed_is_too_few():
    assert STUDY.verdict(table((0.4, 0.2, 0.1)).query("seed == 0")).outcome == "cannot tell"


def test_parts_are_disjoint_windows_of_one_corpus(data):
    parts = [part_of_windows(data, 32, 640, part) for part in range(3)]
    rows = [row.tobytes() for part in parts for row in np.asarray(part.train).reshape(20, 32)]
    every = [row.tobytes() for row in data.train[: len(data.train) // 32 * 32].reshape(-1, 32)]
    assert set(rows) <= set(every) and len(set(rows)) == 60
    assert len({part.digest for part in (*parts, data)}) == 4 and parts[0].heldout is data.heldout
    for tokens, part in ((650, 0), (640, 625), (640, -1)):
        with pytest.raises(ValueError, match="must be whole windows of sequence_length=32 within the 12500"):
            part_of_windows(data, 32, tokens, part)


@pytest.mark.parametrize(("epochs", "lags"), [(1, [0.25, 0.5, 1]), (2, [0.25, 0.5])])
def test_windows_by_lag_are_those_that_the_run_was_given(make_config, epochs, lags):
    config = make_config("budget.batch_tokens=128", "data.allow_repeats=true", "seed=3")
    config.data.tokens = {
        "_target_": "experiments.data.window_parts.part_of_windows", "data": config.data.tokens,
        "sequence_length": 32, "train_tokens": 1280 // epochs, "part": 1,
    }  # fmt: skip
    data = open_data(config)
    config.budget.flops = measure(config, data).costs.flops_per_token * 1280
    module = DataModule(data, spend(config, data, measure(config, data)), 3, False, 1)
    given_NT = torch.cat([batch.tokens_BT for batch in module.train_dataloader()])
    found = {earliest: windows_BT for _, earliest, windows_BT in last_read(config, lags, most=1000)}
    assert torch.equal(torch.cat([found[lag] for lag in reversed(lags)]), given_NT[-40 // epochs :])
    assert [len(found[lag]) for lag in lags] == [10, 10, 20][: len(lags)]
    assert len({tuple(row) for row in torch.cat(list(found.values())).tolist()}) == 40 // epochs
    fewer = dict.fromkeys(lags) | {earliest: rows for _, earliest, rows in last_read(config, lags, most=3)}
    assert all(torch.equal(rows[[0, -1]], found[lag][[0, -1]]) and len(rows) == 3 for lag, rows in fewer.items())
