"""Preferences as data: two answers to a prompt, window by window, the chosen one first."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.data.chat import ROLES, encoded, fitted, turns_of
from experiments.data.corpora import Table, text_bytes
from experiments.data.environments.contracts import Environment
from experiments.data.examples import Example, example_data, fitting, held_out
from experiments.data.token_data import TokenData, Tokenizer

FIELDS = ("prompt", "chosen", "rejected")
Ids = Sequence[int] | np.ndarray  # one-dimensional
Text = tuple[bytes, ...]  # segments, which are encoded one by one


def pairs(
    prompts: Sequence[Ids],
    chosen: Sequence[Ids],
    rejected: Sequence[Ids],
    sequence_length: int,
    pieces: list[bytes],
    eot: int,
    heldout: int,
    padding: int = 0,
    name: str = "pairs",
    environment: Environment | None = None,
) -> TokenData:
    """Returns pairs of answers as data: groups of two windows, prompt, chosen answer, eot and padding, and the same
    with the rejected answer. Answers and eot are learnt. `heldout_bytes` are those of both answers.

    Args:
        prompts, chosen, rejected: ids of each pair, without eot.
        sequence_length: T of a window.
        pieces, eot: the vocabulary.
        heldout: how many pairs are held out: the first ones.
        padding: an id that is not eot.
        name, environment: as in `TokenData`.

    Raises:
        ValueError: the lists are not as long as one another, an answer with its prompt is longer than a window, or one
            of the two parts is empty.
    """
    if not len(prompts) == len(chosen) == len(rejected) > heldout > 0:
        raise ValueError(
            f"{len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} rejected answers must be as many, and "
            f"more than the heldout={heldout} of them that are held out, which must be at least 1"
        )
    answered = [
        Example.of(np.asarray(prompt, int), np.asarray(answer, int), eot)
        for prompt, *both in zip(prompts, chosen, rejected, strict=True)
        for answer in both
    ]
    fitting([len(example.tokens) for example in answered], sequence_length, False, "answers with their prompts")
    windows = [[example] for example in answered]
    return example_data(
        windows[2 * heldout :],
        windows[: 2 * heldout],
        sequence_length,
        pieces,
        eot,
        name,
        padding=padding,
        group=2,
        environment=environment,
    )


def preferences(
    corpus: Table,
    tokenizer: Tokenizer,
    sequence_length: int,
    heldout_fraction: float,
    drop_longer: bool = False,
) -> TokenData:
    """Returns pairs of answers (see `pairs`) from rows with `prompt`, `chosen` and `rejected`.

    All three are texts, an answer standing behind its prompt as it is. Or they are lists of messages, written as `chat`
    does: the last one of `chosen` and of `rejected` is the assistant's, and the answer with the end of its turn. Where
    both begin with the whole conversation, `prompt` may be the text of what the user says in it.

    Exact duplicates are dropped. A pair is held out when the sha256 of its prompt, read as a number in [0, 1), is below
    heldout_fraction.

    Args:
        corpus: where the rows come from.
        tokenizer: fitted to the training texts where it has to be.
        sequence_length: T of a window.
        heldout_fraction: between 0 and 1.
        drop_longer: leave out pairs of which an answer with prompt and eot is longer than a window, and log how many.

    Raises:
        ValueError: a row is no such pair, pairs are longer than a window, or one of the two parts is empty.
    """
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie between 0 and 1")
    found = {pair_of(row, where) for where, row in corpus.rows(FIELDS)}
    by_hash = sorted(found, key=lambda pair: hashlib.sha256(repr(pair).encode()).digest())
    heldout, train = [], []
    for pair in by_hash:
        (heldout if held_out(b"".join(pair[0]), heldout_fraction) else train).append(pair)
    tokenizer = fitted(tokenizer, [segment for pair in train for text in pair for segment in text])

    def ids(rows: list[tuple[Text, Text, Text]]) -> list[tuple[np.ndarray, ...]]:
        texts = (np.concatenate(parts) for parts in encoded([text for pair in rows for text in pair], tokenizer))
        return list(zip(texts, texts, texts, strict=True))

    heldout_ids, train_ids = ids(heldout), ids(train)
    lengths = [len(prompt) + max(len(a), len(b)) + 1 for prompt, a, b in heldout_ids + train_ids]
    fit = fitting(lengths, sequence_length, drop_longer, "pairs")
    kept = [pair for pair, fits in zip(heldout_ids + train_ids, fit, strict=True) if fits]
    prompts, chosen, rejected = zip(*kept, strict=True) if kept else ((), (), ())
    return pairs(
        prompts,
        chosen,
        rejected,
        sequence_length,
        tokenizer.pieces,
        tokenizer.eot,
        heldout=sum(fit[: len(heldout)]),
        padding=tokenizer.pieces.index(b"\0"),
        name=f"{corpus.name}/{tokenizer.name}",
    )


def pair_of(row: Mapping[str, Any], where: str) -> tuple[Text, Text, Text]:
    """Returns the prompt and the two answers of a row.

    Raises:
        ValueError: it is no pair; the message says where it stands.
    """
    if all(isinstance(row[field], str) for field in FIELDS):
        prompt, chosen, rejected = (text_bytes(row[field], f"{where}, field {field!r}") for field in FIELDS)
        return (prompt,), (chosen,), (rejected,)
    texts = [field for field in FIELDS[1:] if isinstance(row[field], str)]
    if texts or not isinstance(row["prompt"], (str, list)):
        raise ValueError(
            f"{where} must have prompt, chosen and rejected all as texts or all as lists of messages; of "
            f"{', '.join(f'{field} {type(row[field]).__name__}' for field in FIELDS)} one is not"
        )
    given = turns_of(row["prompt"], f"{where}, prompt") if isinstance(row["prompt"], list) else []
    chosen, rejected = (given + turns_of(row[field], f"{where}, {field}") for field in FIELDS[1:])
    if chosen[:-1] != rejected[:-1] or {chosen[-1].role, rejected[-1].role} != {"assistant"}:
        raise ValueError(f"{where}: chosen and rejected must differ in their last message alone, the assistant's")
    if isinstance(row["prompt"], str):
        asked = [turn.text for turn in chosen[:-1] if turn.role == "user"]
        if text_bytes(row["prompt"], where) not in asked:
            raise ValueError(f"{where}: the prompt is a text, but no user says it in the messages of both")
    prompt = tuple(segment for turn in chosen[:-1] for segment in turn.segments)
    return (*prompt, ROLES["assistant"]), chosen[-1].segments[1:], rejected[-1].segments[1:]
