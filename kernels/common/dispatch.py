"""The choice of the backend that runs."""

import importlib.util
import logging
import os
from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.common.arguments import is_transformed
from kernels.common.launch import DTYPES
from kernels.common.operation import Operation
from kernels.common.trial import triton_is_right

log = logging.getLogger("kernels")
said: set[tuple[str, str, str]] = set()


def choose_backend(
    operation: Operation, backend: str, backends: Iterable[str], fastest: str, x: Tensor, **sizes: int
) -> str:
    """Return the backend that is asked for.

    For "auto" it is Triton on a GPU, once its kernels for these sizes and this dtype have been right on that very
    device, in output and gradients, against the reference; "torch" on a GPU where they were not; else `fastest`. What
    "auto" takes and why is said once, in the log of "kernels".

    Args:
        operation: whose backend it is.
        backend: "auto" or one of `backends`.
        backends: names to choose from.
        fastest: the one that was measured to be the fastest where Triton does not run.
        x: a tensor of the call, for its device and dtype.
        sizes: of the random problem on which Triton's kernels are tried, as `operation.random_problem` takes them.

    Raises:
        ValueError: for a backend that does not exist, or that cannot run on x.
    """
    backends = list(backends)
    if backend == "auto":
        taken, why = fastest, f"the fastest one measured on {x.device.type}"
        if "triton" in backends and is_for_triton(x):
            taken, why = "torch", "Triton's kernels were not right here"
            if triton_is_right(operation, x.dtype, str(x.device), tuple(sizes.items())):
                taken, why = "triton", f"its kernels were right on {x.device} when tried against the recurrence"
        say(operation.name, taken, why)
        return taken
    if backend not in backends:
        raise ValueError(f"unknown backend {backend!r} for {operation.name}: choose from auto, {', '.join(backends)}")
    if backend == "triton" and not triton_runs(x):
        raise ValueError(
            f"backend 'triton' of {operation.name} cannot run on {x.device.type} tensors here: it takes Triton and a "
            f"CUDA device, or TRITON_INTERPRET=1; choose from auto, {', '.join(b for b in backends if b != 'triton')}"
        )
    return backend


def refuse_transforms(operation: str, backend: str, *tensors: Tensor | None) -> str:
    """Return the backend to ask for: inside torch.func and forward-mode derivatives "torch" where it is "auto".

    Raises:
        ValueError: there for a backend whose operators they cannot see through.
    """
    if backend in ("reference", "torch") or not is_transformed(*tensors):
        return backend
    if backend == "auto":
        return "torch"
    raise ValueError(
        f"backend {backend!r} of {operation} has no torch.func transforms and no forward-mode derivatives: choose "
        "'torch' or 'reference' for them"
    )


@torch.compiler.assume_constant_result  # torch.compile runs it and does not look inside
def say(operation: str, taken: str, why: str) -> None:
    if (operation, taken, why) not in said:
        said.add((operation, taken, why))
        log.info("%s runs on backend %r: %s", operation, taken, why)


def backend_for_transforms(operation: Operation, backend: str) -> str:
    """Return the backend of an operation whose only backend that knows transforms of torch.func is "reference": that
    one for "auto" under a transform (grad, vjp, jvp, vmap) or forward-mode derivatives, else the one asked for.

    Raises:
        ValueError: for another backend by name under a transform; its derivatives would be silently 0.
    """
    if backend == "reference" or not transforms_are_active():
        return backend
    if backend == "auto":
        say(operation.name, "reference", "transforms of torch.func and forward-mode derivatives know no other")
        return "reference"
    raise ValueError(
        f"backend {backend!r} of {operation.name} knows no transforms of torch.func (grad, jvp, vmap) and no "
        "forward-mode derivatives: choose auto or reference"
    )


@torch.compiler.assume_constant_result  # a transform within a compiled function is active while it is traced
def transforms_are_active() -> bool:
    """Return True within a transform of torch.func and within a level of forward-mode derivatives."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def is_for_triton(x: Tensor) -> bool:
    """Return True for a tensor on a GPU, of a dtype that the Triton kernels take, where Triton is installed."""
    return x.is_cuda and x.dtype in DTYPES and triton_runs(x)


def triton_runs(x: Tensor) -> bool:
    """Return True where Triton can run on this tensor: on a GPU, or anywhere in its interpreter
    (TRITON_INTERPRET=1)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (x.is_cuda or interpreted) and importlib.util.find_spec("triton") is not None
