"""Problems of an environment as data: one problem and one answer to a window."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

import numpy as np

from experiments.data.environments.contracts import Environment, Problem
from experiments.data.examples import ByteVocabulary, Example, example_data, held_out
from experiments.data.token_data import TokenData

HELDOUT = 0.1  # of all prompts, by their hash
PATIENCE = 1000  # draws in a row that bring no new problem before there are said to be no more
Vocabulary = Literal["own", "bytes"]


def environment_data(
    environment: Environment,
    sequence_length: int,
    train_problems: int,
    heldout_problems: int,
    demonstrations: int = 1,
    correct: float = 1.0,
    vocabulary: Vocabulary = "own",
    seed: int = 0,
    fill: bool = False,
    known: bool = False,
) -> TokenData:
    """Returns windows of a prompt, an answer, eot and padding, in which the answer and eot are learnt.

    A tenth of all prompts, told by their hash, is held out; no prompt stands on both sides, and no problem is drawn
    twice. Held-out answers are right, and `heldout_bytes` are theirs: bits per byte are the bits of an answer with its
    end per byte of it.

    Args:
        environment: where problems come from.
        sequence_length: T, enough for the longest prompt and answer and eot.
        train_problems, heldout_problems: of each part. The held-out ones do not depend on train_problems.
        demonstrations: windows of each training problem, each with an answer of its own.
        correct: chance that such an answer is the right one, from 0 to 1; else it is an attempt of the environment.
        vocabulary: "own" is NUL, the environment's alphabet and eot; "bytes" that of `ByteTokenizer`.
        seed: of the draws.
        fill: put eot in place of padding, and learn it, so that a model which fills whole windows learns how long an
            answer is (LLaDA, arXiv 2502.09992, section 2.3).
        known: hold out nothing: the first of the problems that are trained on are asked again, to see what is
            remembered.

    Raises:
        ValueError: a setting is out of range, or the environment does not have so many problems.
    """
    check_length(environment, sequence_length)
    if demonstrations < 1 or not 0 <= correct <= 1:
        raise ValueError(f"demonstrations={demonstrations} must be at least 1, and correct={correct} from 0 to 1")
    ids = vocabulary_of(environment, vocabulary)
    if train_problems < 1 or heldout_problems < 1:
        raise ValueError(f"train_problems={train_problems} and heldout_problems={heldout_problems} must be at least 1")
    random = np.random.default_rng([seed, 1])
    train = list(islice(problems(environment, False, random), train_problems))
    unseen = problems(environment, True, np.random.default_rng([seed, 0]))
    heldout = islice(train if known else unseen, heldout_problems)
    answered = [
        Problem(problem.prompt, demonstration(environment, problem, correct, random))
        for problem in train
        for _ in range(demonstrations)
    ]

    def windows(part: Iterable[Problem]) -> Iterator[list[Example]]:
        for problem in part:
            yield [Example.of(ids.encode(problem.prompt), ids.encode(problem.answer), ids.eot)]

    return example_data(
        windows(answered),
        windows(heldout),
        sequence_length,
        ids.pieces,
        ids.eot,
        name=f"{environment.name}/{vocabulary}",
        fill=fill,
        environment=environment,
    )


def check_length(environment: Environment, sequence_length: int) -> None:
    """
    Raises:
        ValueError: the longest problem and its end are longer than a window.
    """
    if sequence_length < (needed := sum(environment.longest) + 1):
        raise ValueError(
            f"sequence_length={sequence_length} must be at least {needed}: {environment.name} has prompts of up to "
            f"{environment.longest[0]} bytes, answers of up to {environment.longest[1]}, and eot"
        )


def vocabulary_of(environment: Environment, vocabulary: Vocabulary) -> ByteVocabulary:
    """Returns the ids in which an environment is written."""
    return ByteVocabulary(b"\0" + environment.alphabet if vocabulary == "own" else bytes(range(256)))


def demonstration(environment: Environment, problem: Problem, correct: float, random: np.random.Generator) -> bytes:
    """Returns the problem's answer with this chance, and else an attempt."""
    return problem.answer if random.random() < correct else environment.attempt(problem.prompt, random)


def problems(environment: Environment, heldout: bool, random: np.random.Generator) -> Iterator[Problem]:
    """Yields problems of different prompts without end, all of which are held out, or none.

    Raises:
        ValueError: when there seem to be no more.
    """
    part, seen, idle = "held-out" if heldout else "training", set(), 0
    while idle < PATIENCE:
        problem = environment.problem(random)
        idle += 1
        if problem.prompt not in seen and held_out(problem.prompt, HELDOUT) == heldout:
            seen.add(problem.prompt)
            idle = 0
            yield problem
    raise ValueError(
        f"{environment.name} has too few {part} problems: {PATIENCE} draws in a row brought nothing new "
        f"after {len(seen)}; ask for fewer, or for more difficult ones"
    )
