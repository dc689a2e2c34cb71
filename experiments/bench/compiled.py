"""Compiles the Triton kernels for GPUs that need not be there, and says what each takes of one: registers, spills,
shared memory, blocks per multiprocessor.

    python -m experiments.bench.compiled                                # the table results/bench/compiled.md and .json
    python -m experiments.bench.compiled '[[90, "bfloat16", 128]]'      # JSON of other targets, for the tests

A process of its own: what Triton interprets it cannot compile. The kernels are those that calls of the public functions
would launch on such a GPU: forward, backward and decoding. Printed are, as JSON, which of the modules that `import
kernels` took need Triton, the names of all kernels, and one row per compiled kernel.
"""

import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

import kernels  # here, so that it is known what it imports

NEED_TRITON = {name: "triton" in vars(module) for name, module in sys.modules.items() if name.startswith("kernels")}

import pandas as pd  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from experiments.bench.report import markdown  # noqa: E402
from kernels import (  # noqa: E402
    convolution,
    cross_entropy,
    delta,
    delta_step,
    fast_weights,
    grouped,
    indexer,
    sparse,
    state_space,
)
from kernels.common import dispatch, launch  # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TYPES |= {torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.float8_e4m3fn: "fp8e4nv"}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in launch.DTYPES}
MODULES = [module.name for module in pkgutil.walk_packages(kernels.__path__, "kernels.")]
NAMES = sorted(
    f"{module}.{name}"
    for module in MODULES
    if module.endswith(".triton_kernels")
    for name in vars(importlib.import_module(module))
    if name.endswith("_kernel")
)


def launches(call, capability: tuple[int, int]) -> list[dict]:
    """Return what `call` would launch on such a GPU: kernels, their arguments by name, warps and stages."""
    found = []

    def record(kernel, *tensors, grid, warmup, num_warps, num_stages, **named):
        arguments = dict(zip(kernel.arg_names, tensors, strict=False)) | named
        found.append({"kernel": kernel, "arguments": arguments, "num_warps": num_warps, "num_stages": num_stages})

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launch, "capability", lambda x: capability),
        mock.patch.object(dispatch, "triton_runs", lambda x: True),
    ):
        call()
    return found


