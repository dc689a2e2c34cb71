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

from kernels.causal_conv1d import operator as conv
from kernels.causal_conv1d import triton as conv_kernels
from kernels.gated_delta_rule import operator as delta
from kernels.gated_delta_rule import triton as delta_kernels
from kernels.ssd import operator as ssd
from kernels.ssd import triton as ssd_kernels

TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
# Arguments in the dtype of the data; all else is float32 or as below.
DELTA_DATA = {"q", "k", "v", "o", "do", "dv"}
CONV_DATA = {"x", "y", "dy", "dx", "state", "weight", "bias", "final", "dfinal", "dstate"}
SSD_DATA = {"x", "B", "C", "a", "b", "dx", "dy"}  # y is float32 or the data's, dy too
KINDS = {"begins": "*i32", "ends": "*i32", "firsts": "*i32", "sequences": "*i32", "cu": "*i64"}
KINDS |= {"T": "i32", "HV": "i32", "H": "i32", "G": "i32", "C": "i32", "scale": "fp32"}


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


def compile_one(kernel, data: set, constants: dict, dtype: str, arch: int, warps: int, stages: int) -> dict:
    signature, constexprs = {}, {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], constexprs[name] = "constexpr", constants[name]
        else:
            signature[name] = TYPES[dtype] if name in data else KINDS.get(name, "*fp32")
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"shared_bytes": done.metadata.shared} | usage(done.asm["cubin"])


def gated_delta_rule_kernels(size: int, dtype: str, arch: int):
    """Kernel, constants, warps and stages of a call with heads of this size, as the operator would launch it."""
    blocks = [delta.blocks_for(size, size, (arch // 10, arch % 10), backward) for backward in (False, True)]
    BK, BV = blocks[0][:2]
    C = delta.chunk_for(size, size)
    common = {"K": size, "BK": BK, "C": C, "PRECISION": "tf32x3" if dtype == "float32" else "tf32"}
    values = {"V": size, "BV": BV}
    for name, kernel in vars(delta_kernels).items():
        if name == "steps_kernel":
            yield kernel, {"K": size, "V": size, "BK": size, "BV": 16}, 1, 3
        elif name == "invert_kernel":
            yield kernel, {"P": delta.PART, "C": C}, 1, 3
        elif name.endswith("_kernel"):
            extra = values if "V" in kernel.arg_names else {}
            warps, stages = blocks["gradient" in name][2:]
            yield kernel, common | extra, warps, stages if "firsts" in kernel.arg_names else 1


def ssd_kernels_of(size: int, dtype: str, arch: int):
    """The same for heads of half as many channels as their state has numbers, as published."""
    P, N = size // 2, size
    BP, BN, warps, stages = ssd.blocks_for(P, N, (arch // 10, arch % 10))
    every = {
        "P": P,
        "N": N,
        "BP": BP,
        "BN": BN,
        "L": ssd.CHUNK,
        "PRECISION": "tf32x3" if dtype == "float32" else "tf32",
    }
    passed = {"SIZE": P * N, "BLOCK": ssd.PASSED, "L": ssd.CHUNK}
    for name, kernel in vars(ssd_kernels).items():
        if name == "steps_kernel":
            yield kernel, {"P": P, "N": N, "BP": 16, "BN": N}, 1, 3
        elif name == "pass_kernel":
            yield kernel, passed | {"REVERSE": True}, 4, 3
        elif name.endswith("_kernel"):
            yield kernel, every | ({"READ": True} if "READ" in kernel.arg_names else {}), warps, stages


def causal_conv1d_kernels():
    """The same for four taps with bias and activation; block sizes do not depend on anything."""
    every = {"W": 4, "BW": 4, "BIAS": True, "SILU": True, **conv.BLOCK}
    for name, kernel in vars(conv_kernels).items():
        if name.endswith("_kernel"):
            yield kernel, {key: value for key, value in every.items() if key in kernel.arg_names}, 4, 3


def main(archs: list[int], dtypes: list[str], sizes: list[int]) -> None:
    for arch in archs:
        for dtype in dtypes:
            forms = [("causal_conv1d", None, CONV_DATA, *form) for form in causal_conv1d_kernels()]
            for size in sizes:
                calls = gated_delta_rule_kernels(size, dtype, arch)
                forms += [("gated_delta_rule", size, DELTA_DATA, *form) for form in calls]
                forms += [("ssd", size, SSD_DATA, *form) for form in ssd_kernels_of(size, dtype, arch)]
            for operation, size, data, kernel, constants, warps, stages in forms:
                row = {"operation": operation, "kernel": kernel.fn.__name__, "arch": arch, "dtype": dtype}
                row |= {"head": size, "warps": warps}
                row |= compile_one(kernel, data, constants, dtype, arch, warps, stages)
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*(json.loads(argument) for argument in sys.argv[1:]))
