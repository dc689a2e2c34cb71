"""The benchmark of operations checks before it times, and shows what it found."""

import json
import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from experiments import kernel_bench
from kernels import gated_delta_rule

SIZES = {
    "gated_delta_rule": "batch: 1, heads: 2, key_heads: 1, head_dim: 16",
    "ssd": "batch: 1, heads: 2, head_dim: 16, groups: 1, state_size: 16",
    "causal_conv1d": "batch: 1, channels: 8",
}
SHAPE = {"batch": 1, "heads": 2, "head_dim": 16}


def test_every_operation_and_mode_is_checked_timed_and_written_down(tmp_path):
    pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    races = [
        f"{{operation: {name}, modes: [{modes}], lengths: [20], {sizes}}}"
        for name, sizes in SIZES.items()
        for modes in (["forward, forward+backward", "decode"] if name != "causal_conv1d" else ["forward+backward"])
    ]
    changes = [
        "rounds=1",
        "rotate=1",
        "backends=[torch,triton]",
        "dtypes=[float32]",
        f"races.{device}=[{','.join(races)}]",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "kernels=recurrent", f"kernels.out={tmp_path}/found"]
        + [f"kernels.{change}" for change in changes],
        capture_output=True, text=True, env=os.environ | ({} if device == "cuda" else {"TRITON_INTERPRET": "1"}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["rows"]
    assert {(row["operation"], row["mode"]) for row in rows} == {
        ("gated_delta_rule", "forward"), ("gated_delta_rule", "forward+backward"), ("gated_delta_rule", "decode"),
        ("ssd", "forward"), ("ssd", "forward+backward"), ("ssd", "decode"), ("causal_conv1d", "forward+backward"),
    }  # fmt: skip
    for row in rows:
        assert row["ms"] > 0 and (row["side"] == kernel_bench.ATTENTION or row["error"] < 1e-5), row
        first = next(r for r in rows if (r["operation"], r["mode"]) == (row["operation"], row["mode"]))
        assert first["side"] == "ours, torch" and row["to ours"] == pytest.approx(row["ms"] / first["ms"])
    assert {"ours, triton", "ours, reference", "transformers"} <= {row["side"] for row in rows}
    text = (tmp_path / "found.md").read_text()
    assert text.count("\n| ") == len(rows) + 2 and found["date"] in text and text in done.stdout


def test_sides_that_are_wrong_or_fail_are_shown_and_not_timed(monkeypatch):
    wrong = lambda **x: 1.01 * gated_delta_rule(**x)[0]  # noqa: E731
    peers = {"wrong": wrong, "broken": lambda **x: x["nothing"]}
    op = kernel_bench.OPERATIONS["gated_delta_rule"]._replace(peers=lambda device, decode: peers)
    monkeypatch.setitem(kernel_bench.OPERATIONS, "gated_delta_rule", op)
    config = OmegaConf.create({"backends": None, "naive_up_to": 0, "rotate": 1, "rounds": 1})
    peaks = {"float32": 1.0, "copy GB/s": 1.0}
    ours, theirs, broken = kernel_bench.race(
        "gated_delta_rule", "forward+backward", SHAPE | {"length": 20}, torch.float32, config, "cpu", peaks
    )
    assert ours["error"] < 1e-5 and ours["ms"] > 0
    assert theirs["error"] == pytest.approx(0.01, rel=0.01) and theirs["ms"] is None
    assert broken["side"] == "broken: KeyError" and broken["ms"] is None


def test_the_race_knows_flops_and_bytes():
    config = OmegaConf.create({"backends": ["torch"], "naive_up_to": 0, "rotate": 1, "rounds": 1})
    peaks = {"float32": 2.0, "copy GB/s": 4.0}
    row = kernel_bench.race(
        "ssd", "decode", SHAPE | {"groups": 1, "state_size": 8}, torch.float32, config, "cpu", peaks
    )[0]
    seconds = row["ms"] / 1e3
    assert row["TFLOP/s"] == pytest.approx(2 * 2 * 16 * 8 / seconds / 1e12) and row["of matmul"] == row["TFLOP/s"] / 2
    numbers = 2 * 16 + 2 + 2 + 8 + 8 + 2 + 2 * (2 * 16 * 8)  # x, dt, A, B, C, D, and the state twice
    assert row["of copy"] == pytest.approx(4 * numbers / seconds / 1e9 / 4)
