"""The repeated-data experiment: the verdict follows from paired runs, and it runs end to end in seconds."""

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir

from experiments import repeated_data
from experiments.data.token_data import beginning
from tests.conftest import CONFIGS


def rows(losses):
    return pd.DataFrame(
        [
            {
                "objective": o,
                "epochs": e,
                "seed": s,
                "bits_per_byte": x,
                "status": "done",
                "bits_per_byte_kind": "exact",
            }
            for (o, e), xs in losses.items()
            for s, x in enumerate(xs)
        ]
    )


def test_who_is_ahead_is_said_where_the_interval_of_paired_differences_leaves_zero_out():
    table = rows(
        {
            ("a", 1): [3.0, 3.2, 3.4], ("b", 1): [3.1, 3.31, 3.49],  # seeds differ more than objectives do
            ("a", 8): [3.0, 3.2, 3.4], ("b", 8): [2.5, 3.9, 3.1],
            ("a", 64): [4.0, 4.2, 4.1], ("b", 64): [3.0, 3.2, 3.1],
        }
    )  # fmt: skip
    lines = list(repeated_data.verdicts(table, ["a", "b"]))
    assert [line.split(": ")[0] for line in lines] == ["1 epochs", "8 epochs", "64 epochs"]
    assert lines[0].endswith("a is ahead") and lines[1].endswith("cannot tell") and lines[2].endswith("b is ahead")
    summary = repeated_data.summary(table).set_index(["objective", "epochs"])
    assert summary.loc[("a", 1), "mean"] == pytest.approx(3.2)
    assert summary.loc[("a", 1), "reach"] == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)


def test_one_seed_is_too_few():
    lines = list(repeated_data.verdicts(rows({("a", 1): [3.0], ("b", 1): [2.0]}), ["a", "b"]))
    assert lines == ["1 epochs: too few seeds to compare b with a"]


def test_each_run_reads_the_same_beginning_as_often_as_it_says(tmp_path):
    small = [f"root={tmp_path}", "arch.width=16", "data.sequence_length=32", "jobs=1", "repeated.epochs=[1,3]"]
    small += ["repeated.seeds=[0]", "repeated.train_tokens=2048", "optim.batch_tokens=512"]
    small += ["data.tokens.heldout_bytes=2000", f"data.tokens.cache_dir={tmp_path}/cache"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        table = repeated_data.table_of(compose("repeated_data", small), small)
    assert table.status.tolist() == ["done"] * 4
    assert table.epochs.tolist() == [1, 3, 1, 3] and table.tokens.tolist() == [2048, 6144] * 2
    assert table.bits_per_byte_kind.tolist() == ["exact"] * 2 + ["bound"] * 2
    assert len(repeated_data.figure(table).axes[0].containers) == 2


def test_the_beginning_of_data_is_data_of_its_own(data):
    short = beginning(data, 100)
    assert len(short.train) == 100 and short.digest != data.digest and short.heldout is data.heldout
    with pytest.raises(ValueError, match="train_tokens=400001 must be from 1 to the 400000"):
        beginning(data, 400_001)
