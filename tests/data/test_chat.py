"""Conversations as data: the assistant's words and their ends are learnt and nothing else, whole and once."""

import gzip
import json
import logging

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from experiments.data.chat import END, RESERVED, ROLES, chat
from experiments.data.corpora import HuggingFace, TextFiles
from experiments.data.tokenizers import BPETokenizer, ByteTokenizer
from experiments.data.windows import document_starts

T = 64


class Rows:
    """Conversations in memory."""

    name = "rows"

    def __init__(self, conversations):
        self.conversations = conversations

    def rows(self, fields):
        for number, messages in enumerate(self.conversations, 1):
            yield f"row {number}", {"messages": messages}


class Pieces(ByteTokenizer):
    """In place of BPE: `ab` is one token, padding is not 0, and eot is."""

    name = "pieces"
    eot = 0
    pieces = [b"", b"ab", *(bytes([byte]) for byte in range(256))]

    def encode(self, documents):
        bites = [document.replace(b"ab", b"\xff\xfe") for document in documents]
        return [np.array([1 if b == 255 else b + 2 for b in document if b != 254], np.uint32) for document in bites]


def said(*turns):
    """Messages from role and content one after the other."""
    return [{"role": role, "content": content} for role, content in zip(turns[::2], turns[1::2], strict=True)]


texts = st.text(alphabet="ab ü\n", max_size=6)
turns = st.tuples(st.sampled_from(["user", "assistant", "system"]), texts).map(lambda turn: said(*turn)[0])
conversations = st.tuples(st.lists(turns, max_size=2), texts, st.lists(turns, max_size=1)).map(
    lambda parts: [*parts[0], *said("assistant", parts[1]), *parts[2]]
)


def make(conversations, tokenizer=None, **changes):
    settings = dict(sequence_length=T, heldout_fraction=0.3) | changes
    return chat(Rows(conversations), tokenizer or ByteTokenizer(), **settings)


def many(number=40):
    return [said("user", f"q{i}", "assistant", f"answer {i}") for i in range(number)]


def documents(data, tokens, answers, length=T):
    """(all bytes, learnt bytes, whether eot is learnt) of each document; asserts that the rest is padding."""
    found = []
    for row, marks in zip(tokens.reshape(-1, length), answers.reshape(-1, length), strict=True):
        ends, start = np.flatnonzero(row == data.eot), 0
        for end in ends:
            whole = b"".join(data.pieces[i] for i in row[start:end])
            learnt = b"".join(data.pieces[i] for i in row[start:end][marks[start:end]])
            found.append((whole, learnt, bool(marks[end])))
            start = end + 1
        assert all(data.pieces[i] == b"\0" for i in row[start:]) and not marks[start:].any()
    return found


def expected(messages):
    turns = [(m["role"], m["content"].encode()) for m in messages]
    whole = b"".join(ROLES[role] + content + END for role, content in turns)
    return whole, b"".join(content + END for role, content in turns if role == "assistant"), turns[-1][0] == "assistant"


def both(data, length=T):
    return [
        documents(data, *part, length)
        for part in ((data.train, data.train_answers), (data.heldout, data.heldout_answers))
    ]


@given(drawn=st.lists(conversations, max_size=12), tokenizer=st.sampled_from([ByteTokenizer(), Pieces()]))
@settings(deadline=None, max_examples=40)
def test_every_conversation_is_there_whole_and_once_and_what_is_learnt_are_the_answers(drawn, tokenizer):
    corpus = [*many(), *drawn]
    data = make(corpus, tokenizer)
    train, heldout = both(data)
    assert sorted(train + heldout) == sorted({expected(messages) for messages in corpus})
    assert data.heldout_bytes == sum(len(learnt) for _, learnt, _ in heldout)
    asked = [{whole.partition(ROLES["assistant"])[0] or whole for whole, _, _ in part} for part in (train, heldout)]
    assert not asked[0] & asked[1], "a question stands on one side only"


def test_the_first_token_of_an_answer_is_learnt_from_the_marker_before_it_and_every_turn_of_the_assistant_is():
    data = make(
        [said("system", "s", "user", f"u{i}", "assistant", "xy", "user", "v", "assistant", "") for i in range(40)],
        fill=True,
    )
    row, marks = data.train[:T].tolist(), data.train_answers[:T]
    last_given = [t for t in range(T - 1) if marks[t + 1] and not marks[t]]
    assert [row[t] for t in last_given] == [*ROLES["assistant"], *ROLES["assistant"]]
    first, second = last_given
    assert row[first + 1 : first + 4] == [*b"xy", *END] and marks[first + 1 : first + 4].all() and not marks[first + 4]
    assert row[second + 1 : second + 3] == [*END, data.eot] and marks[second + 1 : second + 3].all()


def test_the_end_after_somebody_else_has_spoken_is_not_learnt():
    data = make([said("user", f"q{i}", "assistant", "a", "user", "bye") for i in range(40)])
    assert all(learnt == b"a" + END and not ended for part in both(data) for _, learnt, ended in part)


def test_padding_is_never_the_end_in_a_vocabulary_whose_end_is_0():
    data = make(many(), Pieces())
    assert data.eot == 0 and (data.train == 0).sum() == data.train_answers[data.train == 0].sum()
    assert (data.train == 2).any() and not data.train_answers[data.train == 2].any()


