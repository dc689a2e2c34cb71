"""Pairs of sequences: which one is chosen, and that they are data of the same language."""

import math

import pytest
import torch

from experiments.data.hidden_markov import HiddenMarkovLanguage, hidden_markov
from experiments.data.likelihood_pairs import likelihood_pairs

LANGUAGE = HiddenMarkovLanguage(4, 6, concentration=0.2, seed=0)


def pairs(**settings):
    given = {"sequence_length": 8, "train_pairs": 5000, "heldout_pairs": 50, "temperature": 0.2, "seed": 1}
    return likelihood_pairs(LANGUAGE, **given | settings)


def ahead(data):
    """By how many nats per symbol the chosen sequence of each training pair is ahead."""
    tokens_P2T = torch.from_numpy(data.train.astype("int64")).view(-1, 2, 8)
    return (LANGUAGE.log_likelihood(tokens_P2T[:, 0]) - LANGUAGE.log_likelihood(tokens_P2T[:, 1])) / 8


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
def test_the_likelier_sequence_is_chosen_as_often_as_bradley_and_terry_say(temperature):
    difference_P = ahead(pairs(temperature=temperature))
    chance_P = torch.sigmoid(difference_P.abs() / temperature)
    z = ((difference_P > 0).double() - chance_P).sum() / (chance_P * (1 - chance_P)).sum().sqrt()
    assert abs(z) < 4 and 0.51 < chance_P.mean() < 0.98


def test_the_pairs_are_sequences_of_the_language_in_the_vocabulary_of_its_own_data():
    data, plain = pairs(), hidden_markov(LANGUAGE, 8, 80, 80, seed=0)
    assert (data.vocab_size, data.eot, data.pieces) == (plain.vocab_size, plain.eot, plain.pieces)
    assert (len(data.train), len(data.heldout), data.group) == (80_000, 800, 2) and data.train.max() < data.eot
    tokens_BT = torch.from_numpy(data.train.astype("int64")).view(-1, 8)
    entropy, error = LANGUAGE.entropy_per_token(8, 10_000, torch.Generator().manual_seed(0))
    assert abs(-LANGUAGE.log_likelihood(tokens_BT).mean() / 8 - entropy) < 4 * math.hypot(error, 0.5 / 10_000**0.5)


def test_they_are_a_function_of_the_settings_and_held_out_pairs_stay_when_there_are_more():
    data, more, other = pairs(), pairs(train_pairs=6000), pairs(seed=2)
    assert pairs().digest == data.digest and data.digest not in (more.digest, other.digest)
    assert (data.heldout == more.heldout).all() and not (data.heldout == other.heldout).all()


@pytest.mark.parametrize("setting", [{"train_pairs": 0}, {"heldout_pairs": 0}, {"temperature": 0.0}])
def test_what_is_out_of_range_is_refused(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=0"):
        pairs(**setting)
