"""Which backend of an operation runs."""

import importlib.util
import logging
import os
from collections.abc import Iterable

from torch import Tensor

log = logging.getLogger("kernels")
said: set[tuple[str, str]] = set()


def choose(operation: str, backend: str, backends: Iterable[str], fastest: str, x: Tensor) -> str:
    """The backend that is asked for, or for "auto" the fastest of those that have been measured where x lies. What "auto"
    takes is said once, in the log of "kernels". Triton kernels have to be asked for, until they have run on a GPU.

    Raises:
        ValueError: for a backend that there is not, or that cannot run on x.
    """
    backends = list(backends)
    if backend == "auto":
        if (operation, fastest) not in said:
            said.add((operation, fastest))
            log.info("%s runs on backend %r, the fastest one measured on %s", operation, fastest, x.device.type)
        return fastest
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r} for {operation}: choose from auto, {', '.join(backends)}")
    if backend == "triton" and not triton_runs(x):
        raise ValueError(
            f"backend 'triton' of {operation} cannot run on {x.device.type} tensors here: it takes Triton and a CUDA "
            f"device, or TRITON_INTERPRET=1; choose from auto, {', '.join(b for b in backends if b != 'triton')}"
        )
    return backend


def triton_runs(x: Tensor) -> bool:
    """Whether Triton can run on this tensor: on a GPU, or anywhere in its interpreter (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and importlib.util.find_spec("triton") is not None
