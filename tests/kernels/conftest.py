"""Fixtures of the tests of Triton kernels: a device to run on and poisoned memory."""

import pytest
import torch


@pytest.fixture
def triton_device(monkeypatch) -> str:
    """A GPU where there is one; else the CPU, with Triton's interpreter and tensor cores emulated in it. Skips where
    Triton is not installed."""
    pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
    if torch.cuda.is_available():
        return "cuda"
    from tests.kernels.tensor_cores import emulate

    emulate(monkeypatch)
    return "cpu"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that a kernel is to fill starts as NaN, so that what it leaves out shows."""
    for name, make in (("empty", torch.empty), ("empty_like", torch.empty_like)):

        def poison(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poison)
