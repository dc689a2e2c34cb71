"""The duties of every channel (`archs.contracts.Channel`), found by its config."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.contracts import Channel
from archs.parameters import linear_layers
from tests.contracts.discovery import CHANNELS, WIDTH, build_channel, vectors

every = pytest.mark.parametrize("name", CHANNELS)


@every
def test_it_works_on_each_token_by_itself_and_keeps_shape_and_dtype(name):
    channel = build_channel(name)
    x = vectors(2, 9)
    y = channel(x)
    assert isinstance(channel, Channel) and y.shape == x.shape and y.dtype == x.dtype
    with torch.no_grad():
        torch.testing.assert_close(channel(x[1:, 4:5]), y[1:, 4:5])
    torch.testing.assert_close(channel(x.flip(0, 1)), y.flip(0, 1))


@every
def test_it_names_all_that_it_writes_to_the_residual_stream(name):
    channel = build_channel(name)
    inner = {id(layer) for layer in linear_layers(channel)}
    written = list(channel.residual_projections())
    assert written and {id(layer) for layer in written} <= inner
    assert all(layer.out_features == WIDTH for layer in written)
    with torch.no_grad():
        for layer in written:
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
    assert channel(vectors(1, 9)).abs().max() == 0


@every
def test_gradients_reach_every_parameter_and_losses_of_its_own_are_made_in_training_alone(name):
    channel = build_channel(name)
    assert channel.telemetry() == {} or all(isinstance(x, float) for x in channel.telemetry().values())
    loss = channel(vectors(2, 40)).square().sum() + sum(channel.auxiliary_losses().values())
    loss.backward()
    assert [n for n, p in channel.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(isinstance(x, float) for x in channel.telemetry().values())
    channel.after_step()
    channel.eval()(vectors(1, 3))
    assert channel.auxiliary_losses() == {}


@every
@pytest.mark.parametrize("T", [1, 7, 64])
def test_flops_are_those_that_pytorch_counts(name, T):
    channel = build_channel(name, torch.float32).to("meta")
    with FlopCounterMode(display=False) as counter:
        channel(torch.zeros(1, T, WIDTH, device="meta"))
    assert channel.flops(T) == counter.get_total_flops() > 0


@every
def test_what_a_token_does_not_go_through_is_counted_as_inactive(name):
    channel = build_channel(name)
    total = sum(p.numel() for p in channel.parameters())
    channel(vectors(1, 1)).square().sum().backward()
    touched = sum(p.numel() for p in channel.parameters() if p.grad is not None)
    used = sum(int((p.grad != 0).flatten(1).any(1).sum()) * p[0].numel() for p in channel.parameters() if p.dim() == 3)
    stacked = sum(p.numel() for p in channel.parameters() if p.dim() == 3)
    assert touched == total and 0 <= channel.inactive_params < total
    biases = sum(p.numel() for n, p in channel.named_parameters() if p.dim() == 2 and n.endswith("bias"))
    assert channel.inactive_params - (stacked - used) in range(biases + 1)
