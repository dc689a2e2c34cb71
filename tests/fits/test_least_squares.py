"""Many problems at once are solved as each would be by itself."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from experiments.fits.least_squares import huber, levenberg_marquardt

X = np.linspace(0, 4, 25)
OPEN = np.full(3, -np.inf), np.full(3, np.inf)


def decay(parameters):
    """c + a exp(-b x) and its Jacobian."""
    a, b, c = (parameters[:, i, None] for i in range(3))
    fall = np.exp(-b * X)
    return c + a * fall, np.stack([fall, -a * X * fall, np.ones_like(fall)], axis=-1)


def problems(noise, count=20):
    rng = np.random.default_rng(0)
    return decay(np.array([[2.0, 0.7, 1.0]]))[0] + noise * rng.standard_normal((count, len(X)))


def test_noise_free_constants_are_recovered_from_far_off():
    got = levenberg_marquardt(decay, np.array([0.1, 3.0, 0.0]), problems(0.0, 1), *OPEN)
    np.testing.assert_allclose(got.parameters[0], [2.0, 0.7, 1.0], rtol=1e-6)
    assert got.converged.all()


@pytest.mark.parametrize("delta", [np.inf, 0.02])
def test_every_problem_has_the_optimum_that_scipy_finds(delta):
    data = problems(0.05)
    got = levenberg_marquardt(decay, np.array([1.0, 1.0, 0.5]), data, *OPEN, delta=delta)
    loss = {"loss": "huber", "f_scale": delta} if np.isfinite(delta) else {}
    for y, parameters, objective in zip(data, got.parameters, got.objective, strict=True):
        theirs = least_squares(lambda p, y=y: decay(p[None])[0][0] - y, parameters, xtol=1e-14, ftol=1e-14, **loss)
        assert objective <= theirs.cost * (1 + 1e-7)


def test_a_parameter_rests_at_a_bound_and_the_others_are_optimal_there():
    lower, upper = np.array([-np.inf, -np.inf, 1.2]), np.full(3, np.inf)
    got = levenberg_marquardt(decay, np.array([1.0, 1.0, 2.0]), problems(0.02, 5), lower, upper)
    assert np.allclose(got.parameters[:, 2], 1.2)
    values, jacobian = decay(got.parameters)
    pull = np.einsum("srp,sr->sp", jacobian, problems(0.02, 5) - values)
    assert np.abs(pull[:, :2]).max() < 1e-3 and (pull[:, 2] < 0).all()


def test_weights_count_as_repeated_data_would():
    data, weights = problems(0.1, 1), np.ones(len(X))
    weights[3] = 2
    got = levenberg_marquardt(decay, np.array([1.0, 1.0, 0.5]), data, *OPEN, weights=weights)

    def repeated(parameters):
        values, jacobian = decay(parameters)
        return np.append(values, values[:, 3:4], 1), np.append(jacobian, jacobian[:, 3:4], 1)

    twice = levenberg_marquardt(repeated, np.array([1.0, 1.0, 0.5]), np.append(data, data[:, 3:4], 1), *OPEN)
    np.testing.assert_allclose(got.parameters, twice.parameters, rtol=1e-5)


def test_hubers_loss_is_a_parabola_and_then_a_line():
    np.testing.assert_allclose(huber(np.array([-3.0, 0.5, 1.0]), 1.0), [2.5, 0.125, 0.5])
