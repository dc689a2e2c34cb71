"""Preferences that are made: two answers to a problem of an environment, ranked by its reward."""

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
from scipy.special import expit

from experiments.data.environment_data import (
    Vocabulary,
    check_length,
    demonstration,
    problems,
    vocabulary_of,
)
from experiments.data.environments.contracts import Environment, Problem
from experiments.data.preferences import pairs
from experiments.data.token_data import TokenData

TRIES = 100  # pairs of answers to a problem, and problems in a row without any, before it is given up


def ranked_pairs(
    environment: Environment,
    sequence_length: int,
    train_pairs: int,
    heldout_pairs: int,
    correct: float = 0.5,
    temperature: float = 0.0,
    gold: bool = False,
    vocabulary: Vocabulary = "own",
    seed: int = 0,
) -> TokenData:
    """Returns pairs of answers to problems (see `pairs`), of which the better one is the chosen one, or mostly.

    Each pair is two different answers to a problem of its own; a tenth of all prompts is held out, as in
    `environment_data`. Without noise their rewards differ; problems that give no such pair are passed over.

    Args:
        environment: where problems, attempts and rewards come from.
        sequence_length: T, enough for the longest prompt and answer and eot.
        train_pairs, heldout_pairs: of each part. The held-out ones do not depend on train_pairs.
        correct: chance that an answer is the right one, from 0 to 1; else it is an attempt of the environment.
        temperature: 0 for rewards without noise; above, an answer is chosen with probability sigmoid(difference of the
            rewards / temperature) (Bradley and Terry, Biometrika 39, 1952), in the held-out pairs as well.
        gold: rank by the environment's `gold` in place of its `check`.
        vocabulary: as in `environment_data`.
        seed: of the draws.

    Raises:
        ValueError: a setting is out of range, or the environment has not so many problems, or no two answers to one.
    """
    check_length(environment, sequence_length)
    if train_pairs < 1 or heldout_pairs < 1:
        raise ValueError(f"train_pairs={train_pairs} and heldout_pairs={heldout_pairs} must be at least 1")
    if not (0 <= correct <= 1 and 0 <= temperature < math.inf):
        raise ValueError(f"correct={correct} must be from 0 to 1, and temperature={temperature} at least 0 and finite")
    reward = environment.gold if gold else environment.check
    ids = vocabulary_of(environment, vocabulary)

    def ranked(problem: Problem, random: np.random.Generator) -> tuple[bytes, bytes] | None:
        for _ in range(TRIES):
            a, b = (demonstration(environment, problem, correct, random) for _ in range(2))
            ahead = reward(problem.prompt, a) - reward(problem.prompt, b)
            if a != b and (ahead or temperature):
                chance = expit(ahead / temperature) if temperature else float(ahead > 0)
                return (a, b) if random.random() < chance else (b, a)
        return None

    def rows(heldout: bool) -> Iterator[tuple[bytes, bytes, bytes]]:
        random, without = np.random.default_rng([seed, 0 if heldout else 1]), 0
        for problem in problems(environment, heldout, random):
            pair = ranked(problem, random)
            without = 0 if pair else without + 1
            if pair:
                yield problem.prompt, *pair
            elif without == TRIES:
                raise ValueError(
                    f"{TRIES} problems of {environment.name} in a row gave no two answers to be told apart: choose "
                    f"another correct={correct}, or noise by data.tokens.temperature"
                )

    drawn = [*islice(rows(True), heldout_pairs), *islice(rows(False), train_pairs)]
    prompts, chosen, rejected = ([ids.encode(row[i]) for row in drawn] for i in range(3))
    return pairs(
        prompts,
        chosen,
        rejected,
        sequence_length,
        ids.pieces,
        ids.eot,
        heldout=heldout_pairs,
        name=f"{environment.name}-pairs/{vocabulary}",
        environment=environment,
    )
