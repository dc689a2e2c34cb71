"""Spoiled text: some blocks of what is trained on are in disorder, and nothing else is changed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.spoiled import Spoiled, in_lines, spoiled
from experiments.data.tokenizers import BPETokenizer, ByteTokenizer

END = 10
TEXT = np.random.default_rng(0).choice([END, 65, 66, 67], size=1000).astype(np.uint16)


def text(tokens):
    return tokens.astype(np.uint8).tobytes()


@given(start=st.integers(0, 1100), size=st.integers(0, 300), length=st.integers(1, 200), fraction=st.floats(0, 1))
def test_a_slice_is_that_of_the_whole_and_every_block_keeps_its_lines(start, size, length, fraction):
    stream = Spoiled(TEXT, in_lines(END), fraction, length, seed=3)
    whole = stream[:]
    assert (stream[start : start + size] == whole[start : start + size]).all() and len(whole) == len(TEXT)
    for begin in range(0, len(TEXT), length):
        now, before = (x[begin : begin + length] for x in (whole, TEXT))
        if len(now) < length:
            assert (now == before).all()
        elif before[-1] == END:
            assert sorted(text(now).split(b"\n")) == sorted(text(before).split(b"\n"))


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_as_many_blocks_as_asked_for_are_in_disorder(fraction):
    stream = np.arange(40_000)
    found = Spoiled(stream, lambda tokens, rng: rng.permutation(tokens), fraction, 20, seed=0)[:].reshape(-1, 20)
    changed = (found != stream.reshape(-1, 20)).any(1)
    assert abs(changed.mean() - fraction) < 0.04 and (np.sort(found) == stream.reshape(-1, 20)).all()


class Documents:
    name = "documents"

    def fingerprint(self):
        return "40 of 3 lines"

    def documents(self):
        return (f"{i}\n\nfirst\n\nsecond\n\n".encode() for i in range(40))


def test_what_is_held_out_stays_and_the_digest_is_another(tmp_path, monkeypatch):
    monkeypatch.setenv("ARCHIPELAGO_CACHE", str(tmp_path))
    clean, lines, tokens = (
        spoiled(Documents(), ByteTokenizer(), 50, 0.3, fraction, order, block=64)
        for fraction, order in ((0.0, "lines"), (1.0, "lines"), (1.0, "tokens"))
    )
    assert (clean.heldout == lines.heldout).all() and (clean.heldout == tokens.heldout).all()
    assert len({clean.digest, lines.digest, tokens.digest}) == 3
    assert text(lines.train[:]).count(b"first\n") > text(tokens.train[:]).count(b"first\n")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fraction": 1.5}, "fraction=1.5 must be from 0 to 1"),
        ({"order": "words"}, "order='words' must be 'lines' or 'tokens'"),
        ({"tokenizer": BPETokenizer(270)}, "hold more than the end of a line: take bytes"),
    ],
)
def test_what_cannot_be_spoiled_is_refused(tmp_path, monkeypatch, settings, words):
    monkeypatch.setenv("ARCHIPELAGO_CACHE", str(tmp_path))
    usual = {"tokenizer": ByteTokenizer(), "fraction": 0.5, "order": "lines"}
    with pytest.raises(ValueError, match=words):
        spoiled(Documents(), heldout_bytes=50, heldout_fraction=0.3, **usual | settings)
