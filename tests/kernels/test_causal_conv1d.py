"""The short convolution's own options, against the definition."""

import pytest
import torch

from kernels import causal_conv1d
from tests.kernels.cases import CONVOLUTION, assert_equal, assert_triton_is_right, run


def problem(T, biased, **sizes):
    inputs = CONVOLUTION.problem(T, **sizes)
    return inputs if biased else inputs | {"bias": None}


@pytest.mark.parametrize("T", [1, 2, 3, 4, 65])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [False, True])
def test_torch_equals_the_definition_in_output_state_and_gradients(T, W, activation, biased):
    inputs = problem(T, biased, batch=2, taps=W)
    got, truth = (run(CONVOLUTION, inputs, backend, activation=activation) for backend in ("torch", "reference"))
    assert_equal(got, truth)


@pytest.mark.thorough
@pytest.mark.usefixtures("triton_device", "poisoned")
@pytest.mark.parametrize("W", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("biased", [False, True])
def test_triton_takes_any_taps_activation_and_bias(triton_device, W, activation, biased):
    assert_triton_is_right(CONVOLUTION, triton_device, problem(18, biased, taps=W), activation=activation)


@pytest.mark.thorough
@pytest.mark.usefixtures("triton_device", "poisoned")
def test_triton_takes_more_channels_than_a_program_holds_and_batches_are_apart(triton_device):
    assert_triton_is_right(CONVOLUTION, triton_device, CONVOLUTION.problem(18, batch=2, channels=140))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_last_tap_weighs_the_current_token_and_silu_comes_last(backend):
    x, weight, bias = torch.randn(1, 5, 3), torch.randn(3, 2), torch.randn(3)
    y, _ = causal_conv1d(x, weight, bias, backend=backend)
    plain = weight[:, 1] * x[0, 4] + weight[:, 0] * x[0, 3] + bias
    torch.testing.assert_close(y[0, 4], torch.nn.functional.silu(plain))


def test_in_bfloat16_it_errs_at_most_twice_as_much_as_the_definition():
    inputs = CONVOLUTION.problem(200, batch=2)
    truth = run(CONVOLUTION, inputs, "reference")
    plain, got = (run(CONVOLUTION, inputs, backend, dtype=torch.bfloat16) for backend in ("reference", "torch"))
    for name, exact in truth.items():
        assert (got[name] - exact).abs().max() <= 2 * (plain[name] - exact).abs().max(), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight \(5, 4\) is not for the 6 channels"),
        ({"initial_state": torch.zeros(2, 4, 6)}, r"initial_state is \(2, 4, 6\), it must be \(2, 3, 6\)"),
        ({"bias": torch.zeros(4)}, r"bias \(4,\)"),
        ({"activation": "gelu"}, "unknown activation 'gelu'.*'silu' or None"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        causal_conv1d(**{"x": torch.zeros(2, 5, 6), "weight": torch.zeros(6, 4)} | change)


@pytest.mark.thorough
def test_the_operator_passes_pytorchs_own_checks(triton_device):
    from kernels.convolution.triton_operators import forward

    t = {name: x.float().to(triton_device).requires_grad_() for name, x in CONVOLUTION.problem(20).items()}
    arguments = (
        t["x"],
        t["weight"],
        t["bias"],
        t["initial_state"],
        torch.tensor([0, 20], device=triton_device),
        True,
    )
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, arguments, test_utils=checks)
