"""Objectives on the hidden Markov language, whose likelihood, optimal predictor and optimal denoiser are exact."""

import math

import pytest
import torch
from hydra.utils import instantiate

from experiments.data.hidden_markov import HiddenMarkovLanguage
from experiments.data.optimal import OptimalModel
from experiments.harness.identity import run_of
from experiments.harness.run import execute
from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Batch, Request
from objectives.decoding.revising import Revise
from objectives.decoding.unmasking import Ancestral, Ordered, Remask
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.noise import Cosine, Polynomial
from objectives.uniform_diffusion import UniformDiffusion

LANGUAGE = HiddenMarkovLanguage(states=6, symbols=8, concentration=0.2, seed=3)
V, T = LANGUAGE.symbols, 24
TOKENS = LANGUAGE.sample(256, T, torch.Generator().manual_seed(0))
TRUTH = -LANGUAGE.log_likelihood(TOKENS)


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
    return OptimalModel(LANGUAGE, objective.model_vocab_size - V, isinstance(objective, UniformDiffusion))


def test_the_optimal_predictor_gives_the_exact_likelihood():
    got = NextToken(V, V).evaluate(OptimalModel(LANGUAGE), Batch.of(TOKENS), torch.Generator())
    torch.testing.assert_close(got.nats_B, TRUTH)


@pytest.mark.thorough
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_optimal_denoiser_gives_a_bound_equal_to_the_likelihood_within_its_own_error(name):
    objective = OBJECTIVES[name]
    results = [
        objective.evaluate(optimal(objective), Batch.of(TOKENS), torch.Generator().manual_seed(i)) for i in range(12)
    ]
    mean = torch.stack([r.nats_B for r in results]).mean(0).sum()
    error = math.sqrt(sum(r.variance for r in results)) / len(results)
    assert abs(mean - TRUTH.sum()) < 4 * error + 1e-6
    assert error < 0.01 * TRUTH.sum()
    losses = [objective.loss(optimal(objective), Batch.of(TOKENS), torch.Generator().manual_seed(i)) for i in range(12)]
    losses = torch.stack(losses).double()
    assert abs(losses.mean() - TRUTH.sum() / TOKENS.numel()) < 4 * losses.std() / 12**0.5 + 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_denoiser_that_is_not_optimal_lies_above_the_entropy(name):
    class Blunt(OptimalModel):
        def hidden(self, *args, **kwargs):
            return 0.5 * super().hidden(*args, **kwargs)

    objective = OBJECTIVES[name]
    model = Blunt(LANGUAGE, objective.model_vocab_size - V, isinstance(objective, UniformDiffusion))
    results = [objective.evaluate(model, Batch.of(TOKENS), torch.Generator().manual_seed(i)) for i in range(4)]
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


@pytest.mark.thorough
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_true_distribution_of_three_symbols(name):
    objective, sampler = SAMPLERS[name]
    n = 4000
    request = Request([torch.zeros(0, dtype=torch.long)], 3, torch.Generator().manual_seed(0), copies=n)
    out = objective.sample(optimal(objective), request, sampler).tokens_BT
    triples = torch.cartesian_prod(*[torch.arange(V)] * 3)
    expected = n * LANGUAGE.log_likelihood(triples).exp()
    counts = torch.bincount(out @ torch.tensor([V * V, V, 1]), minlength=V**3).double()
    common = expected > 4
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    chi2, degrees = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("objective", "distance", "settings"),
    [
        ("next_token", 0.1, ()), ("multi_token", 0.1, ()), ("uniform_diffusion", 0.5, ()),
        ("masked_diffusion", 0.25, ("optim.learning_rate=0.005",)),  # at the usual rate some seeds learn no context
        ("block_diffusion", 0.25, ("objective.build.block_size=4",)),
    ],
)  # fmt: skip
def test_a_small_trained_model_comes_near_the_true_entropy_and_not_below(make_config, objective, distance, settings):
    """K14."""
    config = make_config(
        f"objective={objective}", "data=hidden_markov", "data.sequence_length=32", "arch.width=16",
        "data.tokens.language={states:4,symbols:8,concentration:0.2,seed:3}", "data.tokens.train_tokens=262144",
        "data.tokens.heldout_tokens=16384", "budget.flops=2.5e10", "data.allow_repeats=true", *settings,
    )  # fmt: skip
    row = execute(run_of(config))
    language = instantiate(config.data.tokens.language)
    data = instantiate(config.data.tokens)
    windows = torch.from_numpy(data.heldout.astype("int64")).view(-1, 32)
    entropy = -language.log_likelihood(windows).sum().item() / math.log(2) / data.heldout_bytes
    assert row["status"] == "done", row["error"]
    assert row["entropy_bits_per_byte"] == pytest.approx(entropy, rel=1e-9)
    assert entropy - 3 * row["bits_per_byte_se"] - 0.01 < row["bits_per_byte"] < entropy + distance
