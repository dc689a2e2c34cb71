"""Fixtures of the tests of Triton kernels: a device to run on and poisoned memory."""

import pytest
import torch


@pytest.fixture
def triton_device() -> str:
    """A GPU where there is one; else the CPU, with Triton's interpreter. Skips where Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel is to fill starts as NaN, so that what it leaves out shows."""
    for name, make in (("empty", torch.empty), ("empty_like", torch.empty_like)):

        def poison(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poison)
