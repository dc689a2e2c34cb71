"""Objectives on the hidden Markov language, whose likelihood, optimal predictor and optimal denoiser are exact."""

import math

import pytest
import torch
from hydra.utils import instantiate
from torch.nn.functional import one_hot, pad

from archs.visibility import CAUSAL, Visibility
from experiments.data.hidden_markov import HiddenMarkovLanguage
from experiments.harness.run import execute
from objectives.block_diffusion import BlockDiffusion
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.noise import Cosine, Polynomial
from objectives.sampling import Ancestral, Ordered, Remask
from objectives.uniform_diffusion import Revise, UniformDiffusion

LANGUAGE = HiddenMarkovLanguage(states=6, symbols=8, concentration=0.2, seed=3)
V, T = LANGUAGE.symbols, 24
TOKENS = LANGUAGE.sample(256, T, torch.Generator().manual_seed(0))
TRUTH = -LANGUAGE.log_likelihood(TOKENS)


class Cache:
    def __init__(self, batch):
        self.tokens = torch.zeros(batch, 0, dtype=torch.long)

    def rewind(self, tokens):
        self.tokens = self.tokens[:, : self.tokens.shape[1] - tokens]


class Optimal:
    """The language itself in place of a LanguageModel; `columns` more than it has symbols."""

    def __init__(self, columns=0, uniform_noise=False):
        self.columns, self.uniform_noise = columns, uniform_noise
        self.blocks, self.mixer, self.empty_state = [self], self, Cache

    def hidden(self, tokens_BT, visibility, states=None, time=None):
        if states is not None:
            start = states[0].tokens.shape[1]
            states[0].tokens = torch.cat([states[0].tokens, tokens_BT], 1)
            return self.denoised(states[0].tokens)[:, start:]
        if visibility is CAUSAL:  # inputs are shifted by the start; the last symbol is not needed to predict
            return LANGUAGE.conditionals(pad(tokens_BT[:, 1:], (0, 1)))
        if visibility.kind is Visibility.BLOCK_CAUSAL:
            noised, clean = tokens_BT.chunk(2, dim=1)
            out = []
            for start in range(0, noised.shape[1], visibility.size):
                end = start + visibility.size
                out.append(self.denoised(torch.cat([clean[:, :start], noised[:, start:end]], 1))[:, start:])
            return torch.cat([*out, torch.zeros(*clean.shape, V).double()], 1)
        if self.uniform_noise:
            p_B11 = time[:, :, None]
            return LANGUAGE.leave_one_out((1 - p_B11) * one_hot(tokens_BT, V) + p_B11 / V).log()
        return self.denoised(tokens_BT)

    def denoised(self, tokens_BT):
        return LANGUAGE.posterior(tokens_BT, tokens_BT == V).log()

    def logits(self, hidden):
        return pad(hidden, (0, self.columns))

    def prefill(self, tokens_BT, states=None):
        self.so_far = tokens_BT if states is None else torch.cat([self.so_far, tokens_BT], 1)
        return LANGUAGE.conditionals(pad(self.so_far[:, 1:], (0, 1))), []

    def step(self, tokens_B, states):
        logits, _ = self.prefill(tokens_B[:, None], states)
        return logits[:, -1], states


OBJECTIVES = {
    "masked": MaskedDiffusion(V, V),
    "masked cosine, independent": MaskedDiffusion(V, V, schedule=Cosine(), times="independent"),
    "masked cubic, antithetic": MaskedDiffusion(V, V, schedule=Polynomial(3.0), times="antithetic"),
    "block 1": BlockDiffusion(V, V, 1),
    "block 4": BlockDiffusion(V, V, 4),
    "block 5": BlockDiffusion(V, V, 5),
    "block 24": BlockDiffusion(V, V, T),
    "uniform": UniformDiffusion(V, V),
    "uniform square": UniformDiffusion(V, V, schedule=Polynomial(2.0), times="rotated"),
}


def optimal(objective):
    return Optimal(objective.model_vocab_size - V, isinstance(objective, UniformDiffusion))