def compiled(kernel, arguments: dict, arch: int, **options: int):
    """Return a kernel compiled for arguments like these."""
    signature, constants, aligned = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            aligned[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


class Multiprocessor(NamedTuple):
    """Bytes of shared memory and warps of a multiprocessor. Each of these generations has 65,536 registers,
    handed out to warps in units of 256, and room for 32 blocks."""

    shared: int
    warps: int


# CUDA C++ Programming Guide, technical specifications by compute capability; Triton keeps 1 kB of a block.
MULTIPROCESSORS = {
    80: Multiprocessor(167_936, 64),
    90: Multiprocessor(233_472, 64),
    100: Multiprocessor(233_472, 64),
}


def usage(cubin: bytes) -> dict[str, int]:
    """Return registers and spilled bytes per thread (they stand on its stack), as the toolchain's cuobjdump says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", said.stdout)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"]}


def blocks_per_multiprocessor(arch: int, warps: int, registers: int, shared: int) -> int:
    """Return how many blocks of a kernel fit onto a multiprocessor at once."""
    has = MULTIPROCESSORS[arch]
    of_warp = -(-registers * 32 // 256) * 256
    return min(65_536 // (of_warp * warps), has.shared // (shared + 1024), has.warps // warps, 32)


def calls(dtype: torch.dtype, size: int) -> Iterator:
    """Yield calls that together launch every kernel, with heads of this size; as published, those of the state space
    dual form have half as many channels as their state has numbers."""
    many_rows = {"x": torch.zeros(384, size, dtype=dtype, requires_grad=True), "counts": torch.tensor([128, 0, 256])}
    of_gate = {name: torch.zeros(2, requires_grad=True) for name in ("A_log", "dt_bias")}
    of_mixer = of_gate | {"use_qk_l2norm": True}  # norms and gates made where they are read
    capped = {"bias": torch.zeros(5000, requires_grad=True), "soft_cap": 30.0}
    for operation, sizes, changes in (
        (convolution.OPERATION, {"channels": 8}, [{}]),
        (delta.OPERATION, {"heads": 2, "key_heads": 1, "head_dim": size}, [{}, of_mixer]),
        (fast_weights.OPERATION, {"heads": 2, "key_heads": 1, "head_dim": size}, [{}]),
        (
            state_space.OPERATION,
            {"heads": 17, "groups": 1, "head_dim": size // 2, "state_size": size},
            [{}, {"D": None}],
        ),
        (sparse.OPERATION, {"heads": 8, "kv_heads": 1, "head_dim": size, "picked": 64}, [{}]),
        (sparse.LATENT_OPERATION, {"heads": 128, "head_dim": 576, "value_dim": 512, "picked": 64}, [{}]),
        (grouped.OPERATION, {"experts": 3, "width": size, "outputs": 2 * size}, [{}, many_rows]),
        (cross_entropy.OPERATION, {"width": size, "vocabulary": 5000}, [{}, capped]),
    ):
        for change in changes:  # without D, y is in the dtype of x
            inputs = (
                operation.leaves(operation.random_problem(3, batch=1, **sizes), "cpu", dtype, gradients=True) | change
            )

            def train(operation=operation, inputs=inputs):
                operation.on_backend("triton")(**inputs).sum().backward()

            @torch.no_grad()
            def decode(operation=operation, inputs=inputs):
                operation.on_backend("triton")(**inputs)

            yield operation.name, train
            yield operation.name, decode
    inputs = sparse.OPERATION.leaves(
        sparse.OPERATION.random_problem(3, batch=1, heads=8, head_dim=size, picked=64), "cpu", dtype, gradients=True
    )

    @mock.patch("kernels.sparse.triton_operators.names_many", lambda *inputs: False)
    def train_by_pairs():
        sparse.OPERATION.on_backend("triton")(**inputs).sum().backward()

    yield sparse.OPERATION.name, train_by_pairs
    sizes = {"batch": 1, "heads": 2, "key_heads": 1, "head_dim": min(size, 128), "value_dim": min(size, 128)}
    step = delta_step.OPERATION
    for change in ({}, {"a": None, "A_log": None, "dt_bias": None}):
        inputs = step.leaves(step.random_problem(1, **sizes), "cpu", dtype, gradients=False) | change
        yield step.name, partial(step.run, **inputs, backend="triton")
    yield from picks(dtype, size)


def picks(dtype: torch.dtype, size: int) -> Iterator:
    """Yield calls of the lightning indexer with the heads and the picks of DeepSeek-V3.2, of one document and of
    several, and in fp8 where the GPU has it."""
    operation = indexer.OPERATION
    problem = operation.random_problem(3, batch=1, heads=64, head_dim=size)
    inputs = operation.leaves(problem, "cpu", dtype, gradients=False)
    packed = torch.tensor([0, 1, 3])
    for causal, cu_seqlens, precision in (
        (True, None, None),
        (False, None, None),
        (True, packed, None),
        (True, None, "fp8"),
    ):

        def pick(causal=causal, cu_seqlens=cu_seqlens, precision=precision):
            if precision is None or launch.capability(inputs["q"]) >= (8, 9):
                options = {"causal": causal, "cu_seqlens": cu_seqlens, "precision": precision}
                indexer.lightning_indexer(**inputs, topk=2048, **options, backend="triton")

        yield operation.name, pick


def rows_of(targets: list[tuple[int, str, int]]) -> Iterator[dict]:
    """Yield one row per different kernel that calls for a target compile: (architecture, dtype, head size)."""
    for arch, dtype, size in targets:
        seen = set()
        for operation, call in calls(DTYPES[dtype], size):
            for found in launches(call, divmod(arch, 10)):
                kernel, options = found["kernel"], {name: found[name] for name in ("num_warps", "num_stages")}
                done = compiled(kernel, found["arguments"], arch, **options)
                if done.hash in seen:
                    continue
                seen.add(done.hash)
                used, shared = usage(done.asm["cubin"]), done.metadata.shared
                blocks = blocks_per_multiprocessor(arch, options["num_warps"], used["registers"], shared)
                row = {"operation": operation, "kernel": f"{kernel.fn.__module__}.{kernel.fn.__name__}", "arch": arch}
                row |= {"dtype": dtype, "head": size, **options, "shared_bytes": shared, **used}
                row |= {"blocks_per_multiprocessor": blocks}
                yield row | {"tensor_memory_columns": getattr(done.metadata, "tmem_size", None) or 0}


TABLE = [(90, "bfloat16", 64), (90, "bfloat16", 128)]
FOUND = Path("results/bench/compiled")


def write_table() -> None:
    """Write the rows of `TABLE` to results/bench/compiled.json, and as a table to compiled.md."""
    rows = list(rows_of(TABLE))
    frame = pd.DataFrame(rows)
    frame["kernel"] = frame["kernel"].str.removeprefix("kernels.").str.replace(".triton_kernels.", "/")
    where = {"triton": triton.__version__, "command": "python -m experiments.bench.compiled"}
    text = f"""Triton {where["triton"]}, compiled ahead of time for compute capability 9.0. `{where["command"]}`

Registers and spilled bytes are those of a thread, shared bytes those of a block; a row per form in which a kernel is
launched, in bfloat16 with heads of 64 and of 128.

{markdown(frame.drop(columns=["arch", "dtype", "operation", "tensor_memory_columns"]))}"""
    FOUND.parent.mkdir(parents=True, exist_ok=True)
    FOUND.with_suffix(".md").write_text(text)
    FOUND.with_suffix(".json").write_text(json.dumps(where | {"rows": rows}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write_table()
    else:
        for said in itertools.chain([NEED_TRITON, NAMES], rows_of(json.loads(sys.argv[1]))):
            print(json.dumps(said), flush=True)
