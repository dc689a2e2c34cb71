"""The benchmark of operations checks before it times, and shows what it found."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments.bench import operations, peers
from kernels import gated_delta_rule

pytestmark = pytest.mark.thorough

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {
    "gated_delta_rule": "batch: 1, heads: 2, key_heads: 1, head_dim: 16",
    "ssd": "batch: 1, heads: 2, head_dim: 16, groups: 1, state_size: 16",
    "causal_conv1d": "batch: 1, channels: 8",
    "sparse_attention": "batch: 1, heads: 2, head_dim: 16, picked: 4",
    "latent_attention": "batch: 1, heads: 2, head_dim: 24, value_dim: 16, picked: 4",
    "grouped_matmul": "batch: 1, experts: 3, width: 16, outputs: 16",
    "linear_cross_entropy": "batch: 1, width: 16, vocabulary: 40",
}
MODES = {
    "gated_delta_rule": ["forward+backward", "decode"],
    "ssd": ["forward", "forward+backward", "decode"],
    "causal_conv1d": ["forward+backward"],
    "sparse_attention": ["forward+backward"],
    "latent_attention": ["forward"],
    "grouped_matmul": ["forward+backward"],
    "linear_cross_entropy": ["forward+backward"],
}
SHAPE = {"batch": 1, "heads": 2, "head_dim": 16}


def test_every_operation_and_mode_is_checked_timed_and_written_down(bench, capsys):
    pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
    races = [
        f"{{operation: {name}, modes: [{','.join(MODES[name])}], lengths: [6], {sizes}}}"
        for name, sizes in SIZES.items()
    ]
    changes = {"rounds": 1, "rotate": 1, "backends": "[torch,triton]", "dtypes": "[float32]"}
    changes[f"races.{DEVICE}"] = f"[{','.join(races)}]"
    path, found, text = bench("kernels=recurrent", *(f"kernels.{name}={value}" for name, value in changes.items()))
    assert path == Path(f"results/bench/recurrent_{DEVICE}.json")
    rows = found["rows"]
    assert {(row["operation"], row["mode"]) for row in rows} == {(name, mode) for name in MODES for mode in MODES[name]}
    for row in rows:
        assert row["ms"] > 0 and (row["side"] == peers.ATTENTION or row["error"] < 1e-5), row
        first = next(r for r in rows if (r["operation"], r["mode"]) == (row["operation"], row["mode"]))
        assert first["side"] == "ours, torch" and row["to ours"] == pytest.approx(row["ms"] / first["ms"])
    assert {"ours, triton", "ours, reference", "transformers"} <= {row["side"] for row in rows}
    assert text.count("\n| ") == len(rows) + 2 and found["date"] in text and text in capsys.readouterr().out


def test_an_unknown_operation_is_refused_by_name(bench, capsys):
    with pytest.raises(SystemExit):
        bench("kernels=recurrent", f"kernels.races.{DEVICE}=[{{operation: conv, modes: [forward]}}]")
    assert "error: no operation 'conv': choose from gated_delta_rule" in capsys.readouterr().err


def test_sides_that_are_wrong_or_fail_are_shown_and_not_timed(monkeypatch):
    wrong = lambda **x: 1.01 * gated_delta_rule(**x)[0]  # noqa: E731
    others = {"wrong": wrong, "broken": lambda **x: x["nothing"]}
    contest = operations.CONTESTS["gated_delta_rule"]._replace(peers=lambda device, decode: others)
    monkeypatch.setitem(operations.CONTESTS, "gated_delta_rule", contest)
    config = OmegaConf.create({"backends": None, "naive_up_to": 0, "rotate": 1, "rounds": 1})
    peaks = {"float32": 1.0, "copy GB/s": 1.0}
    ours, theirs, broken = operations.race(
        "gated_delta_rule", "forward+backward", SHAPE | {"length": 20}, "float32", config, "cpu", peaks
    )
    assert ours["error"] < 1e-5 and ours["ms"] > 0
    assert theirs["error"] == pytest.approx(0.01, rel=0.01) and theirs["ms"] is None
    assert broken["side"] == "broken: KeyError" and broken["ms"] is None


def test_the_race_knows_flops_and_bytes():
    config = OmegaConf.create({"backends": ["torch"], "naive_up_to": 0, "rotate": 1, "rounds": 1})
    peaks = {"float32": 2.0, "copy GB/s": 4.0}
    row = operations.race("ssd", "decode", SHAPE | {"groups": 1, "state_size": 8}, "float32", config, "cpu", peaks)[0]
    seconds = row["ms"] / 1e3
    assert row["TFLOP/s"] == pytest.approx(2 * 2 * 16 * 8 / seconds / 1e12) and row["of matmul"] == row["TFLOP/s"] / 2
    numbers = 2 * 16 + 2 + 2 + 8 + 8 + 2 + 2 * (2 * 16 * 8)  # x, dt, A, B, C, D, and the state twice
    assert row["of copy"] == pytest.approx(4 * numbers / seconds / 1e9 / 4)
