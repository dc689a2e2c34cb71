"""Spread text: pieces from all over a corpus in the place of its beginning."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.spread import Spread, spread


@given(count=st.integers(1, 20), length=st.integers(1, 20), more=st.integers(0, 500), data=st.data())
def test_pieces_are_whole_and_apart_and_reach_from_the_beginning_to_the_end(count, length, more, data):
    stream = np.arange(count * length + more)
    whole = Spread(stream, count, length)[:]
    pieces = whole.reshape(count, length)
    assert (np.diff(pieces, axis=1) == 1).all() and (np.diff(pieces[:, 0]) >= length).all()
    assert pieces[0, 0] == 0 and (count == 1 or pieces[-1, -1] == len(stream) - 1)
    start = data.draw(st.integers(0, count * length))
    stop = data.draw(st.integers(start, count * length + 5))
    assert (Spread(stream, count, length)[start:stop] == whole[start:stop]).all()


def test_it_is_data_of_its_own_whose_held_out_text_stays(data):
    few = spread(data, 64, 16)
    assert len(few.train) == 64 and few.digest != data.digest != spread(data, 64, 32).digest
    assert few.heldout is data.heldout and (few.train[:16] == data.train[:16]).all()
    assert (few.train[48:] == data.train[len(data.train) - 16 :]).all()


@pytest.mark.parametrize(("tokens", "length"), [(0, 1), (10, 4), (10, 0), (10**9, 10)])
def test_what_is_no_whole_number_of_pieces_is_refused(data, tokens, length):
    with pytest.raises(ValueError, match=f"train_tokens={tokens} must be whole pieces of length={length}"):
        spread(data, tokens, length)


def test_marked_answers_are_refused(data):
    with pytest.raises(ValueError, match="marked answers"):
        spread(replace(data, train_answers=np.ones(len(data.train), bool)), 64, 16)
