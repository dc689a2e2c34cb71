"""Tasks: rewards of answers by the environment that asked, and the scores of a model on held-out prompts.

Shape letters: B sequences, T tokens, P prompts, S answers to each.
"""

from collections import Counter, defaultdict
from math import comb, sqrt

import numpy as np
import torch
from torch import Tensor

from archs.language_model import LanguageModel
from experiments.data.environments.contracts import Environment
from experiments.data.token_data import TokenData
from experiments.data.windows import heldout_windows
from experiments.harness.sharding import whole
from objectives.contracts import Batch, Objective, Request, Sampler
from objectives.post_training.reward_model import LearntReward
from objectives.post_training.tuning import Reward, Trained, evaluating, prompts_of

NORMAL = 1.959964  # of a 95 % interval
SCORING_SEED = 2  # the same chance for every run
AT_ONCE = 512  # answers written together


class TaskReward(Reward):
    """The environment's own check of each answer, which costs no FLOPs."""

    def __init__(self, environment: Environment, data: TokenData):
        self.environment, self.data = environment, data

    def __call__(self, tokens_BT: Tensor, drawn_BT: Tensor) -> Tensor:
        found = [self.environment.check(*texts) for texts in texts_of(self.data, tokens_BT, drawn_BT)]
        return torch.tensor(found, dtype=torch.float64)

    def flops(self, T: int) -> float:
        return 0.0


def reward_of(data: TokenData, judge: Trained | None) -> Reward:
    """The reward that a model gives, or the environment of the data where there is none.

    Raises:
        ValueError: when there is neither.
    """
    if judge is not None:
        return LearntReward(judge)
    if data.environment is None:
        raise ValueError(
            f"{data.name} has no environment that could check an answer: choose data that does, as data=countdown, or "
            "give a reward model, as objective.models.reward=<run>"
        )
    return TaskReward(data.environment, data)


def texts_of(data: TokenData, tokens_BT: Tensor, answer_BT: Tensor) -> list[tuple[bytes, bytes]]:
    """The bytes of prompts and answers of sequences; the end-of-text token is none."""
    found = []
    for tokens_T, answer_T in zip(tokens_BT.cpu(), answer_BT.cpu(), strict=True):
        first = int(answer_T.byte().argmax()) if answer_T.any() else len(tokens_T)
        parts = tokens_T[:first], tokens_T[answer_T]
        prompt, answer = (b"".join(data.pieces[i] for i in part.tolist() if i != data.eot) for part in parts)
        found.append((prompt, answer))
    return found


def heldout_problems(data: TokenData, sequence_length: int) -> Batch:
    """Return all held-out problems with their answers, one to a window; of windows that stand together, each of which
    has the same prompt, the first.

    Raises:
        ValueError: for data that mark no answers.
    """
    if data.heldout_answers is None:
        raise ValueError(f"{data.name} marks no answers: choose data that does, such as data=countdown")
    streams = (data.heldout, data.heldout_answers)
    tokens, marks = (heldout_windows(x, sequence_length)[0][:: data.group] for x in streams)
    return Batch(tokens, marks.float())


def score(
    model: LanguageModel,
    objective: Objective,
    data: TokenData,
    sequence_length: int,
    prompts: int,
    samples: int,
    sampler: Sampler | None = None,
) -> dict[str, dict[str, list[float]]]:
    """By task, the scores of a model on the first held-out prompts, each with its 95 % interval as [value, low, high].
    sampler: how answers are written; None for the default of the objective.

    pass@k: the probability that one of k answers is right, without bias (Chen et al., arXiv 2107.03374, equation 1).
    gold@k: the same by what the reward ought to be, for environments that say so.
    majority: that the most frequent of `samples` answers is; one of those that are equally frequent is taken by chance.
    length: mean tokens of an answer, its end included; ended: the fraction of answers that have one.

    Raises:
        ValueError: for data without an environment.
    """
    environment = data.environment
    if environment is None:
        raise ValueError(f"{data.name} has no environment that could check an answer")
    questions = prompts_of(heldout_problems(data, sequence_length))[:prompts]
    values: dict[str, list[dict[str, float]]] = defaultdict(list)
    generator, at_once = torch.Generator().manual_seed(SCORING_SEED), max(1, AT_ONCE // samples)
    device = model.embedding.weight.device
    for start in range(0, len(questions), at_once):
        some = [prompt_T.to(device) for prompt_T in questions[start : start + at_once]]
        with whole(model), evaluating(model):
            written = objective.sample(
                model, Request(some, sequence_length, generator, copies=samples, stop=(data.eot,)), sampler
            )
        answer_BT = written.answers_BT
        ended_B = (answer_BT & (written.tokens_BT == data.eot)).any(1)
        texts = texts_of(data, written.tokens_BT, answer_BT)
        for p in range(0, len(texts), samples):
            here = slice(p, p + samples)
            prompt, found = texts[p][0], _of_prompt(environment, texts[here])
            found["length"] = answer_BT[here].sum(1).double().mean().item()
            found["ended"] = ended_B[here].double().mean().item()
            values[environment.task(prompt)].append(found)
    return {
        task: {name: estimate(np.array([row[name] for row in rows])) for name in rows[0]}
        for task, rows in sorted(values.items())
    }


def _of_prompt(environment: Environment, texts: list[tuple[bytes, bytes]]) -> dict[str, float]:
    counts, samples = Counter(texts), len(texts)
    checks = {"pass": environment.check}
    if type(environment).gold is not Environment.gold:
        checks["gold"] = environment.gold
    found = {}
    for name, check in checks.items():
        right = sum(n for text, n in counts.items() if check(*text) == 1)
        found |= {f"{name}@{k}": pass_at(k, samples, right) for k in (1, 4, 16, 64, 256) if k <= samples}
    most = [text for text, n in counts.items() if n == max(counts.values())]
    return found | {"majority": sum(environment.check(*text) == 1 for text in most) / len(most)}


def pass_at(k: int, samples: int, right: int) -> float:
    """The probability that k of the samples, drawn without replacement, hold one of those that are right."""
    return 1 - comb(samples - right, k) / comb(samples, k)


def estimate(values_P: np.ndarray) -> list[float]:
    """The mean over prompts and its 95 % interval as [value, low, high]: for fractions Wilson's, of as many prompts as
    would have this spread if each were all or nothing; for other numbers the normal one."""
    n, mean = len(values_P), float(values_P.mean())
    spread = float(values_P.var(ddof=1)) if n > 1 else 0.0
    if values_P.min() < 0 or values_P.max() > 1:
        reach = NORMAL * sqrt(spread / n)
        return [mean, mean - reach, mean + reach]
    effective = max(n, n * mean * (1 - mean) / spread) if spread else n
    z2 = NORMAL**2 / effective
    centre, reach = (
        (mean + z2 / 2) / (1 + z2),
        NORMAL / (1 + z2) * sqrt(mean * (1 - mean) / effective + z2 / 4 / effective),
    )
    return [mean, min(mean, max(0.0, centre - reach)), max(mean, min(1.0, centre + reach))]
