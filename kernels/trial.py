"""Random problems for each operation, how far a backend is off on them, and whether Triton's kernels may be trusted here."""

import functools
import importlib
import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger("kernels")

KEPT = ("g", "beta", "dt", "A", "initial_state", "initial_states")  # what models keep in float32
# Root of the mean square of an error as a part of that of the truth: what rounding stays below by far and a bug does not.
WRONG = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
TOKENS = 130  # two chunks and a bit


def _delta_inputs(
    T: int, batch: int, heads: int, head_dim: int, key_heads: int | None = None, value_dim: int | None = None
) -> dict[str, Tensor]:
    normal = partial(torch.randn, dtype=torch.float64)
    K, V = head_dim, value_dim or head_dim
    q, k = (F.normalize(normal(batch, T, key_heads or heads, K), dim=-1) for _ in range(2))
    rate = torch.rand(2, batch, T, heads, dtype=torch.float64)
    inputs = {"q": q, "k": k, "v": normal(batch, T, heads, V), "g": -rate[0], "beta": rate[1]}
    return inputs | {"initial_state": normal(batch, heads, K, V)}


def _ssd_inputs(T: int, batch: int, heads: int, head_dim: int, groups: int, state_size: int) -> dict[str, Tensor]:
    normal = partial(torch.randn, dtype=torch.float64)
    return {
        "x": normal(batch, T, heads, head_dim),
        "dt": torch.rand(batch, T, heads, dtype=torch.float64),
        "A": -torch.rand(heads, dtype=torch.float64),
        "B": normal(batch, T, groups, state_size) * state_size**-0.5,
        "C": normal(batch, T, groups, state_size),
        "D": normal(heads),
        "initial_states": normal(batch, heads, head_dim, state_size),
    }


def _conv_inputs(T: int, batch: int, channels: int, taps: int = 4) -> dict[str, Tensor]:
    shapes = {"x": (batch, T, channels), "weight": (channels, taps), "bias": (channels,)}
    shapes["initial_state"] = (batch, taps - 1, channels)
    return {name: torch.randn(size, dtype=torch.float64) for name, size in shapes.items()}


INPUTS = {"gated_delta_rule": _delta_inputs, "ssd": _ssd_inputs, "causal_conv1d": _conv_inputs}


def on_backend(operation: str, backend: str) -> Callable[..., Tensor]:
    """The outputs of an operation as a function of its inputs by name."""
    run = getattr(importlib.import_module(f"kernels.{operation}"), operation)
    return lambda **inputs: run(**inputs, backend=backend)[0]


def leaves(inputs: dict[str, Tensor], device: str, dtype: torch.dtype, gradients: bool) -> dict[str, Tensor]:
    exact = torch.promote_types(dtype, torch.float32)
    tensors = {name: x.to(device, exact if name in KEPT else dtype) for name, x in inputs.items()}
    return {name: x.detach().requires_grad_(gradients) for name, x in tensors.items()}


def error_of(
    side: Callable[..., Tensor],
    operation: str,
    inputs: dict[str, Tensor],
    device: str,
    dtype: torch.dtype,
    gradients: bool,
) -> float:
    """How far a side is off the recurrence in float64, in its output and, if `gradients`, in the gradient of every input,
    whichever is worse. Inputs are rounded to `dtype` before the truth is computed: only what the side does is seen."""
    low = leaves(inputs, device, dtype, gradients)
    found = []
    for run, given in ((side, low), (on_backend(operation, "reference"), leaves(low, "cpu", torch.float64, gradients))):
        with torch.set_grad_enabled(gradients):
            o = run(**given)
            weight = torch.cos(torch.arange(o.numel(), device=o.device, dtype=torch.float64)).view(o.shape).to(o.dtype)
            results = [o, *(torch.autograd.grad(o, list(given.values()), weight) if gradients else ())]
        found.append([x.detach().cpu().double() for x in results])
    return max(((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in zip(*found, strict=True))


@torch.compiler.assume_constant_result  # torch.compile runs it and does not look inside
def triton_is_right(operation: str, dtype: str, device: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    """Whether the Triton kernels of an operation, of this dtype and these sizes, are right on this device: tried once."""
    return _tried(operation, dtype, device, sizes)


@functools.cache
def _tried(operation: str, dtype: str, device: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    autocast = torch.autocast(torch.device(device).type, enabled=False)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), autocast:
        torch.manual_seed(0)
        try:
            inputs = INPUTS[operation](TOKENS, batch=1, **dict(sizes))
            error = error_of(on_backend(operation, "triton"), operation, inputs, device, getattr(torch, dtype), True)
        except Exception as failure:
            log.warning("the Triton kernels of %s failed on %s: %r", operation, device, failure)
            return False
    if not error <= WRONG[getattr(torch, dtype)]:
        log.warning(
            "the Triton kernels of %s are wrong on %s: error %.1e, %s %s", operation, device, error, dtype, dict(sizes)
        )
        return False
    return True
