"""Scores of tasks: what they are on answers that are known, and how often their intervals hold."""

from itertools import combinations

import numpy as np
import pytest
import torch

from experiments.data.environment_data import environment_data
from experiments.data.environments.sorting import Sorting
from experiments.data.environments.uncounted_sorting import UncountedSorting
from experiments.harness import training
from experiments.harness.run import execute
from experiments.harness.tasks import TaskReward, estimate, pass_at, score, texts_of
from objectives.contracts import Samples
from objectives.decoding.unmasking import Ancestral
from objectives.next_token import NextToken

DATA = environment_data(Sorting(length=2, digits=1), 8, 60, 6)


@pytest.mark.parametrize(("k", "n", "right"), [(1, 5, 2), (2, 5, 2), (4, 5, 1), (5, 5, 0), (3, 6, 6), (2, 6, 1)])
def test_pass_at_k_is_the_chance_that_k_of_the_samples_hold_a_right_one(k, n, right):
    chosen = list(combinations(range(n), k))
    assert pass_at(k, n, right) == pytest.approx(sum(min(c) < right for c in chosen) / len(chosen))


@pytest.mark.parametrize(("chance", "spread"), [(0.02, 0.0), (0.1, 0.3), (0.5, 0.5), (0.95, 0.2)])
def test_the_interval_of_a_score_holds_as_often_as_it_says(chance, spread):
    """Prompts of different difficulty, sixteen answers to each."""
    rng, held, repetitions = np.random.default_rng(0), 0, 1000
    for _ in range(repetitions):
        size = chance * (1 - chance) * spread
        p = rng.beta(*(np.array([chance, 1 - chance]) * (1 / spread - 1)), 128) if size else np.full(128, chance)
        _, low, high = estimate(rng.binomial(16, p) / 16)
        held += low <= chance <= high
    assert 0.925 <= held / repetitions <= 1.0


def test_no_success_and_nothing_but_success_have_intervals_too():
    for value in (0.0, 1.0):
        mean, low, high = estimate(np.full(50, value))
        assert mean == value and high - low == pytest.approx(0.0714, abs=1e-3) and low <= value <= high


def written(chance, samples=64, data=DATA, wrong=lambda numbers: b"0 0", by=None):
    """The scores of a writer that answers each prompt right so often, and who is asked to write by a sampler."""
    environment, ids = data.environment, {piece: i for i, piece in enumerate(data.pieces)}

    class Objective(NextToken):
        def sample(self, model, request, sampler=None):
            assert sampler == by
            rows = []
            for prompt_T in request.prompts:
                numbers = b"".join(data.pieces[i] for i in prompt_T.tolist()).rstrip(b":").split()
                right = b" ".join(sorted(numbers, key=int))
                for copy in range(request.copies):
                    answer = right if copy < chance * request.copies else wrong(numbers)
                    row = [*prompt_T.tolist(), *(ids[bytes([b])] for b in answer), data.eot]
                    rows.append(row)
            tokens = torch.zeros(len(rows), request.length, dtype=torch.long)
            order = torch.full_like(tokens, -1)
            for i, row in enumerate(rows):
                tokens[i, : len(row)] = torch.tensor(row)
                order[i, len(request.prompts[i // request.copies]) : len(row)] = 0
            lengths = torch.tensor([len(row) for row in rows])
            return Samples(tokens, lengths, torch.zeros(tokens.shape), order, 1.0, 1.0)

    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding(1, 1)
    objective = Objective(data.vocab_size, data.eot)
    found = score(model, objective, data, 8, prompts=6, samples=samples, sampler=by)
    assert environment.name in found
    return found[environment.name]


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.75, 1.0])
def test_answers_that_are_known_have_the_scores_that_they_should(chance):
    found = written(chance)
    assert found["pass@1"][0] == pytest.approx(chance)
    assert found["majority"][0] == float(chance > 0.5)
    assert found["pass@64"][0] == float(chance > 0) and found["ended"][0] == 1.0 and found["length"][0] == 4.0


def test_where_the_reward_has_a_bug_scores_by_the_true_check_stand_beside_those_by_the_reward():
    data = environment_data(UncountedSorting(length=2), 8, 40, 6)
    found = written(0.25, data=data, wrong=min)  # the least number alone has the reward
    assert (found["pass@1"][0], found["gold@1"][0], found["gold@64"][0]) == (1, 0.25, 1)
    assert not any(name.startswith("gold") for name in written(0.25))


def test_answers_are_written_by_the_sampler_that_is_asked_for():
    written(0.5, by=Ancestral(3))


@pytest.mark.thorough
def test_a_run_is_scored_by_the_sampler_of_its_config(make_run, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "score", lambda *_, sampler, **__: seen.append(sampler) or {})
    small = ["data=countdown", "data.sequence_length=15", "data.tokens.fill=true", "objective=masked_diffusion"]
    small += ["data.tokens.train_problems=50", "data.tokens.heldout_problems=10", "data.allow_repeats=true"]
    target = "objectives.decoding.unmasking.Ancestral"
    assert execute(make_run(*small, f"data.scoring.sampler={{_target_: {target}, steps: 5}}"))["status"] == "done"
    assert execute(make_run(*small))["status"] == "done"
    assert seen == [Ancestral(5), None]


def test_a_reward_reads_the_bytes_of_an_answer_up_to_its_end():
    tokens = torch.from_numpy(DATA.heldout.astype(np.int64)).view(-1, 8)
    answers = torch.from_numpy(DATA.heldout_answers).view(-1, 8)
    reward = TaskReward(DATA.environment, DATA)
    assert reward(tokens, answers).tolist() == [1.0] * 6 and reward.flops(8) == 0
    left = answers.flip(1).cumsum(1).flip(1)
    assert reward(tokens, answers & (left != 2)).tolist() == [0.0] * 6  # without the last byte before the end
    assert all(prompt.endswith(b":") and not answer.count(b"\0") for prompt, answer in texts_of(DATA, tokens, answers))