def test_the_conversations_of_a_window_are_apart_and_its_padding_too():
    data = make([said("user", f"{i}", "assistant", "a") for i in range(60)], sequence_length=20)
    tokens = torch.from_numpy(data.train.astype(np.int64)).view(-1, 20)
    for row, starts in zip(tokens.tolist(), document_starts(tokens, data.eot).tolist(), strict=True):
        first = [row[t] for t in range(20) if starts[t]]
        assert len(first) >= 2 and set(first) <= {2, 0}, "the user's marker, or padding"
        assert all(starts[t] for t in range(1, 20) if row[t] == 2)


def test_filled_windows_hold_one_conversation_and_ends_that_are_all_learnt():
    data = make(many(), fill=True)
    rows, marks = data.train.reshape(-1, T), data.train_answers.reshape(-1, T)
    for row, marked in zip(rows, marks, strict=True):
        first = int(np.argmax(row == data.eot))
        assert (row[first:] == data.eot).all() and marked[first:].all() and 0 not in row
        assert bytes(row[marked & (row != data.eot)].astype(np.uint8)).startswith(b"answer")
    assert len(rows) + len(data.heldout) // T == 40
    assert data.heldout_bytes == make(many()).heldout_bytes


def test_conversations_that_are_longer_than_a_window_are_refused_by_number_or_left_out_and_never_cut(caplog):
    corpus = [*many(), *(said("user", f"{i}", "assistant", "long " * 20) for i in range(3))]
    with pytest.raises(ValueError, match="3 of 43 .* longer than sequence_length=64 tokens, .* has 106"):
        make(corpus)
    with caplog.at_level(logging.WARNING):
        data = make(corpus, drop_longer=True)
    assert "3 of 43 conversations are longer" in caplog.text and "left out" in caplog.text
    assert sorted(sum(both(data), [])) == sorted(map(expected, many()))
    assert len(sum(both(make(corpus, sequence_length=106), 106), [])) == 43


def test_duplicates_are_dropped_and_the_order_of_the_rows_changes_nothing():
    once, twice = make(many()), make([*many(), *reversed(many())])
    assert once.digest == twice.digest and make(many(41)).digest != once.digest


def test_packing_leaves_little_room():
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    data = make([said("user", f"{i:03}" + "u" * length, "assistant", "a") for i, length in enumerate(lengths)])
    for part in (data.train, data.heldout):
        needed = np.count_nonzero(part) / T
        assert len(part) // T <= 1.12 * needed + 1


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet", "hugging face"])
def test_the_same_conversations_come_from_any_file(tmp_path, suffix):
    lines = "\n".join(json.dumps({"messages": messages, "id": 1}) for messages in many()).encode()
    path = tmp_path / f"a.{suffix.replace('hugging face', 'jsonl')}"
    if suffix == "parquet":
        parquet.write_table(pa.table({"messages": many()}), path)
    else:
        path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    (tmp_path / "README.md").write_text("no table")
    corpus = HuggingFace("json", data_files=str(path)) if suffix == "hugging face" else TextFiles(str(tmp_path))
    data = chat(corpus, ByteTokenizer(), T, 0.3)
    assert data.digest == make(many()).digest and data.name == f"{corpus.name}/bytes"


def test_a_trained_vocabulary_keeps_the_edges_of_turns():
    corpus = [said("user", f"{i}: why?", "assistant", f"because !{i}!! of the weather") for i in range(60)]
    data = make(corpus, BPETokenizer(280))
    assert sorted(sum(both(data), [])) == sorted(map(expected, corpus))
    assert data.vocab_size == 280 and data.heldout_bytes == make(corpus).heldout_bytes


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hello", "row 41 must have a list of messages, each with role and content, and has 'hello'"),
        ([], "row 41 must have a list of messages"),
        (["hello"], "row 41, message 1 must have a role of system, user, assistant and has None"),
        (said("user", "a", "tool", "b"), "message 2 must have a role of system, user, assistant and has 'tool'"),
        (said("user", "a", "assistant", None), "row 41, message 2, content must be a string and is NoneType"),
        (said("user", "a"), "row 41 has no turn of the assistant"),
        *((said("user", f"a{chr(mark)}b", "assistant", ""), f"control byte {mark:#04x}") for mark in RESERVED),
    ],
)
def test_rows_that_are_no_conversation_are_named(messages, words):
    with pytest.raises(ValueError, match=words):
        make([*many(), messages])


@pytest.mark.parametrize("fraction", [0, 1, -0.1])
def test_a_part_of_nothing_or_all_cannot_be_held_out(fraction):
    with pytest.raises(ValueError, match=f"heldout_fraction={fraction} must lie between 0 and 1"):
        make(many(), heldout_fraction=fraction)


def test_too_few_conversations_to_hold_any_out_are_refused():
    with pytest.raises(ValueError, match="rows/bytes has 1 windows to train on and 0 bytes of held-out answers"):
        make(many(1), heldout_fraction=0.01)


def test_a_text_file_has_no_rows(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"cannot read .*a.txt: the kinds of files are .jsonl"):
        chat(TextFiles(str(tmp_path / "a.txt")), ByteTokenizer(), T, 0.1)
