"""With a large vocabulary objectives keep no logits, or none in float64, and give the same."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from archs.positions import Rotary
from objectives import likelihood, uniform_diffusion
from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Batch
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.uniform_diffusion import UniformDiffusion

V, T, B = 50, 12, 3
MIXERS = {"attention": partial(Attention, head_dim=8, queries_per_kv=1, position=Rotary())}


OBJECTIVES = {
    "next token": lambda: NextToken(V, V - 1),
    "two tokens ahead": lambda: NextToken(V, V - 1, ahead=2),
    "masked": lambda: MaskedDiffusion(V, V - 1),
    "masked, flat": lambda: MaskedDiffusion(V, V - 1, weighting="flat", timed=True),
    "masked, complementary": lambda: MaskedDiffusion(V, V - 1, complementary=True),
    "blocks": lambda: BlockDiffusion(V, V - 1, 4),
}


def build(name, **options):
    torch.manual_seed(0)
    objective = OBJECTIVES[name]()
    model = LanguageModel(
        objective.model_vocab_size, 16, ["attention"], MIXERS, depth=1, **objective.model_options, **options
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return objective, model


def packed():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(B, T, generator=generator)
    starts = torch.zeros(B, T, dtype=torch.bool)
    starts[:, [0, 5]] = True
    return Batch(torch.randint(V, (B, T), generator=generator), weights.where(weights > 0.4, 0.0), starts)


def both_ways(monkeypatch, measure):
    """What is measured with all logits in memory and without."""
    found = []
    for least in (V + 1, V):
        monkeypatch.setattr(likelihood, "LARGE_VOCABULARY", least)
        found.append(measure())
    return found


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"head_bias": True}], ids=["plain", "tied", "bias"])
def test_loss_and_gradients_equal_those_of_all_logits(name, options, monkeypatch):
    objective, model = build(name, **options)

    def measure():
        loss = objective.loss(model, packed(), torch.Generator().manual_seed(2))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    torch.testing.assert_close(*both_ways(monkeypatch, measure))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_likelihood_equals_that_of_all_logits(name, monkeypatch):
    objective, model = build(name)
    measure = lambda: objective.evaluate(model, packed(), torch.Generator().manual_seed(2)).nats_B  # noqa: E731
    torch.testing.assert_close(*both_ways(monkeypatch, measure))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_as_many_flops_are_counted_forward_and_backward(name, monkeypatch):
    objective, model = build(name)

    def measure():
        with FlopCounterMode(display=False) as counter:
            objective.loss(model, packed(), torch.Generator().manual_seed(2)).backward()
        return counter.get_total_flops()

    with_logits, without = both_ways(monkeypatch, measure)
    assert with_logits == without > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_in_which_nothing_counts_has_a_loss_of_zero(name, monkeypatch):
    objective, model = build(name)
    nothing = Batch(packed().tokens_BT, torch.zeros(B, T))
    assert both_ways(monkeypatch, lambda: objective.loss(model, nothing, torch.Generator()).item()) == [0.0, 0.0]


def test_uniform_diffusion_keeps_no_float64_of_the_logits_and_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    objective = UniformDiffusion(V, V - 1)
    model = LanguageModel(V, 16, ["attention"], MIXERS, depth=1, **objective.model_options)

    def measure():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = objective.loss(model, packed(), torch.Generator().manual_seed(2))
        found = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
        return found, sum(x.numel() for x in kept if x.dtype == torch.float64 and x.shape[-1:] == (V,))

    at_once, in_float64 = measure()
    monkeypatch.setattr(uniform_diffusion, "AT_ONCE", 4 * V)
    by_rows, none = measure()
    torch.testing.assert_close(by_rows, at_once, rtol=0, atol=0)
    assert none == 0 < in_float64
