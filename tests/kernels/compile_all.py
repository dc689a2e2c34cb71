"""Compiles Triton kernels for GPUs that need not be there, and prints one JSON object a kernel. A process of its own: what
Triton interprets it cannot compile. Run by test_compiled.py."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.gated_delta_rule import operator
from kernels.gated_delta_rule import triton as gated_delta_rule

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
DATA = {"q", "k", "v", "o", "do", "dv"}
KINDS = {"begins": "*i32", "ends": "*i32", "firsts": "*i32", "dG": "*fp64", "HV": "i32", "H": "i32", "scale": "fp32"}


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


def compile_one(kernel, constants: dict, dtype: str, arch: int, warps: int, stages: int) -> dict:
    signature, constexprs = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            signature[name] = KINDS.get(name, TYPES[dtype] if name in DATA else "*fp32")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"shared_bytes": done.metadata.shared} | usage(done.asm["cubin"])


def gated_delta_rule_kernels(size: int, dtype: str, arch: int):
    """Kernel, constants, warps and stages of a call with heads of this size, as the operator would launch it."""
    BK, BV, warps, stages = operator.blocks_for(size, size, (arch // 10, arch % 10))
    common = {
        "K": size,
        "BK": BK,
        "C": operator.chunk_for(size, size),
        "PRECISION": "tf32x3" if dtype == "float32" else "tf32",
    }
    values = {"V": size, "BV": BV}
    for name, kernel in vars(gated_delta_rule).items():
        if name == "invert_kernel":
            yield kernel, {"P": operator.PART, "C": operator.chunk_for(size, size)}, 1, 3
        elif name.endswith("_kernel"):
            extra = values if "V" in kernel.arg_names else {}
            yield kernel, common | extra, warps, stages


def main(archs: list[int], dtypes: list[str], sizes: list[int]) -> None:
    for arch in archs:
        for dtype in dtypes:
            for size in sizes:
                for kernel, constants, warps, stages in gated_delta_rule_kernels(size, dtype, arch):
                    name = kernel.fn.__name__
                    row = {"kernel": name, "arch": arch, "dtype": dtype, "head": size, "warps": warps}
                    row |= compile_one(kernel, constants, dtype, arch, warps, stages)
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*(json.loads(argument) for argument in sys.argv[1:]))
