"""Conversations as data: whole ones in every window, of which only what the assistant says is learnt.

A conversation is written as a marker of the role, the text and a marker of the end, turn by turn, and then eot. Markers
are control bytes, so they stand in every vocabulary of bytes and of byte-level BPE; they are encoded by themselves, so
that no token reaches across a turn's edge, and text that holds one is refused.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from experiments.data.corpora import Table, text_bytes
from experiments.data.examples import Example, example_data, fitting, held_out, packed
from experiments.data.token_data import TokenData, Tokenizer, encode_without_loss, token_dtype

ROLES = {"system": b"\x01", "user": b"\x02", "assistant": b"\x03"}
END = b"\x04"  # of a turn
RESERVED = b"\0" + b"".join(ROLES.values()) + END  # padding and markers, which no text may hold


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation: the side that speaks, and its text."""

    role: str
    text: bytes

    @property
    def segments(self) -> tuple[bytes, bytes, bytes]:
        """Returns its marker, its text and its end, which are encoded one by one."""
        return ROLES[self.role], self.text, END


def chat(
    corpus: Table,
    tokenizer: Tokenizer,
    sequence_length: int,
    heldout_fraction: float,
    drop_longer: bool = False,
    fill: bool = False,
) -> TokenData:
    """Returns conversations as data, from rows with `messages`: [{"role": ..., "content": ...}, ...].

    The assistant's texts are learnt with the end of their turns, and eot where it follows one; the rest is given.
    Conversations are whole: those of a window are chosen best fit first, longest first, and its rest is padding. Exact
    duplicates are dropped. One is held out when the sha256 of what stands before its first answer, read as a number in
    [0, 1), is below heldout_fraction, so the same question is never on both sides. `heldout_bytes` are those of the
    held-out answers, and one for each end of a turn.

    Args:
        corpus: where the rows come from.
        tokenizer: fitted to the training texts where it has to be.
        sequence_length: T of the windows.
        heldout_fraction: between 0 and 1.
        drop_longer: leave out conversations that are longer than a window, and log how many. They are never cut, since
            a cut answer would teach an end that it does not have.
        fill: one conversation to a window, and behind it as many eot as find room, all learnt. So a model that denoises
            all places at once learns how long an answer is (LLaDA, arXiv 2502.09992). Wants data.packed=false, since a
            window is then one document.

    Raises:
        ValueError: a row is no conversation or says nothing to be learnt, conversations are longer than a window, or
            one of the two parts is empty.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie between 0 and 1")
    found = {}
    for where, row in corpus.rows(["messages"]):
        turns = turns_of(row["messages"], where)
        if all(turn.role != "assistant" for turn in turns):
            raise ValueError(f"{where} has no turn of the assistant, so there is nothing to learn from it")
        found[hashlib.sha256(written(turns)).digest()] = turns
    conversations = [found[digest] for digest in sorted(found)]
    heldout = [held_out(written(asked(turns)), heldout_fraction) for turns in conversations]
    tokenizer = fitted(
        tokenizer, [turn.text for turns, held in zip(conversations, heldout, strict=True) if not held for turn in turns]
    )
    examples = list(conversation_examples(conversations, tokenizer))
    fit = fitting([len(example.tokens) for example in examples], sequence_length, drop_longer, "conversations")

    def windows(part: bool) -> list[list[Example]]:
        rows = zip(examples, heldout, fit, strict=True)
        chosen = [example for example, held, fits in rows if fits and held == part]
        return [[example] for example in chosen] if fill else packed(chosen, sequence_length)

    return example_data(
        windows(False),
        windows(True),
        sequence_length,
        tokenizer.pieces,
        tokenizer.eot,
        name=f"{corpus.name}/{tokenizer.name}",
        padding=tokenizer.pieces.index(b"\0"),
        fill=fill,
    )


def turns_of(messages: object, where: str) -> list[Turn]:
    """Returns the turns of a list of messages.

    Raises:
        ValueError: it is no such list, or a text holds a marker; the message says where it stands.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} must have a list of messages, each with role and content, and has {messages!r:.80}")
    turns = []
    for number, message in enumerate(messages, 1):
        here = f"{where}, message {number}"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"{here} must have a role of {', '.join(ROLES)} and has {role!r}")
        turns.append(Turn(role, unmarked(text_bytes(message.get("content"), f"{here}, content"), here)))
    return turns


def unmarked(text: bytes, where: str) -> bytes:
    """Returns the text as it is.

    Raises:
        ValueError: it holds a byte that is a marker or padding.
    """
    if marks := sorted(set(text) & set(RESERVED)):
        raise ValueError(f"{where} has the control byte {marks[0]:#04x}, which marks turns: take it out of the text")
    return text


def written(turns: Sequence[Turn]) -> bytes:
    """Returns turns as bytes."""
    return b"".join(segment for turn in turns for segment in turn.segments)


def asked(turns: list[Turn]) -> list[Turn]:
    """Returns what stands before the first answer; all where the assistant begins."""
    roles = [turn.role for turn in turns]
    return turns[: roles.index("assistant")] or turns


def fitted(tokenizer: Tokenizer, texts: list[bytes]) -> Tokenizer:
    """Returns the tokenizer, trained on these texts where it is one that has to be."""
    with TemporaryDirectory() as folder:
        return tokenizer.fit(texts, Path(folder))


def conversation_examples(conversations: Sequence[Sequence[Turn]], tokenizer: Tokenizer) -> Iterator[Example]:
    """Yields the ids of each conversation and what is learnt of it."""
    segments = [[segment for turn in turns for segment in turn.segments] for turns in conversations]
    for turns, ids in zip(conversations, encoded(segments, tokenizer), strict=True):
        # Of each turn the marker is given, and text and end are learnt or not; eot as the end in front of it.
        answers = [turn.role == "assistant" for turn in turns]
        learnt = [learnt for answer in answers for learnt in (False, answer, answer)]
        marks = np.repeat([*learnt, answers[-1]], [*map(len, ids), 1])
        yield Example(np.concatenate([*ids, np.array([tokenizer.eot], ids[0].dtype)]), marks)


def encoded(documents: Sequence[Sequence[bytes]], tokenizer: Tokenizer) -> Iterator[list[np.ndarray]]:
    """Yields the ids of each segment of each document: no token reaches across a segment's edge."""
    dtype = token_dtype(len(tokenizer.pieces))
    ids = iter(encode_without_loss(tokenizer, [segment for segments in documents for segment in segments]))
    for segments in documents:
        yield [next(ids).astype(dtype) for _ in segments]
