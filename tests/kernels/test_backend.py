"""Backends are chosen by name or said once, and refused where they cannot run."""

import logging
import subprocess
import sys

import pytest
import torch

from kernels import backend
from kernels.backend import choose

X = torch.zeros(1)


def test_what_auto_takes_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(backend, "said", set())
    with caplog.at_level(logging.INFO, "kernels"):
        assert [choose("op", "auto", ["a", "b"], "b", X) for _ in range(3)] == ["b"] * 3
    assert [r.getMessage() for r in caplog.records] == ["op runs on backend 'b', the fastest one measured on cpu"]


def test_a_backend_is_taken_by_name_and_an_unknown_one_refused():
    assert choose("op", "a", ["a", "b"], "b", X) == "a"
    with pytest.raises(ValueError, match="unknown backend 'c' for op: choose from auto, a, b"):
        choose("op", "c", ["a", "b"], "b", X)


def test_triton_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="cannot run on cpu tensors here.*choose from auto, torch"):
        choose("op", "triton", ["torch", "triton"], "torch", X)


def test_the_kernels_are_imported_without_triton():
    code = "import sys, kernels; assert not {m for m in sys.modules if m.startswith('kernels') and 'triton' in m}"
    subprocess.run([sys.executable, "-c", code], check=True)
