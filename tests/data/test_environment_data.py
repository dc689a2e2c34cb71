"""Problems as data: right answers held out, prompts on one side only, answers and their ends learnt."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.environment_data import environment_data
from experiments.data.environments.arithmetic import Addition
from experiments.data.environments.countdown import Countdown
from experiments.data.environments.mixture import Mixture
from experiments.data.environments.sorting import Sorting
from experiments.data.environments.state_tracking import Permutations
from experiments.data.tokenizers import ByteTokenizer

CONFIGS = Path(__file__).parents[2] / "configs"
CONFIGURED = [path.stem for path in sorted((CONFIGS / "data").glob("*.yaml")) if "train_problems:" in path.read_text()]
T = 24
SMALL = dict(environment=Countdown(3), sequence_length=T, train_problems=200, heldout_problems=40)


def problems_of(data, tokens, answers):
    """(prompt, answer) in bytes of each window, told by the marks alone; asserts what stands behind an answer."""
    found = []
    for row, marked in zip(tokens.reshape(-1, T), answers.reshape(-1, T), strict=True):
        where = np.flatnonzero(marked)
        assert (np.diff(where) == 1).all(), "an answer is in one piece"
        assert row[where[-1]] == data.eot and data.eot not in row[: where[-1]], "eot is learnt, and there is one"
        assert not row[where[-1] + 1 :].any(), "padding is the NUL byte and no other end"
        found.append(tuple(b"".join(data.pieces[i] for i in part) for part in (row[: where[0]], row[where[:-1]])))
    return found


@given(
    environment=st.sampled_from([Countdown(3), Addition(2, scratch=9), Mixture([Sorting(4), Permutations(3, 3)])]),
    demonstrations=st.integers(1, 3),
    correct=st.sampled_from([0.0, 0.3, 1.0]),
    vocabulary=st.sampled_from(["own", "bytes"]),
    seed=st.integers(0, 50),
)
@settings(deadline=None, max_examples=30)
def test_every_window_is_a_problem_and_no_prompt_is_on_both_sides(
    environment, demonstrations, correct, vocabulary, seed
):
    data = environment_data(environment, T, 60, 20, demonstrations, correct, vocabulary, seed)
    train = problems_of(data, data.train, data.train_answers)
    heldout = problems_of(data, data.heldout, data.heldout_answers)
    assert len(train) == 60 * demonstrations and len(heldout) == 20
    prompts = {prompt for prompt, _ in train}
    assert len(prompts) == 60 and len({prompt for prompt, _ in heldout}) == 20
    assert all(hashlib.sha256(prompt).digest()[0] < 26 for prompt, _ in heldout), "a tenth of the hashes"
    assert not prompts & {prompt for prompt, _ in heldout}
    assert all(data.environment.gold(*problem) == 1 for problem in heldout)
    assert data.heldout_bytes == sum(len(answer) for _, answer in heldout)
    if correct == 1:
        assert all(data.environment.gold(*problem) == 1 for problem in train)


def test_a_demonstration_is_right_as_often_as_asked_and_each_has_an_answer_of_its_own():
    data = environment_data(**SMALL | {"environment": Addition(2)}, demonstrations=10, correct=0.3)
    train = problems_of(data, data.train, data.train_answers)
    right = np.mean([data.environment.check(*problem) for problem in train])
    assert right == pytest.approx(0.3, abs=0.04)
    assert len({answer for prompt, answer in train if prompt == train[0][0]}) > 1
    wrong = environment_data(**SMALL | {"environment": Addition(2)}, demonstrations=10, correct=0.0)
    assert np.mean([wrong.environment.check(*p) for p in problems_of(wrong, wrong.train, wrong.train_answers)]) < 0.05


@pytest.mark.parametrize("name", CONFIGURED)
def test_the_config_of_an_environment_makes_data_with_as_many_prompts_as_a_run_is_scored_by(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"data={name}", "data.tokens.train_problems=200"]).data
    data = instantiate(config.tokens)
    assert len(data.heldout) // config.sequence_length >= config.scoring.prompts
    assert config.scoring.samples >= 1 and data.environment.name == data.name.partition("/")[0]


def test_the_vocabulary_of_bytes_is_that_of_text_and_its_own_has_no_id_to_spare():
    own, text = (environment_data(**SMALL, vocabulary=vocabulary) for vocabulary in ("own", "bytes"))
    assert text.pieces == ByteTokenizer.pieces and text.eot == ByteTokenizer.eot
    assert own.pieces == [b"\0", *(bytes([b]) for b in Countdown.alphabet), b""] and own.eot == own.vocab_size - 1
    assert own.decode(own.heldout) == text.decode(text.heldout) and own.heldout_bytes == text.heldout_bytes
    assert own.digest != text.digest


def test_a_filled_window_has_ends_to_its_end_all_of_which_are_learnt():
    padded, filled = (environment_data(**SMALL, fill=fill) for fill in (False, True))
    assert filled.filled and not padded.filled and filled.heldout_bytes == padded.heldout_bytes
    tokens, answers = (x.reshape(-1, SMALL["sequence_length"]) for x in (filled.train, filled.train_answers))
    given = padded.train_answers.reshape(answers.shape)
    assert (tokens[answers & ~given] == filled.eot).all() and answers[:, -1].all()
    assert (answers.sum(1) + (answers.argmax(1)) == SMALL["sequence_length"]).all()


def test_held_out_problems_do_not_depend_on_those_for_training():
    a, b, other = (environment_data(**SMALL | changes) for changes in ({}, {"train_problems": 100}, {"seed": 1}))
    assert np.array_equal(a.heldout, b.heldout) and a.digest != b.digest
    assert not np.array_equal(a.heldout, other.heldout)
    assert environment_data(**SMALL).digest == a.digest


def test_known_problems_are_asked_again_of_those_that_are_trained_on():
    data = environment_data(**SMALL | {"known": True})
    assert np.array_equal(data.heldout, data.train[: len(data.heldout)])
    assert np.array_equal(data.train, environment_data(**SMALL).train)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sequence_length": 14}, "sequence_length=14 must be at least 15: countdown-3 has prompts of up to 9 bytes"),
        ({"train_problems": 0}, "train_problems=0 and heldout_problems=40 must be at least 1"),
        ({"heldout_problems": 0}, "heldout_problems=0 must be at least 1"),
        ({"demonstrations": 0}, "demonstrations=0 must be at least 1"),
        ({"correct": 1.5}, "correct=1.5 from 0 to 1"),
        ({"environment": Permutations(2, 5), "heldout_problems": 1}, "has too few training problems: 1000 draws"),
        ({"environment": Permutations(2, 5), "train_problems": 20}, "permutations-2x5 has too few held-out problems"),
    ],
)  # fmt: skip
def test_settings_that_make_no_data_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        environment_data(**SMALL | changes)
