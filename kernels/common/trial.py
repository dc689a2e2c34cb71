"""Trials: the error of a backend on a random problem, and whether Triton's kernels may be trusted on this device."""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.common.operation import Operation

log = logging.getLogger("kernels")

# Root mean square of an error as a fraction of that of the truth: what rounding stays far below and a bug does not.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOKENS = 130  # two chunks and a bit


def error_against_reference(
    side: Callable[..., Tensor],
    operation: Operation,
    inputs: dict[str, Tensor],
    device: str,
    dtype: torch.dtype,
    gradients: bool,
) -> float:
    """Return the root mean square error of a side against the reference in float64, as a fraction of that of the truth.

    Of the output and, if `gradients`, of the gradient of every input, the worst counts. Inputs are rounded to `dtype`
    before the truth is computed: only what the side does is seen.
    """
    low = operation.leaves(inputs, device, dtype, gradients)
    exact = operation.leaves(low, "cpu", torch.float64, gradients)
    found = []
    for run, given in ((side, low), (operation.on_backend("reference"), exact)):
        with torch.set_grad_enabled(gradients):
            o = run(**given)
            weight = torch.cos(torch.arange(o.numel(), device=o.device, dtype=torch.float64)).view(o.shape).to(o.dtype)
            leaves = [x for x in given.values() if x.requires_grad]
            found_here = torch.autograd.grad(o, leaves, weight, allow_unused=True) if gradients else ()
            results = [o, *(x for x in found_here if x is not None)]
        found.append([x.detach().cpu().double() for x in results])
    return max(((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(*found, strict=True))


@torch.compiler.assume_constant_result  # torch.compile runs it and does not look inside
def triton_is_right(operation: Operation, dtype: torch.dtype, device: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    """Return True where the Triton kernels of an operation, of this dtype and these sizes, are right on this device.
    They are tried once."""
    return _tried(operation, dtype, device, sizes)


@functools.cache
def _tried(operation: Operation, dtype: torch.dtype, device: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    with torch.inference_mode(False), torch.autocast(torch.device(device).type, enabled=False):
        inputs = operation.random_problem(TOKENS, batch=1, **dict(sizes), generator=torch.Generator().manual_seed(0))
        try:
            side = operation.on_backend("triton")
            error = error_against_reference(side, operation, inputs, device, dtype, operation.differentiable)
        except Exception as failure:
            log.warning("the Triton kernels of %s failed on %s: %r", operation.name, device, failure)
            return False
    if not error <= TOLERANCE[dtype]:
        log.warning(
            "the Triton kernels of %s are wrong on %s: error %.1e, %s %s",
            operation.name, device, error, dtype, dict(sizes),
        )  # fmt: skip
        return False
    return True
