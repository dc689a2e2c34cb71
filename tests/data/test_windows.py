import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.windows import TrainWindows, check_enough, document_lengths, document_starts, heldout_windows

sizes = {"tokens": st.integers(1, 200), "length": st.integers(1, 12), "seed": st.integers(0, 5)}


@given(**sizes)
@settings(deadline=None, max_examples=40)
def test_each_pass_reads_every_full_window_once(tokens, length, seed):
    tokens = max(tokens, length)
    stream = np.arange(tokens, dtype=np.uint16)
    windows = TrainWindows(stream, length, seed)
    expected = torch.arange(tokens // length * length).view(-1, length)
    for number in range(3):
        read = windows.batch(number * len(expected), len(expected))
        assert read.dtype == torch.int64
        assert torch.equal(read[read[:, 0].argsort()], expected)


@given(**sizes, start=st.integers(0, 100), size=st.integers(1, 30), cut=st.integers(0, 29))
@settings(deadline=None, max_examples=40)
def test_a_window_depends_on_its_number_and_not_on_how_batches_are_cut(tokens, length, seed, start, size, cut):
    stream = np.arange(max(tokens, length), dtype=np.uint16)
    whole = TrainWindows(stream, length, seed).batch(start, size)
    other = TrainWindows(stream, length, seed)
    if 0 < cut < size:
        second = other.batch(start + cut, size - cut)
        assert torch.equal(whole, torch.cat([other.batch(start, cut), second]))
    else:
        assert torch.equal(whole, other.batch(start, size))


class Positions:
    """Ten billion tokens, each of which is its position."""

    def __len__(self) -> int:
        return 10**10

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.arange(index.start, index.stop)


def test_ten_billion_tokens_are_shuffled_and_found_again_in_little_memory():
    tracemalloc.start()
    windows = TrainWindows(Positions(), 128, seed=0)
    first = windows.batch(0, 2000)
    again = TrainWindows(Positions(), 128, seed=0).batch(1234, 5)
    following = TrainWindows(Positions(), 128, seed=0).batch(windows.groups - 500, 1000)  # of this pass and the next
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
    assert torch.equal(again, first[1234:1239])
    assert (first[:, :1] % 128 == 0).all() and torch.equal(first, first[:, :1] + torch.arange(128))
    starts = first[:, 0]
    assert len(starts.unique()) == 2000 and len(set(following[:500, 0].tolist()) & set(starts.tolist())) == 0
    # Ten parts of the corpus alike: above this once in a thousand by chance.
    assert ((torch.histc(starts.double(), 10, 0, 1e10) - 200) ** 2 / 200).sum() < 27.9
    assert (starts.diff() > 0).float().mean() == pytest.approx(0.5, abs=0.05)


def test_passes_and_seeds_have_different_orders():
    stream = np.arange(1000, dtype=np.uint16)
    first = TrainWindows(stream, 10, seed=0)
    assert not torch.equal(first.batch(0, 100), first.batch(100, 100))
    assert not torch.equal(first.batch(0, 100), TrainWindows(stream, 10, seed=1).batch(0, 100))


@given(**sizes, group=st.integers(1, 4), cut=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_the_windows_of_a_group_stay_together_and_in_order(tokens, length, seed, group, cut):
    tokens = max(tokens, group * length)
    windows = TrainWindows(np.arange(tokens, dtype=np.uint16), length, seed, group)
    groups = tokens // (group * length)
    read = [*range(0, 2 * groups * group, cut), 2 * groups * group]
    parts = [windows.batch(a, b - a) for a, b in zip(read, read[1:], strict=False)]
    passes = torch.cat(parts).view(2, groups, group * length)
    expected = torch.arange(groups * group * length).view(groups, -1)
    for one in passes:
        assert torch.equal(one[one[:, 0].argsort()], expected)


@given(tokens=st.integers(0, 100), length=st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_heldout_windows_cover_every_token_once_in_order(tokens, length):
    heldout = np.arange(tokens, dtype=np.uint16)
    full, tail = heldout_windows(heldout, length)
    assert full.shape == (tokens // length, length) and full.dtype == torch.int64
    if tail is not None:
        assert tail.dtype == torch.int64 and tail.shape[0] == 1 and 0 < tail.shape[1] < length
    joined = torch.cat([full.flatten(), *([] if tail is None else [tail.flatten()])])
    assert joined.tolist() == heldout.tolist()


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 12))
@settings(deadline=None, max_examples=60)
def test_the_documents_of_a_window_begin_at_its_start_and_behind_every_end(stream, length):
    stream = np.array(stream * 3, dtype=np.uint16)
    tokens, _ = heldout_windows(stream, length)
    if len(tokens) == 0:
        return
    lengths, counted = document_lengths(stream, 0, length), {}
    for row, starts in zip(tokens.tolist(), document_starts(tokens, 0).tolist(), strict=True):
        begins = [t for t in range(length) if t == 0 or row[t - 1] == 0]
        assert [t for t in range(length) if starts[t]] == begins
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            counted[end - begin] = counted.get(end - begin, 0) + 1 / len(tokens)
    assert lengths == pytest.approx(counted)
    assert sum(number * n for n, number in lengths.items()) == pytest.approx(length)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: TrainWindows(np.arange(5), 6, 0),
            "5 training tokens, fewer than one window of sequence_length=6",
        ),
        (lambda: TrainWindows(np.arange(5), 3, 0, 2), "fewer than a group of 2 windows of sequence_length=3"),
        (lambda: TrainWindows(np.arange(5), 0, 0), "sequence_length=0"),
        (lambda: TrainWindows(np.arange(5), 2, 0, 0), "group=0 must be at least 1"),
        (lambda: TrainWindows(np.arange(5), 2, 0).batch(-1, 2), "start=-1"),
        (lambda: TrainWindows(np.arange(5), 2, 0).batch(0, 0), "size=0"),
        (lambda: heldout_windows(np.arange(5), 0), "sequence_length=0"),
        (
            lambda: check_enough(100, 250, False),
            "100 training tokens but the run asks for 250: .* read 2.5 times",
        ),
        (lambda: check_enough(100, 250, False), "data.allow_repeats=true"),
        (lambda: check_enough(0, 250, False), "without end"),
    ],
)
def test_what_cannot_be_read_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("asked", "allow_repeats"), [(100, False), (100, True), (250, True)])
def test_a_run_that_fits_or_may_repeat_is_allowed(asked, allow_repeats):
    check_enough(100, asked, allow_repeats)
