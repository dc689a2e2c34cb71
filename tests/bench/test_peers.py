"""Peers are called by their own conventions, told by stand-ins that keep them."""

import os
import sys
from types import ModuleType

import pytest
import torch

from experiments.bench import peers
from kernels import delta, gated_delta_rule

SIZES = {"batch": 2, "key_heads": 1, "heads": 2, "head_dim": 8}


@pytest.fixture
def asked(monkeypatch):
    """Stand-ins for the libraries of a GPU -> who was asked, and with which dispatch of flash-linear-attention."""
    calls = []

    def keyword(name):
        def chunk_gated_delta_rule(q, k, v, g, beta, initial_state, output_final_state):
            calls.append((name, os.environ.get("FLA_FLASH_QLA")))
            return gated_delta_rule(q, k, v, g, beta, backend="reference")

        return chunk_gated_delta_rule

    def packed(q, k, v, g=None, beta=None, cu_seqlens=None):
        assert q.dim() == 3 and g.dtype == beta.dtype == torch.float32 and cu_seqlens.dtype == torch.int64
        calls.append(("flashinfer", None))
        rows = (x[None] for x in (q, k, v, g.log(), beta))
        return gated_delta_rule(*rows, cu_seqlens=cu_seqlens, backend="reference")[0][0]

    for name, function in (
        ("fla.ops.gated_delta_rule", keyword("fla")),
        ("flash_qla", keyword("flash_qla")),
        ("flashinfer.gdn_prefill", packed),
    ):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, module, ModuleType(module))
        vars(sys.modules[name])["chunk_gated_delta_rule"] = function
    monkeypatch.delenv("FLA_FLASH_QLA", raising=False)
    return calls


@pytest.mark.parametrize(
    ("side", "called"),
    [
        ("flash-linear-attention", ("fla", None)),
        ("flash-linear-attention, FLA_FLASH_QLA=0", ("fla", "0")),
        ("FlashQLA", ("flash_qla", None)),
        ("FlashInfer", ("flashinfer", None)),
    ],
)
def test_a_peer_gets_what_it_takes_and_gives_what_ours_gives(asked, side, called):
    inputs = delta.OPERATION.random_problem(5, **SIZES)
    del inputs["initial_state"]
    inputs = {name: x.float() for name, x in inputs.items()}
    found = peers.delta_peers("cuda", decode=False)[side](**inputs)
    assert asked == [called]
    torch.testing.assert_close(found, gated_delta_rule(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_gradients_through_flashinfer_are_refused(asked):
    inputs = delta.OPERATION.random_problem(5, **SIZES)
    del inputs["initial_state"]
    with pytest.raises(NotImplementedError, match="no gradients"):
        peers.delta_peers("cuda", decode=False)["FlashInfer"](**{k: x.requires_grad_() for k, x in inputs.items()})
