"""Which backend of an operation runs."""

import importlib.util
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.trial import WRONG, triton_is_right

log = logging.getLogger("kernels")
said: set[tuple[str, str, str]] = set()


def choose(operation: str, backend: str, backends: Iterable[str], fastest: str, x: Tensor, **sizes: int) -> str:
    """The backend that is asked for. For "auto" it is Triton on a GPU, where its kernels for these sizes and this dtype have
    first been tried against the recurrence on that very device and were right, in output and gradients; else `fastest`. What
    "auto" takes and why is said once, in the log of "kernels".

    Raises:
        ValueError: for a backend that there is not, or that cannot run on x.
    """
    backends = list(backends)
    if backend == "auto":
        taken, why = fastest, f"the fastest one measured on {x.device.type}"
        if _on_gpu(x):
            dtype = str(x.dtype).removeprefix("torch.")
            taken, why = "torch", "Triton's kernels were not right here"
            if triton_is_right(operation, dtype, str(x.device), tuple(sizes.items())):
                taken, why = "triton", f"its kernels were right on {x.device} when tried against the recurrence"
        _say(operation, taken, why)
        return taken
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r} for {operation}: choose from auto, {', '.join(backends)}")
    if backend == "triton" and not triton_runs(x):
        raise ValueError(
            f"backend 'triton' of {operation} cannot run on {x.device.type} tensors here: it takes Triton and a CUDA "
            f"device, or TRITON_INTERPRET=1; choose from auto, {', '.join(b for b in backends if b != 'triton')}"
        )
    return backend


@torch.compiler.assume_constant_result  # torch.compile runs it and does not look inside
def _say(operation: str, taken: str, why: str) -> None:
    if (operation, taken, why) not in said:
        said.add((operation, taken, why))
        log.info("%s runs on backend %r: %s", operation, taken, why)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in WRONG and triton_runs(x)


def triton_runs(x: Tensor) -> bool:
    """Whether Triton can run on this tensor: on a GPU, or anywhere in its interpreter (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and importlib.util.find_spec("triton") is not None
