"""The machine, and what pays on it: threads, precision, compilation, peak arithmetic."""

import functools
import os
import platform
import re
import time
from pathlib import Path

import torch

GRAIN = 32768  # elements that torch gives a thread at least (at::internal::GRAIN_SIZE)
LOOK = 0.1  # seconds
MOST_THREADS = torch.get_num_threads()  # before anything has set it: the cores, or OMP_NUM_THREADS


def best_threads(width: int, tokens: int, processes: int = 1) -> int:
    """Returns the number of threads that pay for a model of this width on so many tokens at a time: those that its
    hidden layers of four times the width give work to, and no more than each process here has free cores, since two
    pools of threads on one core wait for each other (figures in docs/measurements.md)."""
    wanted = min(MOST_THREADS, 4 * width * tokens // GRAIN)
    return max(1, min(wanted, free_cores() // processes)) if wanted > 1 else 1


def free_cores() -> int:
    """Returns the number of cores that nothing runs on at this moment; all, where the system does not say."""
    if not Path("/proc/stat").exists():
        return os.cpu_count() or 1
    before = _idle_ticks()
    time.sleep(LOOK)
    cores = (_idle_ticks() - before) / LOOK / os.sysconf("SC_CLK_TCK")
    return min(len(os.sched_getaffinity(0)), round(cores))


def _idle_ticks() -> int:
    """Clock ticks that all cores together have been idle or waiting for a disk."""
    idle, waiting = Path("/proc/stat").read_text().split("\n", 1)[0].split()[4:6]
    return int(idle) + int(waiting)


def best_precision(device: torch.device, width: int) -> str:
    """ "float32" or "bf16", whichever pays: bf16 on GPUs that have it and on CPUs with AMX from width 256 on. Below
    that the casts cost about what the products save, or more (figures in docs/measurements.md)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    return "bf16" if width >= 256 and torch.cpu._is_amx_tile_supported() else "float32"


def compiling_pays(device: torch.device, flops: float) -> bool:
    """Returns whether a run of so many FLOPs is long enough to win back the compiler's time, which is about 20 to 40 s
    and saves about a quarter of a run."""
    return flops > 200 * peak_flops(device, "float32")


def peak_flops(device: torch.device, precision: str) -> float:
    """Peak FLOP/s, the denominator of model-FLOPs utilisation: the data sheet's figure for GPUs that Lightning
    knows, else the best of a few matrix products, measured here and now with as many threads as there are now."""
    return _peak_flops(device, precision, torch.get_num_threads())


@functools.cache
def _peak_flops(device: torch.device, precision: str, threads: int) -> float:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        from lightning.fabric.utilities.throughput import get_available_flops  # seconds, for nothing on a CPU

        if listed := get_available_flops(device, dtype):
            return float(listed)
    n = 1024 if device.type == "cpu" else 8192
    a, best = torch.randn(n, n, dtype=dtype, device=device), float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def device_name(device: torch.device, processes: int = 1) -> str:
    """The model of GPU or CPU, with the number of threads used of the latter; and how many, where processes share a
    run."""
    if processes > 1:
        return f"{processes} x {device_name(device)}"
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
