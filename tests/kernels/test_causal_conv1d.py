"""Every backend of the short convolution against the definition."""

import pytest
import torch

from kernels import causal_conv1d


@pytest.mark.parametrize("T", [1, 2, 3, 4, 63, 64, 65])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_equals_the_definition_in_output_state_and_gradients(T, W, activation, biased):
    x, weight, bias, state = (
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, T, 6), (6, W), (6,), (2, W - 1, 6))
    )
    leaves = [x, weight, state, *([bias] if biased else [])]
    results = []
    for backend in ("reference", "torch"):
        y, end = causal_conv1d(
            x, weight, bias if biased else None, initial_state=state, activation=activation, backend=backend
        )
        seed = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
        loss = (y * seed).sum() + end.square().sum()
        results.append([y, end, *torch.autograd.grad(loss, leaves, allow_unused=True)])
    for got, truth in zip(results[1], results[0], strict=True):
        if truth is not None:
            torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_last_tap_weighs_the_current_token_and_silu_comes_last(backend):
    x, weight, bias = torch.randn(1, 5, 3), torch.randn(3, 2), torch.randn(3)
    y, _ = causal_conv1d(x, weight, bias, backend=backend)
    plain = weight[:, 1] * x[0, 4] + weight[:, 0] * x[0, 3] + bias
    torch.testing.assert_close(y[0, 4], torch.nn.functional.silu(plain))


@pytest.mark.parametrize("name", ["y", "x", "weight", "bias"])
def test_in_bfloat16_it_errs_at_most_twice_as_much_as_the_definition(name):
    def run(dtype, backend):
        rng = torch.Generator().manual_seed(0)
        shapes = {"x": (2, 200, 6), "weight": (6, 4), "bias": (6,)}
        leaves = {k: torch.randn(s, generator=rng, dtype=torch.float64) for k, s in shapes.items()}
        leaves = {k: v.to(dtype).requires_grad_() for k, v in leaves.items()}
        y, _ = causal_conv1d(**leaves, backend=backend)
        seed = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(dtype)
        return dict(zip(["y", *leaves], [y, *torch.autograd.grad(y, list(leaves.values()), seed)]))[name].double()

    truth = run(torch.float64, "reference")
    plain, got = ((run(torch.bfloat16, backend) - truth).abs().max() for backend in ("reference", "torch"))
    assert got <= 2 * plain


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
    [
        ({"backend": "cuda"}, "unknown backend"),
        ({"initial_state": torch.zeros(2, 4, 6)}, "initial_state"),
        ({"bias": torch.zeros(4)}, r"bias \(4,\)"),
        ({"activation": "gelu"}, "unknown activation 'gelu'.*'silu' or None"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        causal_conv1d(torch.zeros(2, 5, 6), torch.zeros(6, 4), **change)
