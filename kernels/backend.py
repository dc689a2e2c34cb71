"""Which backend of an operation runs."""

import importlib.util
import logging
import os
from collections.abc import Iterable

from torch import Tensor

log = logging.getLogger("kernels")
said: set[tuple[str, str]] = set()


def triton_runs(x: Tensor) -> bool:
    """Whether Triton can run on this tensor: on a GPU, or anywhere in its interpreter (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and importlib.util.find_spec("triton") is not None


def choose(operation: str, backend: str, backends: Iterable[str], fastest: str, x: Tensor) -> str:
    """The backend that is asked for, or for "auto": Triton on a GPU that has it, else `fastest` of the others. What
    "auto" takes is said once, in the log of "kernels".

    Raises:
        ValueError: for a backend that there is not, or that cannot run on x.
    """
    backends = list(backends)
    if backend == "auto":
        backend = "triton" if "triton" in backends and x.is_cuda and triton_runs(x) else fastest
        if (operation, backend) not in said:
            said.add((operation, backend))
            why = (
                "" if backend == "triton" else ": Triton runs on CUDA tensors" if not x.is_cuda else ": no Triton here"
            )
            log.info("%s runs on backend %r for %s tensors%s", operation, backend, x.device.type, why)
        return backend
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r} for {operation}: choose from auto, {', '.join(backends)}")
    if backend == "triton" and not triton_runs(x):
        raise ValueError(
            f"backend 'triton' of {operation} cannot run on {x.device.type} tensors here: it takes Triton and a CUDA "
            f"device, or TRITON_INTERPRET=1; choose from auto, {', '.join(b for b in backends if b != 'triton')}"
        )
    return backend
