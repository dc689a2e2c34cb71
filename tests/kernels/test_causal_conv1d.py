"""Every backend of the short convolution against the definition."""

import pytest
import torch

from kernels import causal_conv1d


@pytest.mark.parametrize("T", [1, 2, 3, 4, 63, 64, 65])
@pytest.mark.parametrize("W", [1, 2, 4])
def test_torch_equals_the_definition_in_output_state_and_gradients(T, W):
    x, weight, state = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, T, 6), (6, W), (2, W - 1, 6))
    )
    results = []
    for backend in ("reference", "torch"):
        y, end = causal_conv1d(x, weight, initial_state=state, backend=backend)
        seed = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
        loss = (y * seed).sum() + end.square().sum()
        results.append([y, end, *torch.autograd.grad(loss, [x, weight, state], allow_unused=True)])
    for got, truth in zip(results[1], results[0]):
        if truth is not None:
            torch.testing.assert_close(got, truth)


def test_pieces_equal_the_whole():
    x, weight = torch.randn(2, 50, 6), torch.randn(6, 4)
    whole, end = causal_conv1d(x, weight)
    state, pieces = None, []
    for part in x.split([1, 2, 17, 30], dim=1):
        y, state = causal_conv1d(part, weight, initial_state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"backend": "triton"}, "unknown backend"), ({"initial_state": torch.zeros(2, 4, 6)}, "initial_state")],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        causal_conv1d(torch.zeros(2, 5, 6), torch.zeros(6, 4), **change)
