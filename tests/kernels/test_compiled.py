"""Every Triton kernel compiles for the GPUs of three generations, in every form that can be chosen, and fits into them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
ROOT = Path(__file__).parents[2]
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a block may have
ALL = [list(SHARED), ["float32", "bfloat16", "float16"], [64, 128, 256]]


@pytest.mark.parametrize(
    ("archs", "dtypes", "sizes"),
    [
        pytest.param([90], ["bfloat16"], [128], id="one of each kernel"),
        pytest.param([80, 100], ["bfloat16"], [256], id="the largest heads on the oldest and the newest"),
        pytest.param(*ALL, id="everything", marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_and_fit_into_shared_memory(archs, dtypes, sizes, record_property):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    arguments = [json.dumps(x) for x in (archs, dtypes, sizes)]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_all.py"), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == (5 + 16 * len(sizes)) * len(archs) * len(dtypes)
    record_property("kernels", rows)
    too_large = [row for row in rows if row["shared_bytes"] > SHARED[row["arch"]]]
    assert too_large == []
    for row in rows:
        print(row)
