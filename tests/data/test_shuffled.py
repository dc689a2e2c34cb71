import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import shuffled
from experiments.data.shuffled import KEPT, Shuffled


@pytest.fixture
def unkept(monkeypatch):
    """Orders as they are of many numbers."""
    monkeypatch.setattr(shuffled, "KEPT", 0)


@given(size=st.integers(1, 700), key=st.lists(st.integers(0, 9), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_an_order_that_is_not_kept_has_every_number_once(size, key):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffled, "KEPT", 0)
        order = Shuffled(size, key)
        numbers = [order[position] for position in range(size)]
    assert sorted(numbers) == list(range(size))


def test_every_order_is_as_likely_as_any_other(unkept):
    drawn = [[Shuffled(4, [seed, 0])[position] for position in range(4)] for seed in range(4800)]
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 50  # chi-squared of 23 degrees: above this once in a thousand


def test_where_a_number_lies_says_nothing_of_itself_or_of_the_next(unkept):
    size = 20_000
    order = Shuffled(size, [0])
    numbers = np.array([order[position] for position in range(size)])
    for before, after in ((np.arange(size), numbers), (numbers[:-1], numbers[1:])):
        counts = np.histogram2d(before, after, bins=20)[0]
        # 361 degrees of freedom: above this once in a thousand
        assert ((counts - size / 400) ** 2 / (size / 400)).sum() < 450


def test_few_numbers_are_in_the_order_that_numpy_draws():
    order = Shuffled(100, [3, 1])
    assert [order[position] for position in range(100)] == np.random.default_rng([3, 1]).permutation(100).tolist()


@pytest.mark.parametrize("size", [7, KEPT + 1])
@pytest.mark.parametrize("position", [-1, 1])
def test_a_position_outside_is_refused(size, position):
    with pytest.raises(IndexError, match=f"of {size} numbers"):
        Shuffled(size, [0])[position if position < 0 else size]
