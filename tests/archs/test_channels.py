"""The dense channel mixer against its formulas."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.channels.mlp import MLP


def x_BTD(T=5, width=12):
    return 4 * torch.randn(2, T, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


ACTIVATIONS = {
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "relu2": lambda x: torch.where(x > 0, x, 0) ** 2,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_computes_its_formula(activation, gated, bias):
    torch.manual_seed(0)
    mlp, x = MLP(12, activation=activation, gated=gated, hidden=20, bias=bias).double(), x_BTD()
    biases = [mlp.gate_up.bias, mlp.out_proj.bias] if bias else [0, 0]
    hidden = x @ mlp.gate_up.weight.T + biases[0]
    first, second = hidden[..., :20], hidden[..., 20:]
    act = ACTIVATIONS[activation](first)
    truth = (act * second if gated else act) @ mlp.out_proj.weight.T + biases[1]
    torch.testing.assert_close(mlp(x), truth)


def test_the_clamped_silu_cuts_gate_and_up_where_gpt_oss_does():
    mlp = MLP(1, activation="clamped_silu", gated=True, hidden=1).double()
    with torch.no_grad():
        for p in mlp.parameters():
            p.fill_(1)
    for x, gate, up in ((3.0, 3.0, 4.0), (9.0, 7.0, 8.0), (-9.0, -9.0, -6.0)):
        expected = gate / (1 + math.exp(-1.702 * gate)) * up
        assert mlp(torch.tensor([[[x]]], dtype=torch.float64)).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({"expansion": 4.0}, 256),
        ({"expansion": 8 / 3}, 170),
        ({"expansion": 8 / 3, "multiple_of": 32}, 192),
        ({"expansion": 0.1, "multiple_of": 8}, 8),
        ({"hidden": 77}, 77),
    ],
)
def test_the_hidden_width_is_given_or_follows_the_width(options, hidden):
    assert MLP(64, activation="silu", gated=True, **options).out_proj.in_features == hidden


@pytest.mark.parametrize("gated", [False, True])
def test_counted_flops_are_those_that_pytorch_counts(gated):
    with torch.device("meta"):
        mlp, x = MLP(12, activation="silu", gated=gated, hidden=20, bias=True), torch.zeros(1, 7, 12)
    with FlopCounterMode(display=False) as counter:
        mlp(x)
    assert mlp.flops(7) == counter.get_total_flops() > 0
    assert mlp.inactive_params == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "swish", "hidden": 4}, "activation 'swish' is not known: choose one of .*'silu'"),
        ({"activation": "clamped_silu", "gated": False, "hidden": 4}, "set gated to true"),
        ({}, "expansion None and hidden None: give one"),
        ({"expansion": 2.0, "hidden": 4}, "expansion 2.0 and hidden 4: give one"),
        ({"expansion": 0.01}, "hidden width of 0 at width 12"),
    ],
)
def test_settings_that_cannot_be_built_say_why(options, words):
    with pytest.raises(ValueError, match=words):
        MLP(12, **{"activation": "silu", "gated": True} | options)
