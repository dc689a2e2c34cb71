"""Multi-query associative recall: what is asked was shown, once, and only answers are marked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data.associative_recall import EOT, associative_recall, draw_sequences
from experiments.data.windows import TrainWindows
from objectives.contracts import Batch
from objectives.next_token import NextToken

SMALL = dict(
    vocab_size=32, pairs=[2, 4], sequence_length=20, train_sequences=30, heldout_sequences=10, power=0.01, seed=0
)


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(1, 8),
    room=st.integers(0, 10),
    spare=st.integers(1, 9),
    power=st.floats(0.01, 3),
    seed=st.integers(0, 99),
    queries=st.integers(1, 3),
)
def test_every_answer_is_the_value_shown_with_its_key_and_no_key_comes_once_more(
    pairs, room, spare, power, seed, queries
):
    half, length = pairs + spare, 2 * (1 + queries) * pairs + 2 * room
    tokens, answers = draw_sequences(5, pairs, 2 * half, length, power, np.random.default_rng(seed), queries)
    assert tokens.shape == answers.shape == (5, length)
    assert (answers.sum(1) == queries * pairs).all() and not answers[:, : 2 * pairs].any()
    assert ((tokens > EOT) & (tokens < 2 * half)).all()
    for row, marked in zip(tokens, answers, strict=True):
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert (keys < half).all() and (values >= half).all()
        shown, asked = dict(zip(keys, values, strict=True)), np.flatnonzero(marked)
        assert sorted(row[i - 1] for i in asked) == sorted(np.repeat(keys, queries))
        assert all(row[i] == shown[row[i - 1]] for i in asked)
        assert np.isin(row, keys).sum() == (1 + queries) * pairs


def test_small_powers_ask_early():
    def mean_place(power):
        _, answers = draw_sequences(400, 2, 32, 40, power, np.random.default_rng(0))
        return np.nonzero(answers)[1].mean()

    assert mean_place(0.01) < mean_place(1.0) - 2 < mean_place(3.0)
    # Odds that do not depend on the slot: the middle of the slots behind two pairs of two tokens.
    assert mean_place(1.0) == pytest.approx((5 + 39) / 2, abs=1)


def test_the_data_is_a_function_of_its_settings_and_the_two_parts_differ():
    a, b, other = (associative_recall(**SMALL | {"seed": seed}) for seed in (0, 0, 1))
    assert np.array_equal(a.train, b.train) and a.digest == b.digest != other.digest
    longer = associative_recall(**SMALL | {"train_sequences": 31})
    assert np.array_equal(a.heldout, longer.heldout) and a.digest != longer.digest
    rows = {tuple(row) for row in a.train.reshape(-1, 20)}
    assert len(rows) == 60 and not rows & {tuple(row) for row in a.heldout.reshape(-1, 20)}
    assert a.heldout_bytes == 10 * (2 + 4) == a.heldout_answers.sum()
    assert a.counted == pytest.approx((2 + 4) / 40)


def test_windows_of_tokens_and_of_their_marks_go_together():
    data = associative_recall(**SMALL)
    tokens, marks = (TrainWindows(x, 20, seed=3).batch(7, 9) for x in (data.train, data.train_answers))
    sequences = (x.reshape(-1, 20) for x in (data.train, data.train_answers))
    known = {tuple(t): tuple(m) for t, m in zip(*sequences, strict=True)}
    for t, m in zip(tokens.tolist(), marks.bool().tolist(), strict=True):
        assert known[tuple(t)] == tuple(m)


class Lookup:
    """In place of a model: knows the value that stood behind the key before."""

    def hidden(self, inputs_BT, visibility):
        out = torch.zeros(*inputs_BT.shape, 32)
        for b, row in enumerate(inputs_BT.tolist()):
            for t, token in enumerate(row):
                if token in row[1:t]:
                    out[b, t, row[row.index(token) + 1]] = 50.0
        return out

    def logits(self, hidden):
        return hidden


def test_whoever_looks_up_has_no_loss_and_whoever_cannot_has_the_log_of_the_vocabulary():
    data = associative_recall(**SMALL)
    tokens, answers = (torch.tensor(x.reshape(-1, 20).astype("int64")) for x in (data.heldout, data.heldout_answers))
    objective = NextToken(32, EOT)
    assert objective.loss(Lookup(), Batch(tokens, answers.float()), None) < 1e-6
    nats = objective.evaluate(Lookup(), Batch(tokens, 1 - answers.float()), None).nats_B
    assert (nats > 14 * np.log(32) * 0.9).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 31}, "vocab_size=31 must be even"),
        ({"sequence_length": 21}, "sequence_length=21 must be even"),
        ({"pairs": []}, r"pairs=\[\] must be numbers from 1 to 5"),
        ({"pairs": [0]}, r"pairs=\[0\] must be numbers from 1 to 5"),
        ({"pairs": [6]}, "sequence_length=20 has room for 5 pairs"),
        ({"pairs": [4], "vocab_size": 8}, "vocab_size=8 has 3 keys"),
        ({"train_sequences": 0}, "train_sequences=0"),
        ({"power": 0.0}, "power=0.0 must be above 0"),
        ({"queries": 0}, "queries=0 must be at least 1"),
        ({"queries": 2}, r"pairs=\[2, 4\] must be numbers from 1 to 3: .* room for 3 pairs with queries=2 of each"),
    ],
)
def test_settings_that_make_no_task_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        associative_recall(**SMALL | changes)
