"""Layers in low precision: their three products read quantised factors, and a model has them where it should."""

from copy import deepcopy

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from archs.adapters import LoRA
from archs.channels.experts import ExpertLinear
from archs.channels.router import Router
from archs.costs import costs
from archs.low_precision import LowPrecision, LowPrecisionExperts, LowPrecisionLinear, product
from archs.number_formats import FORMATS
from archs.visibility import CAUSAL
from experiments.harness.identity import run_of
from experiments.harness.run import execute
from experiments.harness.weights import load_run
from tests.contracts.discovery import LENGTH, names
from tests.contracts.test_backbones import plain, tokens

CONFIGS = "fp8_tiles", "mxfp8", "nvfp4"
every = pytest.mark.parametrize("name", names("arch"))
formats = pytest.mark.parametrize("format", FORMATS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def along_columns(format: str, x: torch.Tensor, weight: bool = False) -> torch.Tensor:
    form = FORMATS[format]
    return form.quantised(x, form.weights if weight else form.activations)


@formats
def test_each_product_reads_both_factors_quantised_along_what_it_sums_over(format):
    x, w, g = random(150, 40), random(36, 40, seed=1), random(150, 36, seed=2)
    x.requires_grad_(), w.requires_grad_()
    y = product(x, w, FORMATS[format])
    y.backward(g)
    with torch.no_grad():
        q = lambda *arguments: along_columns(format, *arguments)  # noqa: E731
        torch.testing.assert_close(y, q(x) @ q(w, True).T)
        torch.testing.assert_close(x.grad, q(g) @ q(w.T, True).T)
        torch.testing.assert_close(w.grad, q(g.T) @ q(x.T).T)
        assert (y - x @ w.T).abs().max() > 1e-3 and (w.grad - g.T @ x).abs().max() > 1e-3


@pytest.mark.parametrize("format", ["fp8_tiles", "nvfp4"])
def test_a_weight_in_square_blocks_is_the_same_numbers_forward_and_backward(format):
    w = random(300, 200)
    assert torch.equal(along_columns(format, w, True), along_columns(format, w.T, True).T)


@formats
def test_numbers_that_a_format_has_are_multiplied_exactly(format):
    x, w = random(4, 32).sign() * 2, random(8, 32, seed=1).sign()
    assert torch.equal(product(x, w, FORMATS[format]), x @ w.T)


def test_experts_quantise_the_tokens_of_each_by_themselves_and_those_without_tokens_get_no_gradient():
    layer = ExpertLinear(3, 40, 24, True, 1)
    nn.init.normal_(layer.bias)
    (low,) = LowPrecision("nvfp4").convert(Blocks(layer)).blocks
    x, counts = random(50, 40).requires_grad_(), torch.tensor([17, 0, 33])
    y = low(x, counts)
    y.backward(random(50, 24, seed=1))
    parts = [product(x[:17], layer.weight[0], low.format) + layer.bias[0]]
    parts += [product(x[17:], layer.weight[2], low.format) + layer.bias[2]]
    assert isinstance(low, LowPrecisionExperts) and torch.equal(y, torch.cat(parts))
    assert low.weight.grad[0].any() and not low.weight.grad[1].any() and low.weight.grad[2].any()


class Blocks(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(layers)


@every
def test_every_linear_layer_of_the_blocks_but_routers_is_converted_and_nothing_else_is_changed(name):
    base = plain(name)
    model = LowPrecision("mxfp8").convert(deepcopy(base))
    low = {n for n, m in model.named_modules() if isinstance(m, LowPrecisionLinear | LowPrecisionExperts)}
    inner = {n for n, m in base.named_modules() if isinstance(m, nn.Linear | ExpertLinear) and n.startswith("blocks.")}
    routers = {f"{n}.linear" for n, m in base.named_modules() if isinstance(m, Router)}
    assert low == inner - routers
    weights, others = base.state_dict(), model.state_dict()
    assert weights.keys() == others.keys() and all(torch.equal(w, others[n]) for n, w in weights.items())
    assert [(r.name, r.role, r.fan_in) for r in model.roles()] == [(r.name, r.role, r.fan_in) for r in base.roles()]
    assert model.flops(LENGTH, CAUSAL) == base.flops(LENGTH, CAUSAL)


@pytest.mark.thorough
@every
def test_it_trains_in_every_backbone_and_the_cost_is_known_on_the_meta_device(name):
    model = LowPrecision("nvfp4").convert(plain(name)).train()
    nn.init.normal_(model.head.weight)
    (model(tokens(2)).square().mean() + sum(model.auxiliary_losses().values())).backward()
    missing = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert missing == {n for n, p in model.named_parameters() if p.grad is None} <= {"time.weight"}
    with torch.device("meta"):
        meta = LowPrecision("nvfp4").convert(plain(name))
    assert costs(meta, LENGTH, 1.0) == costs(model, LENGTH, 1.0)


@pytest.mark.parametrize("name", ["transformer", "gated_delta_hybrid", "mamba2", "qwen3_moe"])
@torch.no_grad()
def test_a_prompt_and_then_token_by_token_equals_one_pass_where_scales_are_of_a_token(name):
    model, x = LowPrecision("mxfp8").convert(plain(name).double()).eval(), tokens(3)
    nn.init.normal_(model.head.weight)
    states, got = model.empty_states(3), []
    for piece in (x[:, :13], *x[:, 13:].split(1, dim=1)):
        hidden, states = model.extend(piece, states)
        got.append(model.logits(hidden))
    # Sums that are rounded otherwise now and then fall on the other side of a middle.
    assert ((torch.cat(got, 1) - model(x)).abs() < 1e-4).double().mean() > 0.9


def test_it_is_the_same_under_autocast():
    layer = LowPrecision("fp8_tiles").convert(Blocks(nn.Linear(40, 24))).blocks[0]
    x = random(5, 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside, half = layer(x), layer(x.bfloat16())
    assert torch.equal(inside, layer(x)) and half.dtype == torch.bfloat16


def test_what_cannot_be_is_refused_in_a_sentence():
    with pytest.raises(
        ValueError, match="low_precision.format='fp6' must be one of fp8_tiles, mxfp8, mxfp8_e5m2, nvfp4"
    ):
        LowPrecision("fp6")
    with pytest.raises(ValueError, match="layers of low precision take no adapters"):
        LoRA(rank=2, alpha=4).adapt(LowPrecision("mxfp8").convert(plain("transformer")))


def test_the_configs_build_what_they_say_and_a_run_has_it_in_its_identity_where_it_is_asked_for(make_config):
    plain_config, *configs = make_config(), *(make_config(f"+low_precision={name}") for name in CONFIGS)
    assert "low_precision" not in plain_config
    assert [instantiate(config.low_precision) for config in configs] == [LowPrecision(name) for name in CONFIGS]
    assert len({run_of(config).id for config in (plain_config, *configs)}) == 4


@pytest.mark.thorough
def test_a_run_in_low_precision_is_read_as_it_was_trained(make_run, data):
    run = make_run("+low_precision=nvfp4", "arch=gated_delta_hybrid")
    row = execute(run, data)
    assert row["status"] == "done", row["error"]
    model = load_run(run.folder, data).model
    low = [m for m in model.modules() if isinstance(m, LowPrecisionLinear)]
    assert low and all(m.format == FORMATS["nvfp4"] for m in low)
    assert row["flops_per_token"] == pytest.approx(
        execute(make_run("arch=gated_delta_hybrid"), data)["flops_per_token"]
    )
