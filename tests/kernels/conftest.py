"""What the tests of Triton kernels share: a device to run on, poisoned memory and the rule of error."""

import pytest
import torch

TILE = 64


@pytest.fixture
def triton_device() -> str:
    """A GPU where there is one; else the CPU, with Triton's interpreter. Skips where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel is to fill starts as NaN, so that what it leaves out shows."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poison(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poison)


def assert_within_twice(got: dict, plain: list[dict], truth: dict) -> None:
    """Each tensor errs at most twice as much against float64 as the plain PyTorch versions do in the same dtype, the
    recurrence and the chunked one (flash-attention's rule); never less than rounding noise is asked. As a whole, and
    in every tile of 64 rows by the root of its mean square, so that a bad tile cannot hide behind a larger one. The
    largest error of a few numbers (a gradient of one number a head) is a matter of luck: they may err four times as much."""
    for name, exact in truth.items():
        exact = exact.double()
        noise = 2 * (exact.to(plain[0][name].dtype) + 0.3 - 0.3 - exact).abs().max()
        assert got[name].isfinite().all(), name
        error, *others = ((x[name].double().cpu() - exact).abs() for x in (got, *plain))
        factor = 2 if error.numel() >= 64 else 4
        allowed = factor * max(x.max() for x in others) + noise
        assert error.max() <= allowed, f"{name}: {error.max():.2e} where {allowed:.2e} is allowed"
        tiles = [x.flatten(0, -2).split(TILE) if x.dim() > 1 else [x] for x in (error, *others)]
        for mine, *theirs in zip(*tiles, strict=True):
            root, *roots = (x.square().mean().sqrt() for x in (mine, *theirs))
            assert root <= factor * max(roots) + noise, f"a tile of {name}: {root:.2e} {max(roots):.2e}"