def test_the_optimal_predictor_gives_the_exact_likelihood():
    got = NextToken(V, V).bound(Optimal(), TOKENS, torch.Generator())
    torch.testing.assert_close(got.nats_B, TRUTH)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_optimal_denoiser_gives_a_bound_equal_to_the_likelihood_within_its_own_error(name):
    objective = OBJECTIVES[name]
    results = [objective.bound(optimal(objective), TOKENS, torch.Generator().manual_seed(i)) for i in range(12)]
    mean = torch.stack([r.nats_B for r in results]).mean(0).sum()
    error = math.sqrt(sum(r.variance for r in results)) / len(results)
    assert abs(mean - TRUTH.sum()) < 4 * error + 1e-6
    assert error < 0.01 * TRUTH.sum()
    losses = [objective.loss(optimal(objective), TOKENS, torch.Generator().manual_seed(i)) for i in range(12)]
    losses = torch.stack(losses).double()
    assert abs(losses.mean() - TRUTH.sum() / TOKENS.numel()) < 4 * losses.std() / 12**0.5 + 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_denoiser_that_is_not_optimal_lies_above_the_entropy(name):
    class Blunt(Optimal):
        def hidden(self, *args, **kwargs):
            return 0.5 * super().hidden(*args, **kwargs)

    objective = OBJECTIVES[name]
    model = Blunt(objective.model_vocab_size - V, isinstance(objective, UniformDiffusion))
    results = [objective.bound(model, TOKENS, torch.Generator().manual_seed(i)) for i in range(4)]
    error = math.sqrt(sum(r.variance for r in results)) / len(results)
    assert torch.stack([r.nats_B.sum() for r in results]).mean() > TRUTH.sum() + 3 * error


SAMPLERS = {
    "next_token": (NextToken(V, V), None),
    "one at a time": (OBJECTIVES["masked"], Ordered("random", 3)),
    "ancestral": (OBJECTIVES["masked"], Ancestral(64)),
    "remasking": (OBJECTIVES["masked"], Remask(64, 0.02)),
    "blocks of 1": (OBJECTIVES["block 1"], None),
    "blocks of 4": (OBJECTIVES["block 4"], Ancestral(64)),
    "revising": (OBJECTIVES["uniform"], Revise(100)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_true_law_of_three_symbols(name):
    objective, sampler = SAMPLERS[name]
    n = 4000
    out = objective.sample(
        optimal(objective), torch.zeros(n, 0, dtype=torch.long), 3, torch.Generator().manual_seed(0), sampler=sampler
    ).tokens_BT
    triples = torch.cartesian_prod(*[torch.arange(V)] * 3)
    expected = n * LANGUAGE.log_likelihood(triples).exp()
    counts = torch.bincount(out @ torch.tensor([V * V, V, 1]), minlength=V**3).double()
    common = expected > 4
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize(
    ("objective", "distance"),
    [
        ("next_token", 0.1), ("multi_token", 0.1), ("masked_diffusion", 0.25), ("block_diffusion", 0.25),
        ("uniform_diffusion", 0.5),
    ],
)  # fmt: skip
def test_a_small_trained_model_comes_near_the_true_entropy_and_not_below(make_config, objective, distance):
    """K14."""
    config = make_config(
        f"objective={objective}", "data=hidden_markov", "data.sequence_length=32", "budget.flops=3e10", "arch.width=16",
        "data.tokens.language={states:4,symbols:8,concentration:0.2,seed:3}", "data.tokens.train_tokens=262144",
        "data.tokens.heldout_tokens=16384", "data.allow_repeats=true",
        *(["objective.build.block_size=4"] if objective == "block_diffusion" else []),
    )  # fmt: skip
    row = execute(config)
    language = instantiate(config.data.tokens.language)
    data = instantiate(config.data.tokens)
    windows = torch.from_numpy(data.heldout.astype("int64")).view(-1, 32)
    entropy = -language.log_likelihood(windows).sum().item() / math.log(2) / data.heldout_bytes
    assert row["status"] == "done", row["error"]
    assert entropy - 3 * row["bits_per_byte_se"] - 0.01 < row["bits_per_byte"] < entropy + distance
