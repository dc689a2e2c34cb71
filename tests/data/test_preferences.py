"""Preferences as data: pairs of windows, the chosen answer first, of which answers and their ends are learnt."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from scipy.special import expit

from experiments.data.chat import END, ROLES
from experiments.data.corpora import HuggingFace, TextFiles
from experiments.data.environments.countdown import Countdown
from experiments.data.environments.state_tracking import Permutations
from experiments.data.environments.uncounted_sorting import UncountedSorting
from experiments.data.preferences import pairs, preferences
from experiments.data.ranked_pairs import ranked_pairs
from experiments.data.tokenizers import BPETokenizer, ByteTokenizer
from experiments.data.windows import TrainWindows

CONFIGS = Path(__file__).parents[2] / "configs"
T = 40


class Rows:
    """Pairs in memory."""

    name = "rows"

    def __init__(self, rows):
        self._rows = rows

    def rows(self, fields):
        return ((f"row {number}", dict(zip(fields, row, strict=True))) for number, row in enumerate(self._rows, 1))


def make(rows, tokenizer=None, **changes):
    return preferences(
        Rows(rows), tokenizer or ByteTokenizer(), **dict(sequence_length=T, heldout_fraction=0.3) | changes
    )


def answers_of(data, tokens, marks):
    """(prompt, chosen, rejected) of each pair of windows; asserts what stands behind an answer."""
    found = []
    for row, marked in zip(tokens.reshape(-1, T), marks.reshape(-1, T), strict=True):
        end = int(np.flatnonzero(row == data.eot)[0])
        learnt = np.flatnonzero(marked)
        assert learnt[-1] == end and (np.diff(learnt) == 1).all(), "the answer and its end, in one piece"
        assert all(data.pieces[i] == b"\0" for i in row[end + 1 :]), "padding behind"
        found.append(tuple(b"".join(data.pieces[i] for i in part) for part in (row[: learnt[0]], row[learnt[:-1]])))
    assert all(a[0] == b[0] for a, b in zip(found[::2], found[1::2], strict=True)), "one prompt to a pair"
    return [(a[0], a[1], b[1]) for a, b in zip(found[::2], found[1::2], strict=True)]


def both(data):
    parts = (data.train, data.train_answers), (data.heldout, data.heldout_answers)
    return [answers_of(data, *part) for part in parts]


def many(number=40):
    return [(f"prompt {i}: ", f"yes {i}", "no") for i in range(number)]


def as_bytes(rows):
    return [tuple(text.encode() for text in row) for row in rows]


texts = st.text(alphabet="ab ü\n", max_size=8)


@given(drawn=st.lists(st.tuples(texts, texts, texts), max_size=12))
@settings(deadline=None, max_examples=40)
def test_every_pair_is_there_once_and_its_answers_are_learnt(drawn):
    data = make([*many(), *drawn])
    train, heldout = both(data)
    assert data.group == 2
    assert sorted(train + heldout) == sorted(set(as_bytes([*many(), *drawn])))
    assert data.heldout_bytes == sum(len(a) + len(b) for _, a, b in heldout)
    assert not {prompt for prompt, *_ in train} & {prompt for prompt, *_ in heldout}


def message(role, content):
    return {"role": role, "content": content}


def test_messages_are_written_as_conversations_and_may_begin_with_the_prompt():
    asked = [[message("system", "s"), message("user", f"q{i}")] for i in range(40)]
    yes, no = [message("assistant", "yes")], [message("assistant", "no")]
    apart = make([(messages, yes, no) for messages in asked])
    whole = make([(messages[1]["content"], messages + yes, messages + no) for messages in asked])
    assert apart.digest == whole.digest
    head, user, assistant = ROLES["system"] + b"s" + END, ROLES["user"], ROLES["assistant"]
    expected = [(head + user + b"q%d" % i + END + assistant, b"yes" + END, b"no" + END) for i in range(40)]
    assert sorted(sum(both(apart), [])) == sorted(expected)


def test_pairs_are_drawn_together_and_the_chosen_one_is_first():
    data = make(many())
    windows = TrainWindows(data.train, T, 3, data.group).batch(0, 20).numpy()
    marks = TrainWindows(data.train_answers, T, 3, data.group).batch(0, 20).numpy().astype(bool)
    assert all(c.startswith(b"yes") and r == b"no" for _, c, r in answers_of(data, windows, marks))


def test_pairs_that_are_longer_than_a_window_are_refused_by_number_or_left_out_both():
    rows = [*many(), ("p", "x", "x" * 50), ("q", "x" * 50, "x")]
    with pytest.raises(ValueError, match="2 of 42 pairs are longer than sequence_length=40 tokens, the longest has 52"):
        make(rows)
    assert sorted(sum(both(make(rows, drop_longer=True)), [])) == sorted(as_bytes(many()))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "hugging face"])
def test_the_same_pairs_come_from_any_file(tmp_path, suffix):
    names = ("prompt", "chosen", "rejected")
    rows = [dict(zip(names, row, strict=True)) | {"score": 1} for row in many()]
    path = tmp_path / f"a.{suffix.replace('hugging face', 'jsonl')}"
    lines = "\n".join(map(json.dumps, rows)).encode()
    if suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    corpus = HuggingFace("json", data_files=str(path)) if suffix == "hugging face" else TextFiles(str(tmp_path))
    assert preferences(corpus, ByteTokenizer(), T, 0.3).digest == make(many()).digest


def test_a_trained_vocabulary_keeps_the_edge_of_the_answer():
    data = make(many(), BPETokenizer(270))
    assert sorted(sum(both(data), [])) == sorted(as_bytes(many()))
    assert data.heldout_bytes == make(many()).heldout_bytes


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("p", None, "r"), "row 41 must have prompt, chosen and rejected all as texts or all .* chosen NoneType"),
        (([message("user", "q")], "c", "r"), "row 41 must have .* all as texts or all as lists of messages"),
        ((3, [message("user", "q")], [message("user", "q")]), "row 41 must have .* prompt int"),
        (("p", [message("user", "p"), message("assistant", "a")], [message("user", "q"), message("assistant", "b")]),
         "row 41: chosen and rejected must differ in their last message alone"),
        (([message("user", "p")], [message("user", "a")], [message("user", "b")]), "last message alone, the assistant"),
        (("p", [message("user", "q"), message("assistant", "a")], [message("user", "q"), message("assistant", "b")]),
         "row 41: the prompt is a text, but no user says it"),
        (([message("user", "p")], [], [message("assistant", "b")]), "row 41, chosen must have a list of messages"),
    ],
)  # fmt: skip
def test_rows_that_are_no_pair_are_named(row, words):
    with pytest.raises(ValueError, match=words):
        make([*many(), row])


def test_pairs_of_ids_are_taken_as_they_are_and_the_first_are_held_out():
    rng = np.random.default_rng(0)
    prompts, chosen, rejected = ([rng.integers(0, 4, rng.integers(n, 4)) for _ in range(9)] for n in (0, 1, 1))
    pieces = [b"a", b"b", b"c", b"d", b""]
    data = pairs(prompts, chosen, rejected, 8, pieces, eot=4, heldout=3)
    rows = np.concatenate([data.heldout, data.train]).reshape(9, 2, 8)
    marks = np.concatenate([data.heldout_answers, data.train_answers]).reshape(9, 2, 8)
    assert len(data.heldout) == 3 * 2 * 8 and data.group == 2 and data.vocab_size == 5
    for n, (prompt, *answers) in enumerate(zip(prompts, chosen, rejected, strict=True)):
        for row, mark, answer in zip(rows[n], marks[n], answers, strict=True):
            whole = [*prompt, *answer, 4]
            assert row.tolist() == whole + [0] * (8 - len(whole))
            assert np.flatnonzero(mark).tolist() == list(range(len(prompt), len(whole)))
    assert data.heldout_bytes == sum(map(len, chosen[:3] + rejected[:3]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rejected": [[1]]}, "2 prompts, 2 chosen and 1 rejected answers must be as many"),
        ({"heldout": 2}, "more than the heldout=2 of them"),
        ({"heldout": 0}, "which must be at least 1"),
        ({"sequence_length": 2}, "4 of 4 answers with their prompts are longer than sequence_length=2"),
        ({"padding": 2}, "padding=2 must not be eot"),
    ],
)
def test_pairs_that_make_no_data_are_refused(changes, words):
    settings = dict(prompts=[[0], [1]], chosen=[[1], [1]], rejected=[[0], [0]], sequence_length=4, heldout=1)
    with pytest.raises(ValueError, match=words):
        pairs(**settings | {"pieces": [b"a", b"b", b""], "eot": 2} | changes)


def ranked(environment, **changes):
    return ranked_pairs(environment, **dict(sequence_length=T, train_pairs=60, heldout_pairs=20) | changes)


@given(seed=st.integers(0, 100), correct=st.sampled_from([0.2, 0.5]), vocabulary=st.sampled_from(["own", "bytes"]))
@settings(deadline=None, max_examples=15)
def test_without_noise_the_chosen_answer_has_the_higher_reward(seed, correct, vocabulary):
    data = ranked(Countdown(3), correct=correct, vocabulary=vocabulary, seed=seed)
    train, heldout = both(data)
    assert (len(train), len(heldout)) == (60, 20) and isinstance(data.environment, Countdown)
    for prompt, chosen, rejected in train + heldout:
        assert (data.environment.check(prompt, chosen), data.environment.check(prompt, rejected)) == (1, 0)
    assert not {prompt for prompt, *_ in train} & {prompt for prompt, *_ in heldout}


def test_a_bug_is_learnt_from_the_proxy_and_not_from_gold():
    environment = UncountedSorting(3)
    by_check, by_gold = (
        sum(both(ranked(environment, gold=gold, train_pairs=300, correct=0.2)), []) for gold in (False, True)
    )
    gold = [np.mean([environment.gold(prompt, chosen) for prompt, chosen, _ in rows]) for rows in (by_check, by_gold)]
    assert gold[0] < 0.8 and gold[1] == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1e-3])
def test_noise_is_that_of_bradley_and_terry(temperature):
    data = ranked(Countdown(3), temperature=temperature, train_pairs=2500)
    rows, check = sum(both(data), []), data.environment.check
    ahead = [check(prompt, chosen) - check(prompt, rejected) for prompt, chosen, rejected in rows]
    assert all(chosen != rejected for _, chosen, rejected in rows)
    clear = [x > 0 for x in ahead if x]
    # Four standard errors of a share of so many pairs.
    assert np.mean(clear) == pytest.approx(expit(1 / temperature), abs=2 / len(clear) ** 0.5)
    assert 0 in ahead, "equal rewards are told apart by chance"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"correct": 1.0}, "100 problems of permutations-3x5 in a row gave no two answers to be told apart"),
        ({"correct": -0.1}, "correct=-0.1 must be from 0 to 1"),
        ({"temperature": -1.0}, "temperature=-1.0 at least 0"),
        ({"train_pairs": 0}, "train_pairs=0 and heldout_pairs=20 must be at least 1"),
        ({"sequence_length": 5}, "sequence_length=5 must be at least"),
        ({"environment": Permutations(2, 5), "heldout_pairs": 1}, "permutations-2x5 has too few training problems"),
    ],
)
def test_environments_that_give_no_pairs_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ranked(**{"environment": Permutations(3, 5)} | changes)


def test_the_configs_make_pairs(tmp_path):
    names = ("prompt", "chosen", "rejected")
    lines = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in many())
    (tmp_path / "mine.jsonl").write_text(lines)
    overrides = {
        "preferences": [f"data.path={tmp_path}/mine.jsonl", f"data.sequence_length={T}"],
        "ranked_pairs": ["data.tokens.train_pairs=50"],
    }
    for name, more in overrides.items():
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", overrides=[f"data={name}", *more]).data
        data = instantiate(config.tokens)
        tokens = torch.from_numpy(data.train.astype(np.int64)).view(-1, 2, config.sequence_length)
        assert data.group == 2 and (tokens[:, 0] != tokens[:, 1]).any(1).all()
