"""Every Triton kernel compiles for the GPUs of three generations, in every form that can be chosen, and fits into
them."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
ROOT = Path(__file__).parents[2]
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a block may have


def compile_kernels(targets):
    """Return what `compile_kernels.py` prints: modules, names of kernels, and a row per compiled kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_kernels.py"), json.dumps(targets)],
        capture_output=True, text=True, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    modules, names, *rows = map(json.loads, done.stdout.splitlines())
    return modules, names, rows


@pytest.fixture(scope="module")
def compiled():
    """One of each kernel."""
    return compile_kernels([(90, "bfloat16", 128)])


def test_the_kernels_are_imported_without_triton(compiled):
    modules, _, _ = compiled
    assert "kernels.delta.chunked" in modules and not any(modules.values())


def assert_all_fit(targets, names, rows):
    for target in targets:
        assert sorted({row["kernel"] for row in rows if (row["arch"], row["dtype"], row["head"]) == target}) == names
    assert [row for row in rows if row["shared_bytes"] > SHARED[row["arch"]]] == []


def test_kernels_compile_and_fit_into_shared_memory(compiled, record_property):
    _, names, rows = compiled
    record_property("kernels", rows)
    assert_all_fit([(90, "bfloat16", 128)], names, rows)


@pytest.mark.slow  # minutes
def test_kernels_compile_and_fit_in_every_form(record_property):
    targets = list(itertools.product(SHARED, ["float32", "bfloat16", "float16"], [64, 128, 256]))
    _, names, rows = compile_kernels(targets)
    record_property("kernels", rows)
    assert_all_fit(targets, names, rows)
