"""Modular addition: every sum once, some to train on and the others held out, and only answers are marked."""

import numpy as np
import pytest

from experiments.data.modular_addition import modular_addition

SMALL = dict(modulus=11, train_fraction=0.4, sequence_length=3, seed=0)


@pytest.mark.parametrize("modulus", [2, 11, 97])
def test_every_pair_of_numbers_has_its_sum_once_on_one_side(modulus):
    data = modular_addition(**SMALL | {"modulus": modulus})
    train, heldout = (part.reshape(-1, 3).astype(int) for part in (data.train, data.heldout))
    both = np.concatenate([train, heldout])
    assert (both[:, 2] == (both[:, 0] + both[:, 1]) % modulus).all()
    assert {(a, b) for a, b, _ in both} == {(a, b) for a in range(modulus) for b in range(modulus)}
    assert len(both) == modulus**2 and len(train) == round(0.4 * modulus**2)
    assert data.eot == modulus == data.vocab_size - 1 and len(data.pieces) == data.vocab_size


def test_only_sums_are_marked_and_each_counts_as_one_byte():
    data = modular_addition(**SMALL)
    for tokens, answers in ((data.train, data.train_answers), (data.heldout, data.heldout_answers)):
        assert len(tokens) == len(answers) and (answers.reshape(-1, 3) == [False, False, True]).all()
    assert data.heldout_bytes == data.heldout_answers.sum() == 121 - 48


def test_an_equals_sign_stands_in_front_of_the_same_sums():
    plain, signed = modular_addition(**SMALL), modular_addition(**SMALL | {"equals": True, "sequence_length": 4})
    for without, tokens in ((plain.train, signed.train), (plain.heldout, signed.heldout)):
        tokens = tokens.reshape(-1, 4)
        assert (tokens[:, 2] == 11).all() and np.array_equal(tokens[:, [0, 1, 3]], without.reshape(-1, 3))
    assert (signed.train_answers.reshape(-1, 4) == [False, False, False, True]).all()
    assert signed.eot == 12 == signed.vocab_size - 1 and signed.pieces[11:] == [b"= ", b""]


def test_the_seed_draws_the_pairs_and_a_larger_fraction_keeps_those_of_a_smaller():
    a, b, other, more = (
        modular_addition(**SMALL | changes) for changes in ({}, {}, {"seed": 1}, {"train_fraction": 0.5})
    )
    assert np.array_equal(a.train, b.train) and a.digest == b.digest
    assert a.digest not in (other.digest, more.digest)
    assert {*map(tuple, a.train.reshape(-1, 3))} != {*map(tuple, other.train.reshape(-1, 3))}
    assert np.array_equal(a.train, more.train[: len(a.train)])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modulus": 1}, "modulus=1 must be at least 2"),
        ({"train_fraction": 0.004}, "train_fraction=0.004 must leave some of the 121 pairs of modulus=11 to train on"),
        ({"train_fraction": 1.0}, "train_fraction=1.0 must leave some"),
        ({"train_fraction": -0.1}, "train_fraction=-0.1 must leave some"),
        ({"sequence_length": 4}, "sequence_length=4 must be 3"),
        ({"equals": True}, "sequence_length=3 must be 4"),
    ],
)
def test_settings_that_make_no_task_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        modular_addition(**SMALL | changes)
