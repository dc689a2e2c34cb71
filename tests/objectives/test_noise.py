"""Times and masks: each row's own distribution is right, however a batch is spread."""

import pytest
import torch

from objectives.noise import TIMES, Cosine, Polynomial, draw_times, mask_some


@pytest.mark.thorough
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_every_rows_time_is_uniform(times, n):
    draws = torch.stack([draw_times(n, times, torch.Generator().manual_seed(i)) for i in range(2000)])
    assert draws.shape == (2000, n) and ((draws > 0) & (draws <= 1)).all()
    steps = torch.arange(1, 2001) / 2000
    for row in {0, n // 2, n - 1}:  # Kolmogorov-Smirnov at the 0.1 % level
        assert (draws[:, row].sort().values - steps).abs().max() < 1.95 / 2000**0.5


@pytest.mark.parametrize("times", ["stratified", "rotated"])
def test_a_batch_has_one_time_in_every_stratum(times):
    for i in range(100):
        draws = 1 - draw_times(64, times, torch.Generator().manual_seed(i))
        assert ((draws * 64).long().sort().values == torch.arange(64)).all()


def test_antithetic_times_come_in_pairs():
    draws = draw_times(6, "antithetic", torch.Generator().manual_seed(0)).view(3, 2)
    torch.testing.assert_close(draws.sum(1), torch.ones(3).double())


@pytest.mark.parametrize("schedule", [Polynomial(), Polynomial(3.0), Cosine()])
def test_the_rate_of_a_schedule_is_its_slope(schedule):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.noised(t).sum(), t)
    torch.testing.assert_close(schedule.rate(t.detach()), slope)


def test_numbers_of_masked_tokens_are_uniform_and_masks_and_fractions_follow_from_them():
    """K10 too: every row sees every fraction of noise, whatever its place in the batch."""
    noisable = torch.ones(6, 4, dtype=torch.bool)
    noisable[2] = torch.tensor([True, False, True, False])
    noisable[5] = False
    draws = [mask_some(noisable, torch.Generator().manual_seed(i)) for i in range(3000)]
    masked, weight, fraction = (torch.stack(x) for x in zip(*draws, strict=True))
    assert not (masked & ~noisable).any()
    for row, n in ((0, 4), (2, 2), (4, 4)):
        k = masked[:, row].sum(1)
        assert torch.bincount(k, minlength=n + 1)[1:] / 3000 == pytest.approx([1 / n] * n, abs=0.04)
        torch.testing.assert_close(weight[:, row], n / k.double())
        where = masked[:, row][:, noisable[row]].double().mean(0)
        assert where.tolist() == pytest.approx([(n + 1) / 2 / n] * n, abs=0.04)
        assert fraction[:, row].mean() == pytest.approx(0.5, abs=0.02)
        for number in range(1, n + 1):  # Beta(k, n - k + 1)
            assert fraction[k == number, row].mean() == pytest.approx(number / (n + 1), abs=0.04)
    assert not masked[:, 5].any() and weight[:, 5].isfinite().all() and (fraction[:, 5] <= 1).all()
