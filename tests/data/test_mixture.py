"""Mixtures: whole windows of each part, in the given shares, once each."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.mixture import mixture
from experiments.data.token_data import TokenData
from experiments.data.windows import TrainWindows
from experiments.harness.run import execute

PIECES = [bytes([i]) for i in range(16)] + [b""]


def part(name: str, tokens: int, answers: bool = False) -> TokenData:
    """Tokens that say where they stand: the name's digit, and behind it the position in base 16."""
    stream = np.arange(tokens, dtype=np.uint16) % 16
    stream[::4] = int(name)
    marks = {"train_answers": stream == 3, "heldout_answers": stream[:8] == 3} if answers else {}
    return TokenData(
        train=stream, heldout=stream[:8], heldout_bytes=8 + int(name), vocab_size=17, eot=16, digest=name, name=name,
        pieces=PIECES, **marks,
    )  # fmt: skip


def windows(data: TokenData, T: int) -> np.ndarray:
    return data.train[:].reshape(-1, T)


@given(
    lengths=st.lists(st.integers(80, 900), min_size=1, max_size=4), data=st.data(), T=st.sampled_from([4, 8, 16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_each_part_has_its_share_of_whole_windows_and_none_is_read_twice(lengths, data, T, seed):
    weights = data.draw(st.lists(st.floats(1, 4), min_size=len(lengths), max_size=len(lengths)))
    parts = [replace(part(str(i), n), train=np.arange(n) + 1000 * i) for i, n in enumerate(lengths)]
    got = windows(mixture(parts, weights, T, seed), T)
    assert (got == got[:, :1] + np.arange(T)).all() and (got[:, 0] % 1000 % T == 0).all()
    assert len(np.unique(got[:, 0])) == len(got)
    counts, sizes = Counter((got[:, 0] // 1000).tolist()), [n // T for n in lengths]
    for i, weight in enumerate(weights):
        assert abs(counts[i] - len(got) * weight / sum(weights)) <= len(parts)
    assert any(counts[i] >= size - 1 for i, size in enumerate(sizes))


def test_any_slice_of_a_mixture_is_that_of_the_whole():
    mixed = mixture([part("0", 100), part("1", 60)], [1, 1], 8, 0)
    whole = mixed.train[:]
    assert len(whole) == len(mixed.train) == 112
    for start in range(0, 113, 5):
        for stop in range(0, 130, 7):
            assert np.array_equal(mixed.train[start:stop], whole[start:stop])


def test_windows_of_a_run_are_never_of_two_parts():
    mixed = mixture([part("0", 400), part("1", 400)], [3, 1], 8, 0)
    batch = TrainWindows(mixed.train, 8, seed=5).batch(0, 60)
    assert (batch[:, 0] == batch[:, 4]).all() and 0.1 < (batch[:, 0] == 1).float().mean() < 0.4


def test_what_is_held_out_is_that_of_the_first_part():
    a, b = part("0", 100), part("1", 100)
    for first, second in ((a, b), (b, a)):
        mixed = mixture([first, second], [1, 2], 8, 0)
        assert mixed.heldout is first.heldout and mixed.heldout_bytes == first.heldout_bytes
        assert mixed.name == f"mixture({first.name} 0.333, {second.name} 0.667)"


def test_tokens_of_a_part_without_marks_all_count_beside_one_with_marks():
    plain, marked = part("0", 128), part("1", 128, answers=True)
    mixed = mixture([plain, marked], [1, 1], 8, 0)
    assert np.array_equal(mixed.train_answers, np.repeat(windows(mixed, 8)[:, 0] == 0, 8) | (mixed.train[:] == 3))
    assert mixed.heldout_answers is None and mixture([plain], [1], 8, 0).train_answers is None


def test_a_mixture_is_a_function_of_its_settings():
    parts = [part("0", 400), part("1", 400)]
    same, other, digests = mixture(parts, [1, 1], 8, 3), mixture(parts, [1, 1], 8, 4), set()
    assert np.array_equal(same.train[:], mixture(parts, [2, 2], 8, 3).train[:])
    assert not np.array_equal(same.train[:], other.train[:])
    for settings in (([1, 1], 8, 3), ([1, 1], 8, 4), ([1, 1], 16, 3), ([1, 2], 8, 3)):
        digests.add(mixture(parts, *settings).digest)
    assert len(digests) == 4 and mixture(parts[::-1], [1, 1], 8, 3).digest not in digests


@pytest.mark.parametrize(
    ("second", "weights", "words"),
    [
        (part("1", 100), [1.0], "2 parts with weights=\\[1.0\\]: give one weight for each"),
        (part("1", 100), [1.0, 0.0], "weights=\\[1.0, 0.0\\] must be above 0"),
        (part("1", 7), [1, 1], "1 has 7 training tokens, fewer than one window of sequence_length=8"),
        (replace(part("1", 100), group=2), [1, 1], "1 has groups of 2 and filled=False, 0 filled=False"),
        (replace(part("1", 100), filled=True), [1, 1], "1 has groups of 1 and filled=True, 0 filled=False"),
        (part("1", 100), [1, 1e-6], "1 has a share of 1e-06 in a mixture of 12 windows, which is none"),
        (
            replace(part("1", 100), pieces=PIECES[::-1]),
            [1, 1],
            "1 has 17 ids that stand for other bytes than the 17 of 0",
        ),
    ],
)
def test_parts_that_cannot_be_mixed_are_refused_by_name(second, weights, words):
    with pytest.raises(ValueError, match=words):
        mixture([part("0", 100), second], weights, 8, 0)


@pytest.mark.thorough
@pytest.mark.parametrize("packed", [False, True])
def test_a_run_goes_on_with_another_mix(make_run, data, packed):
    first = make_run("data.sequence_length=16", "budget.flops=1e8")
    assert execute(first, data)["status"] == "done"
    other = replace(data, train=data.train[::-1].copy(), digest="1", name="backwards")
    mixed = mixture([other, data], [3, 1], 32, 0)
    run = make_run(f"init_from={first.id}", f"data.packed={packed}", "budget.flops=1e8")
    row = execute(run, mixed)
    assert row["status"] == "done" and row["data_digest"] == mixed.digest
