"""Wiring: the lengths of wires, what the penalty is, and that it is for training alone."""

import pytest
import torch

from objectives.next_token import NextToken
from objectives.post_training.wiring import GAP, Wiring, lengths, wires
from tests.contracts.discovery import LENGTH
from tests.contracts.test_objectives import EOT, V, batch, generator, model_for


def penalised(strength=1.0, **settings):
    return Wiring(NextToken(V, EOT), EOT, strength, **settings)


def test_a_wire_is_as_long_as_its_units_are_apart_and_what_goes_into_one_unit_goes_to_one_place():
    apart = torch.tensor([[0, 1 / 2], [1 / 2, 0]])
    torch.testing.assert_close(lengths(torch.nn.Linear(2, 2), 1), apart + GAP)
    torch.testing.assert_close(lengths(torch.nn.Linear(2, 6), 3), apart.repeat(3, 1) + GAP)
    torch.testing.assert_close(lengths(torch.nn.Linear(1, 4), 1)[:, 0], torch.tensor([3, 1, 1, 3]) / 8 + GAP)


@pytest.mark.parametrize("by_length", [True, False])
def test_the_penalty_is_the_sum_of_weights_times_lengths_over_the_layers_of_the_blocks(by_length):
    objective = penalised(0.5, by_length=by_length)
    model = model_for(objective)
    layers = dict(wires(model))
    assert len(layers) == 4 * model.depth and {copies for copies in layers.values()} == {1, 2, 3}
    cost = 0.0
    for layer, copies in layers.items():
        length = lengths(layer, copies)
        cost += (layer.weight.abs() * (length if by_length else length.mean())).sum()
    more = objective.loss(model, batch(), generator()) - objective.base.loss(model, batch(), generator())
    torch.testing.assert_close(more, 0.5 * cost)
    assert objective.telemetry()["wiring"] == pytest.approx(cost.item())


def test_what_text_is_worth_is_the_bases():
    objective = penalised()
    model = model_for(objective).eval()
    mine, its = (o.evaluate(model, batch(), generator()).nats_B for o in (objective, objective.base))
    assert mine.equal(its)


def test_a_short_network_pays_less_by_length_and_the_same_without():
    objective, plain = penalised(), penalised(by_length=False)
    model = model_for(objective)
    layer, copies = next(wires(model))
    near, far = lengths(layer, copies).flatten().argmin(), lengths(layer, copies).flatten().argmax()
    costs = []
    for place in (near, far):
        with torch.no_grad():
            layer.weight.zero_().view(-1)[place] = 1.0
        costs.append((objective.cost(model).item(), plain.cost(model).item()))
    assert costs[0][0] < costs[1][0] and costs[0][1] == pytest.approx(costs[1][1])


@pytest.mark.parametrize("arch", ["qwen3", "mamba2", "qwen3_moe"])
def test_units_without_a_place_are_refused_by_the_name_of_their_part(arch):
    objective = penalised()
    with pytest.raises(ValueError, match="the wiring of .* has no length: choose blocks"):
        objective.check(model_for(objective, arch), LENGTH)


def test_a_strength_below_0_is_refused():
    with pytest.raises(ValueError, match="strength=-1 must be at least 0"):
        penalised(-1)
