"""Multi-query associative recall: pairs of a key and a value, then the keys again, each to be answered by its value.

Shape letters: N sequences, T tokens, K keys, V values, P pairs, S slots of two tokens.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from experiments.data.token_data import TokenData, token_dtype

AT_ONCE = 4096  # sequences drawn together
EOT = 0  # stands in front of a sequence and never in it


def draw_sequences(
    number: int,
    pairs: int,
    vocab_size: int,
    sequence_length: int,
    power: float,
    random: np.random.Generator,
    queries: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens_NT, answers_NT): int64 sequences with this number of pairs, and bool marks at the answers.

    The task is that of Arora et al. (arXiv 2312.04927, Zoology). Keys are 1 .. V / 2 - 1 and values V / 2 .. V - 1,
    each distinct within a sequence. First the pairs, k v k v ...; behind them slots of two tokens. Each key comes once
    more, or as often as there are to be queries, at the start of a slot drawn without replacement with odds power *
    s^(power - 1) for slot s = 1, 2, ... (small powers ask early, 1 asks anywhere), and its value follows: the answer.
    The other places are filled with random tokens.

    Two things differ from the published generator, where any token fills: no filler is a key of the sequence, since in
    a small vocabulary that would often put a second value behind a key; and the answer stands in the sequence behind
    its query, where theirs has a random token, so that the task is one of plain next tokens.
    """
    keys, values, slots = vocab_size // 2 - 1, vocab_size // 2, sequence_length // 2
    key_NK = 1 + random.random((number, keys)).argsort(1)
    value_NV = values + random.random((number, values)).argsort(1)
    # The largest of log-odds plus Gumbel noise are a draw without replacement.
    log_odds = (power - 1) * np.log(np.arange(1, slots - pairs + 1))
    slot_NS = (log_odds + random.gumbel(size=(number, slots - pairs))).argsort(1)[:, ::-1]

    others = np.concatenate([key_NK[:, pairs:], value_NV], axis=1)
    chosen = random.integers(others.shape[1], size=(number, sequence_length))
    tokens_NT = np.take_along_axis(others, chosen, axis=1)
    answers_NT = np.zeros(tokens_NT.shape, bool)
    pair_NS2 = tokens_NT.reshape(number, slots, 2)  # a view
    shown_NP2 = np.stack([key_NK[:, :pairs], value_NV[:, :pairs]], axis=2)
    asked_NP1 = (pairs + slot_NS[:, : queries * pairs])[..., None]
    pair_NS2[:, :pairs] = shown_NP2
    np.put_along_axis(pair_NS2, asked_NP1, np.tile(shown_NP2, (1, queries, 1)), axis=1)
    np.put_along_axis(answers_NT.reshape(number, slots, 2)[..., 1:], asked_NP1, True, axis=1)
    return tokens_NT, answers_NT


def associative_recall(
    vocab_size: int,
    pairs: Sequence[int],
    sequence_length: int,
    train_sequences: int,
    heldout_sequences: int,
    power: float,
    seed: int,
    queries: int = 1,
) -> TokenData:
    """Sequences of the task as data, end to end, with the answers marked (see `draw_sequences`).

    One answer counts as one byte, so bits per byte are bits per answer. A model that knows which values were shown, but
    not which key they belong to, has log2(pairs) of them.

    Args:
        vocab_size: V, even; id 0 is eot.
        pairs: numbers of pairs; each has the same number of sequences.
        sequence_length: T, even. A window of this length is one sequence.
        train_sequences, heldout_sequences: of each number of pairs.
        power: > 0, of the distribution that slots are drawn from; 0.01 as published.
        seed: of the draws; the held-out ones do not depend on train_sequences.
        queries: how often each key is asked for; 1 as published. More of them are more to learn from per token.

    Raises:
        ValueError: a setting is out of range, or so many pairs find no place in the sequence or the vocabulary.
    """
    pairs = list(pairs)
    if vocab_size < 4 or vocab_size % 2:
        raise ValueError(f"vocab_size={vocab_size} must be even and at least 4: one half keys, the other values")
    if sequence_length < 4 or sequence_length % 2:
        raise ValueError(f"sequence_length={sequence_length} must be even and at least 4")
    if queries < 1:
        raise ValueError(f"queries={queries} must be at least 1 of each key")
    room = sequence_length // 2 // (1 + queries)
    fit = min(vocab_size // 2 - 1, room)
    if not pairs or min(pairs) < 1 or max(pairs) > fit:
        raise ValueError(
            f"pairs={pairs} must be numbers from 1 to {fit}: sequence_length={sequence_length} has room for {room} "
            f"pairs with queries={queries} of each, and vocab_size={vocab_size} has {vocab_size // 2 - 1} keys"
        )
    if train_sequences < 1 or heldout_sequences < 1:
        raise ValueError(
            f"train_sequences={train_sequences} and heldout_sequences={heldout_sequences} must be at least 1"
        )
    if not power > 0:
        raise ValueError(f"power={power} must be above 0")
    dtype = token_dtype(vocab_size)

    def stream(sequences: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([seed, part])
        parts = [
            draw_sequences(min(AT_ONCE, sequences - start), number, vocab_size, sequence_length, power, random, queries)
            for number in pairs
            for start in range(0, sequences, AT_ONCE)
        ]
        tokens, answers = zip(*parts, strict=True)
        return np.concatenate([x.astype(dtype) for x in tokens], axis=None), np.concatenate(answers, axis=None)

    heldout, heldout_answers = stream(heldout_sequences, 0)
    train, train_answers = stream(train_sequences, 1)
    digest = hashlib.sha256(f"{vocab_size} ".encode())
    for part in (heldout, heldout_answers, train, train_answers):
        digest.update(part.tobytes())
    keys, values = range(1, vocab_size // 2), range(vocab_size // 2)
    return TokenData(
        train=train,
        heldout=heldout,
        heldout_bytes=int(heldout_answers.sum()),
        vocab_size=vocab_size,
        eot=EOT,
        digest=digest.hexdigest(),
        name=f"associative_recall/{'+'.join(map(str, pairs))}",
        pieces=[b"", *(f"k{i} ".encode() for i in keys), *(f"v{i} ".encode() for i in values)],
        train_answers=train_answers,
        heldout_answers=heldout_answers,
    )
