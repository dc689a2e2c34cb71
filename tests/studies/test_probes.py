"""Probes and units: what they tell of planted labels, and what the hooks record."""

import numpy as np
import pytest
import torch

from experiments.harness.parts import build_model, build_objective
from experiments.studies.hidden_states import chosen_experts, hidden_states
from experiments.studies.probes import areas_under_roc, best_unit, one_hot, probe, standardised

RNG = np.random.default_rng(0)
OTHER = np.arange(4000) % 2 == 1


def test_the_area_is_the_fraction_of_pairs_in_order_with_ties_counting_half():
    x_NF = RNG.integers(0, 4, (30, 3)).astype(float)
    y_NS = RNG.random((30, 2)) < 0.4
    by_pairs = [[np.mean(np.sign(x[y][:, None] - x[~y][None]) / 2 + 0.5) for y in y_NS.T] for x in x_NF.T]
    assert areas_under_roc(x_NF, y_NS) == pytest.approx(np.array(by_pairs))
    assert np.isnan(areas_under_roc(x_NF, np.ones((30, 1), bool))).all()


def test_a_planted_unit_is_found_whichever_way_it_points_and_one_that_only_fits_is_not_believed():
    labels = RNG.random((4000, 2)) < 0.5
    x = RNG.normal(size=(4000, 6))
    x[:, 4] -= 5.0 * labels[:, 0]
    x[:, 2] += 5.0 * labels[:, 1] * ~OTHER
    found = best_unit(x, labels, OTHER)
    assert found["best_unit"].tolist() == [4, 2]
    assert (found["unit_fitted"] > 0.99).all() and found["unit"][0] > 0.99
    assert found["unit"][1] == pytest.approx(0.5, abs=0.04)


def test_a_probe_reads_what_is_spread_over_units():
    labels = RNG.random((4000, 1)) < 0.5
    x = RNG.normal(size=(4000, 50)) * 2 + 7
    x += labels * RNG.choice([-1.0, 1.0], 50)
    x = standardised(np.concatenate([x, np.full((4000, 1), 3.0)], axis=1), OTHER)
    assert probe(x, labels, OTHER)["probe"][0] > 0.97 > 0.7 > best_unit(x, labels, OTHER)["unit"][0]


@pytest.mark.parametrize(("last", "told"), [(2, False), (3, True)])
def test_a_probe_of_the_last_tokens_tells_what_stands_in_them(last, told):
    tokens = RNG.integers(0, 5, 4100)
    where = np.arange(50, 4050)
    labels = (tokens[where - 2] == 3)[:, None]
    area = probe(one_hot(tokens, where, last, 5), labels, OTHER)["probe"][0]
    assert area == pytest.approx(1.0) if told else area == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("arch", ["transformer", "mamba2", "min_gru", "gated_delta_hybrid", "qwen3_moe"])
def test_hooks_record_what_the_model_computes_and_are_gone_afterwards(make_run, data, arch):
    config = make_run(f"arch={arch}").config
    model = build_model(config, build_objective(config, data)).eval()
    tokens_BT = torch.from_numpy(data.heldout[:64].astype(np.int64)).view(2, 32)
    found = hidden_states(model, tokens_BT)
    streams = [x for (kind, _), x in found.items() if kind == "stream"]
    assert len(streams) == model.depth and {x.shape[:2] for x in found.values()} == {tokens_BT.shape}
    assert torch.equal(model.norm(streams[-1]), model.hidden(tokens_BT))
    units = [layer for part in (model.blocks[0].mixer, model.blocks[0].channel) if part is not None
             for layer in part.residual_projections() if isinstance(layer, torch.nn.Linear)]  # fmt: skip
    assert found["units", 1].shape[-1] == sum(layer.in_features for layer in units)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_experts_recorded_are_those_that_the_loads_count(make_run, data):
    config = make_run("arch=qwen3_moe", "arch.model.depth=2", "+arch.model.first=[attention+mlp]").config
    model = build_model(config, build_objective(config, data))
    tokens_BT = torch.from_numpy(data.heldout[:64].astype(np.int64)).view(2, 32)
    (block, chosen_BTK), *others = chosen_experts(model, tokens_BT).items()
    moe = model.blocks[1].channel
    assert block == 2 and not others and chosen_BTK.shape == (2, 32, moe.router.top_k)
    assert torch.equal(chosen_BTK.flatten().bincount(minlength=moe.router.experts), moe.load_E)
    assert not any(module._forward_hooks for module in model.modules())
