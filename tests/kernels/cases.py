"""The operations as their tests see them: small problems, one way to run them, and the rule of error."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import (
    causal_conv1d_flops,
    convolution,
    delta,
    delta_rule_flops,
    fast_weights,
    gated_delta_rule_flops,
    ssd_flops,
    state_space,
)
from kernels.common.operation import Operation

ROWS = 64  # of a tensor that are judged by themselves


class Case(NamedTuple):
    """An operation under test.

    Attributes:
        operation: itself.
        sizes: of a small problem, as `operation.random_problem` takes them.
        chunk: tokens of a chunk of the Triton kernels; None where there are none.
        state: the argument that is the state to begin with.
        options: of the public function, so that it returns the final state.
        flops: tokens and sizes -> forward FLOPs of one sequence.
    """

    operation: Operation
    sizes: dict[str, int]
    chunk: int | None
    state: str
    options: dict[str, bool]
    flops: Callable[..., int]

    def problem(self, T: int, *, batch: int = 1, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Random inputs in float64."""
        generator = torch.Generator().manual_seed(seed)
        return self.operation.random_problem(T, batch=batch, **self.sizes | sizes, generator=generator)

    def part(self, inputs: dict[str, Tensor], tokens: slice, state: Tensor) -> dict[str, Tensor]:
        """The inputs of some of the tokens, going on from a state."""
        T = next(iter(inputs.values())).shape[1]
        parts = {name: x[:, tokens] if x.dim() > 2 and x.shape[1] == T else x for name, x in inputs.items()}
        return parts | {self.state: state}


DELTA = Case(
    delta.OPERATION,
    {"heads": 1, "key_heads": 1, "head_dim": 32, "value_dim": 16},
    64,
    "initial_state",
    {"output_final_state": True},
    lambda T, heads, key_heads, head_dim, value_dim: gated_delta_rule_flops(T, heads, head_dim, value_dim),
)
SSD = Case(
    state_space.OPERATION,
    {"heads": 1, "groups": 1, "head_dim": 16, "state_size": 32},
    128,
    "initial_states",
    {"return_final_states": True},
    lambda T, heads, groups, head_dim, state_size: ssd_flops(T, heads, groups, head_dim, state_size),
)
CONVOLUTION = Case(
    convolution.OPERATION,
    {"channels": 6, "taps": 4},
    64,
    "initial_state",
    {},
    lambda T, channels, taps: causal_conv1d_flops(T, channels, taps),
)
FAST_WEIGHTS = Case(
    fast_weights.OPERATION,
    {"heads": 1, "key_heads": 1, "head_dim": 16, "value_dim": 32},
    64,
    "initial_state",
    {"output_final_state": True},
    lambda T, heads, key_heads, head_dim, value_dim: delta_rule_flops(T, heads, head_dim, value_dim, per_channel=True),
)
CASES = [DELTA, SSD, CONVOLUTION, FAST_WEIGHTS]
IN_TRITON = [case for case in CASES if case.chunk is not None]


def run(
    case: Case,
    inputs: dict[str, Tensor | None],
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options,
) -> dict[str, Tensor]:
    """Outputs, final state and every gradient of a random projection of both, of inputs in `dtype` or as they are."""
    leaves = {
        name: x if x is None else x.detach().to(device, dtype or x.dtype).requires_grad_() for name, x in inputs.items()
    }
    y, state = case.operation.run(**leaves, **case.options, backend=backend, **options)
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=rng, dtype=torch.float64).to(x) for x in (y, state)]
    used = {name: x for name, x in leaves.items() if x is not None}
    loss = (y * weights[0]).sum() + (state * weights[1]).sum()
    gradients = zip(used, torch.autograd.grad(loss, used.values(), allow_unused=True), strict=True)
    found = {"y": y, "state": state} | {f"d{name}": x for name, x in gradients if x is not None}
    return {name: x for name, x in found.items() if x.numel()}


def assert_equal(got: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Equal but for rounding in float64."""
    assert got.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(got[name], truth[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def assert_triton_is_right(case: Case, device: str, exact: dict, dtype=torch.float32, **options) -> None:
    """Triton's kernels on inputs in `dtype`, those that models keep in float32 apart, obey the rule of error. The truth
    is that of the exact inputs: what rounding these costs is an error of every version."""
    got, plain, truth = triton_beside_plain(case, device, exact, dtype, **options)
    # Products of float32 are three of TF32 parts, which together keep 22 of its 24 bits: four times the rounding error.
    assert_within_twice(got, plain, truth, 8 if dtype == torch.float32 else 2)


def triton_beside_plain(case: Case, device: str, exact: dict, dtype: torch.dtype, **options) -> tuple[dict, list, dict]:
    """What Triton's kernels find, what the plain versions do, and the truth; as in `assert_triton_is_right`."""
    truth = run(case, exact, "reference", dtype=torch.float64, **options)
    given = {name: x for name, x in exact.items() if x is not None}
    low = exact | case.operation.leaves(given, "cpu", dtype, gradients=False)
    plain = [run(case, low, backend, **options) for backend in ("reference", "torch")]
    on = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return run(case, low, "triton", device, **on), plain, truth


def tiles_of(x: Tensor) -> list[Tensor]:
    """Every 64 rows of a tensor, and its last 64: of one row alone the error may be a number's luck."""
    rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
    return [*(rows[n : n + ROWS] for n in range(0, len(rows) - ROWS, ROWS)), rows[-ROWS:]]


def assert_within_twice(got: dict, plain: list[dict], truth: dict, factor: int = 2) -> None:
    """Each tensor errs at most twice as much against float64 as the plain PyTorch versions do in the same dtype, the
    recurrence and the chunked one: its largest error, by flash-attention's rule, which allows the noise of rounding on
    top; and the root of the mean square of every tile of 64 rows, so that a bad tile cannot hide behind a larger one,
    nor errors in half precision behind that noise: only what float32 sums have is allowed there, since what rounding
    the outputs costs is in all versions. The errors of a few numbers (a gradient of one number per head) are a matter
    of luck: they may be twice as large again."""
    assert got.keys() == truth.keys()
    for name, exact in truth.items():
        exact = exact.double()
        noise, of_sums = (2 * (exact.to(dtype) + 0.3 - 0.3 - exact) for dtype in (plain[0][name].dtype, torch.float32))
        assert got[name].isfinite().all(), name
        error, *others = ((x[name].double().cpu() - exact).abs() for x in (got, *plain))
        few = 1 if error.numel() >= 64 else 2
        if few == 2:  # a rounding each, also where the plain versions are exact by chance
            noise, of_sums = (
                x.abs().maximum(2 * torch.finfo(torch.float32).eps * exact.abs()) for x in (noise, of_sums)
            )
        allowed = factor * few * max(x.max() for x in others) + noise.abs().max()
        assert error.max() <= allowed, f"{name}: {error.max():.2e} where {allowed:.2e} is allowed"
        tiles = [tiles_of(x) for x in (error, of_sums, *others)]
        for tile in zip(*tiles, strict=True):
            root, unavoidable, *roots = (x.square().mean().sqrt() for x in tile)
            most = factor * few * max(roots) + unavoidable
            assert root <= most, f"a tile of {name}: {root:.2e} where {most:.2e} is allowed"
