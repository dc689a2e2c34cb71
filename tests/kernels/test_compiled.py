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

triton = pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
ROOT = Path(__file__).parents[2]
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a block may have
COMMITTED = json.loads((ROOT / "results/bench/compiled.json").read_text())
IN_HALF_PRECISION = {"kernels.sparse.triton_kernels.tiles_gradient_kernel"}  # alone: see `names_many`
TENSOR_MEMORY = 512  # columns of a multiprocessor of Blackwell


def compile_kernels(targets):
    """Return what `experiments.bench.compiled` prints: modules, names of kernels, and a row per compiled kernel."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench.compiled", json.dumps(targets)],
        capture_output=True, text=True, cwd=ROOT, env=environment,
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
        expected = set(names) - (IN_HALF_PRECISION if target[1] == "float32" else set())
        assert {row["kernel"] for row in rows if (row["arch"], row["dtype"], row["head"]) == target} == expected
    assert [row for row in rows if row["shared_bytes"] > SHARED[row["arch"]]] == []
    assert [row for row in rows if row["tensor_memory_columns"] > TENSOR_MEMORY] == []


def test_kernels_compile_and_fit_into_shared_memory(compiled, record_property):
    _, names, rows = compiled
    record_property("kernels", rows)
    assert_all_fit([(90, "bfloat16", 128)], names, rows)


def test_the_committed_table_of_registers_and_shared_memory_is_true(compiled):
    if triton.__version__ != COMMITTED["triton"]:
        pytest.skip(f"the table was made with Triton {COMMITTED['triton']}")
    _, _, rows = compiled
    assert rows == [row for row in COMMITTED["rows"] if row["head"] == 128]


def test_no_kernel_spills_at_the_published_head_sizes_but_the_delta_rule_with_norms_and_gates_inside():
    spilled = {(row["kernel"], row["head"]): row["spilled_bytes"] for row in COMMITTED["rows"] if row["spilled_bytes"]}
    rule = "kernels.delta.triton_kernels"
    assert spilled == {
        (f"{rule}.gradients_kernel", 64): 96,
        (f"{rule}.sequences_kernel", 128): 112,
        (f"{rule}.state_gradients_kernel", 128): 32,
        (f"{rule}.gradients_kernel", 128): 168,
    }


@pytest.mark.slow  # minutes
def test_kernels_compile_and_fit_in_every_form(record_property):
    targets = list(itertools.product(SHARED, ["float32", "bfloat16", "float16"], [64, 128, 256]))
    _, names, rows = compile_kernels(targets)
    record_property("kernels", rows)
    assert_all_fit(targets, names, rows)
