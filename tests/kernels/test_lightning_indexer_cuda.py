"""The lightning indexer in CUDA C++: compiled for Hopper where there is an nvcc, and right on a CPU that stands in for
the GPU."""

import ctypes
import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import lightning_indexer, lightning_indexer_flops
from kernels.indexer import blocks, cuda_operators
from tests.kernels.test_lightning_indexer import assert_as_good, problem, with_ties

EMULATION = Path(__file__).with_name("emulation") / "hopper_on_a_cpu.h"
SHARED = 232_448  # bytes that a block of a Hopper GPU may have


def nvcc() -> str:
    """The compiler that pip has installed, or that of the machine. Skips where there is none."""
    spec = find_spec("nvidia")
    for folder in [] if spec is None else spec.submodule_search_locations:
        if (found := Path(folder) / "cu13" / "bin" / "nvcc").exists():
            return str(found)
    return shutil.which("nvcc") or pytest.skip("nvcc is not here: it is in the test extra on Linux")


def compiled(tmp_path, *arguments):
    """What nvcc says, and the file that it makes."""
    out = tmp_path / "out"
    command = [nvcc(), *cuda_operators.FLAGS, *arguments, "-o", str(out), str(cuda_operators.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, out


@pytest.mark.thorough
def test_it_compiles_for_hopper_without_spills_and_two_blocks_fit(tmp_path):
    said, _ = compiled(tmp_path, "-Xptxas", "-v", "-cubin")
    kernels = re.findall(r"Compiling entry function", said)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", said)]
    assert len(kernels) == len(spills) == len(registers) == 7
    assert set(spills) == {("0", "0", "0")} and max(registers) * 256 * 2 <= 65_536
    assert "warning" not in said


@pytest.mark.thorough
def test_its_products_are_those_of_hoppers_tensor_cores(tmp_path):
    _, ptx = compiled(tmp_path, "-ptx")
    products = re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k16)", ptx.read_text())
    assert {n: products.count(f"m64n{n}k16") for n in (16, 32, 64)} == {16: 12, 32: 12, 64: 12}  # of 64 and 128 numbers


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels as a library for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ makes the stand-in for the GPU")
    out = tmp_path_factory.mktemp("emulation") / "lightning_indexer.so"
    command = [compiler, "-x", "c++", "-std=c++17", "-O2", "-w", "-shared", "-fPIC", "-include", EMULATION]
    done = subprocess.run([*command, "-o", out, cuda_operators.SOURCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return cuda_operators.declared(ctypes.CDLL(str(out)))


@pytest.fixture
def emulated(library, monkeypatch, poisoned):
    """The operator, which takes tensors on the CPU."""
    monkeypatch.setattr(cuda_operators, "build", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=None))
    return lambda q, k, weights, **options: cuda_operators.lightning_indexer(
        q.bfloat16(), k.bfloat16(), weights.float(), options.get("cu_seqlens"), options["topk"], options["causal"]
    )


def rounded(inputs):
    return {name: x.bfloat16().double() if name != "weights" else x.float() for name, x in inputs.items()}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("T", "keys", "causal", "sizes"),
    [
        (1, 1, True, {"heads": 1}),
        (66, 66, True, {"heads": 1, "head_dim": 8}),  # more queries than a block goes through
        (3, 300, True, {"heads": 64, "head_dim": 128}),  # more keys than a block holds
        (9, 140, False, {"heads": 20, "head_dim": 72, "batch": 2}),
        (2, 1100, True, {"heads": 4, "head_dim": 64}),  # more keys than are selected from at a time
    ],
    ids=str,
)
@pytest.mark.parametrize("topk", [5, 300])
def test_on_a_stand_in_it_picks_as_the_reference(T, keys, causal, sizes, topk, emulated):
    for make in (problem, with_ties):
        inputs = rounded(make(T, keys=keys, **{"batch": 1} | sizes))
        assert_as_good(emulated(**inputs, topk=topk, causal=causal), inputs, topk, causal=causal)


@pytest.mark.thorough
@pytest.mark.parametrize("causal", [True, False])
def test_on_a_stand_in_packed_documents_and_blocks_of_queries_are_right(causal, emulated, monkeypatch):
    monkeypatch.setattr(blocks, "SCORES", 1)  # 64 queries at a time
    inputs, cu_seqlens = rounded(with_ties(75, batch=1)), torch.tensor([0, 13, 14, 14, 30, 75])
    got = emulated(**inputs, topk=6, causal=causal, cu_seqlens=cu_seqlens)
    truth = lightning_indexer(
        **{name: x.double() for name, x in inputs.items()}, topk=6, causal=causal, cu_seqlens=cu_seqlens,
        backend="reference",
    )  # fmt: skip
    assert torch.equal(got, truth)


@pytest.mark.thorough
def test_on_a_stand_in_zeros_of_either_sign_are_equal_and_nan_is_worth_least(emulated):
    keys = torch.zeros(1, 7, 8)
    keys[0, :, 0] = torch.tensor([3.0, -1.0, torch.nan, 2.0, torch.inf, -0.0, 1.0])
    q = torch.zeros(1, 1, 1, 8)
    q[..., 0] = 1.0
    for weight, topk, expected in ((1.0, 5, [0, 3, 4, 5, 6]), (-1.0, 3, [1, 5, 6])):
        assert emulated(q, keys, torch.full((1, 1, 1), weight), topk=topk, causal=True)[0, 0].tolist() == expected


@pytest.mark.thorough
def test_its_flops_are_counted_and_the_operator_passes_pytorchs_own_checks(emulated):
    inputs = problem(9, batch=1, head_dim=8)
    with FlopCounterMode(display=False) as counter:
        emulated(**inputs, topk=3, causal=True)
    assert counter.get_total_flops() == lightning_indexer_flops(9, 9, 3, 8)
    q, k, weights = (x.bfloat16() for x in inputs.values())
    arguments = (q, k, weights.float(), None, 3, True)
    torch.library.opcheck(cuda_operators.lightning_indexer, arguments, test_utils=("test_schema", "test_faketensor"))


def test_an_error_of_cuda_is_raised_in_its_words():
    library = SimpleNamespace(lightning_indexer_error=lambda error: b"out of memory")
    cuda_operators.check(library, 0)
    with pytest.raises(RuntimeError, match="CUDA kernels of lightning_indexer: out of memory"):
        cuda_operators.check(library, 2)


@pytest.mark.parametrize(
    ("sizes", "dtype", "words"),
    [
        ({}, torch.float32, "takes bfloat16, up to 64 heads of up to 128 dimensions.*got torch.float32, 3 heads of 8"),
        ({"heads": 65}, torch.bfloat16, "65 heads of 8"),
        ({"head_dim": 136}, torch.bfloat16, "3 heads of 136"),
        ({"head_dim": 12}, torch.bfloat16, "a multiple of 8; got torch.bfloat16, 3 heads of 12"),
        ({}, torch.bfloat16, "is for Hopper GPUs .compute capability 9.0., not for cpu: choose backend='auto'"),
    ],
)
def test_what_it_cannot_take_is_refused_by_name(sizes, dtype, words):
    with pytest.raises(ValueError, match=words):
        lightning_indexer(**{name: x.to(dtype) for name, x in problem(5, **sizes).items()}, topk=3, backend="cuda")


@pytest.mark.thorough
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or "CUDA_HOME" not in os.environ,
    reason="takes a Hopper GPU and a CUDA toolkit",
)
@pytest.mark.parametrize(("T", "keys"), [(1, 5000), (700, 700), (300, 2500)])
def test_on_a_hopper_gpu_it_picks_as_the_reference(T, keys):
    inputs = rounded(problem(T, keys=keys, batch=2, heads=64, head_dim=128))
    on_gpu = {name: x.to("cuda", torch.bfloat16 if name != "weights" else torch.float32) for name, x in inputs.items()}
    assert_as_good(lightning_indexer(**on_gpu, topk=256, backend="cuda"), inputs, 256)
