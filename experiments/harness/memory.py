"""The largest memory of a run, from its beginning, the preparing of its data included."""

import platform
import re
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reset_peak_memory() -> None:
    """Start a new maximum, so that a run in a long-lived worker reports its own."""
    torch = sys.modules.get("torch")  # where nothing has imported it, nothing is on a GPU
    if torch and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: "torch.device") -> int:
    """Returns the largest memory since the reset: allocated on a GPU, resident for the whole process on a CPU."""
    if device.type == "cuda":
        return sys.modules["torch"].cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0])
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
