"""Compiles the Triton kernels for GPUs that need not be there. A process of its own: what Triton interprets it cannot
compile.

Run by test_compiled.py with a JSON list of [architecture, dtype, head size]. The kernels are those that calls of the
public functions would launch on such a GPU: forward, backward and decoding. Prints JSON: first which of
the modules that `import kernels` took need Triton, then the names of all kernels, then an object per kernel.
"""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import kernels  # here, so that it is known what it imports

NEED_TRITON = {name: "triton" in vars(module) for name, module in sys.modules.items() if name.startswith("kernels")}

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime import JITFunction  # noqa: E402

from kernels import convolution, delta, delta_step, grouped, indexer, state_space  # noqa: E402
from kernels.common import dispatch, launch  # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
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
    """A kernel for arguments like these."""
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


def usage(cubin: bytes) -> dict:
    """Registers and spilled bytes of a thread, where the toolchain's cuobjdump is there to say."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {"registers": found.get("REG"), "stack_bytes": found.get("STACK"), "spilled_bytes": found.get("LOCAL")}


def calls(dtype: torch.dtype, size: int) -> Iterator:
    """Calls that together launch every kernel, with heads of this size; as published, those of the state space dual
    form have half as many channels as their state has numbers."""
    many_rows = {"x": torch.zeros(384, size, dtype=dtype, requires_grad=True), "counts": torch.tensor([128, 0, 256])}
    for operation, sizes, changes in (
        (convolution.OPERATION, {"channels": 8}, [{}]),
        (delta.OPERATION, {"heads": 2, "key_heads": 1, "head_dim": size}, [{}]),
        (
            state_space.OPERATION,
            {"heads": 2, "groups": 1, "head_dim": size // 2, "state_size": size},
            [{}, {"D": None}],
        ),
        (grouped.OPERATION, {"experts": 3, "width": size, "outputs": 2 * size}, [{}, many_rows]),
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
    sizes = {"batch": 1, "heads": 2, "key_heads": 1, "head_dim": min(size, 128), "value_dim": min(size, 128)}
    step = delta_step.OPERATION
    for change in ({}, {"a": None, "A_log": None, "dt_bias": None}):
        inputs = step.leaves(step.random_problem(1, **sizes), "cpu", dtype, gradients=False) | change
        yield step.name, partial(step.run, **inputs, backend="triton")
    yield from picks(dtype, size)


def picks(dtype: torch.dtype, size: int) -> Iterator:
    """Calls of the lightning indexer with the heads and the picks of DeepSeek-V3.2, of one document and of several."""
    operation = indexer.OPERATION
    problem = operation.random_problem(3, batch=1, heads=64, head_dim=size)
    inputs = operation.leaves(problem, "cpu", dtype, gradients=False)
    for causal, cu_seqlens in ((True, None), (False, None), (True, torch.tensor([0, 1, 3]))):

        def pick(causal=causal, cu_seqlens=cu_seqlens):
            indexer.lightning_indexer(**inputs, topk=2048, causal=causal, cu_seqlens=cu_seqlens, backend="triton")

        yield operation.name, pick


def main(targets: list[tuple[int, str, int]]) -> None:
    print(json.dumps(NEED_TRITON))
    print(json.dumps(NAMES))
    for arch, dtype, size in targets:
        seen = set()
        for operation, call in calls(DTYPES[dtype], size):
            for found in launches(call, divmod(arch, 10)):
                kernel, options = found["kernel"], {name: found[name] for name in ("num_warps", "num_stages")}
                done = compiled(kernel, found["arguments"], arch, **options)
                if done.hash in seen:
                    continue
                seen.add(done.hash)
                row = {"operation": operation, "kernel": f"{kernel.fn.__module__}.{kernel.fn.__name__}", "arch": arch}
                row |= {"dtype": dtype, "head": size, **options, "shared_bytes": done.metadata.shared}
                print(json.dumps(row | usage(done.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
