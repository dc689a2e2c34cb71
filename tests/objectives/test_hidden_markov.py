"""Objectives on the hidden Markov language, whose likelihood, optimal predictor and optimal denoiser are exact."""

import math

import pytest
import torch
from hydra.utils import instantiate
from torch.nn.functional import pad

from archs.visibility import CAUSAL
from experiments.data.hidden_markov import HiddenMarkovLanguage
from experiments.harness.run import execute
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken

LANGUAGE = HiddenMarkovLanguage(states=6, symbols=8, concentration=0.2, seed=3)
TOKENS = LANGUAGE.sample(256, 24, torch.Generator().manual_seed(0))
TRUTH = -LANGUAGE.log_likelihood(TOKENS)


class Optimal:
    """The language itself in place of a LanguageModel."""

    def hidden(self, tokens_BT, visibility, states=None):
        if visibility is CAUSAL:  # inputs are shifted by the start token; the last symbol is not needed to predict
            return LANGUAGE.conditionals(pad(tokens_BT[:, 1:], (0, 1)))
        masked_BT = tokens_BT == LANGUAGE.symbols
        return LANGUAGE.posterior(tokens_BT.masked_fill(masked_BT, 0), masked_BT).log()

    def logits(self, hidden):
        return pad(hidden, (0, 1))  # one more id: eot or mask


def test_the_optimal_predictor_gives_the_exact_likelihood():
    got = NextToken(LANGUAGE.symbols, LANGUAGE.symbols)
    model = Optimal()
    model.logits = lambda hidden: hidden
    torch.testing.assert_close(got.bound(model, TOKENS, torch.Generator()).nats_B, TRUTH)


def test_the_optimal_denoiser_gives_a_bound_equal_to_the_likelihood_within_its_own_error():
    process = MaskedDiffusion(LANGUAGE.symbols, eot=LANGUAGE.symbols)
    results = [process.bound(Optimal(), TOKENS, torch.Generator().manual_seed(i)) for i in range(12)]
    mean = torch.stack([r.nats_B for r in results]).mean(0).sum()
    error = math.sqrt(sum(r.variance for r in results)) / len(results)
    assert abs(mean - TRUTH.sum()) < 4 * error
    assert error < 0.01 * TRUTH.sum()


def test_a_denoiser_that_is_not_optimal_lies_above_the_entropy():
    class Blunt(Optimal):
        def hidden(self, tokens_BT, visibility, states=None):
            return 0.7 * super().hidden(tokens_BT, visibility)

    bound = MaskedDiffusion(LANGUAGE.symbols, 0).bound(Blunt(), TOKENS, torch.Generator().manual_seed(0))
    assert bound.nats_B.sum() > TRUTH.sum() + 3 * math.sqrt(bound.variance)


@pytest.mark.parametrize(("objective", "distance"), [("next_token", 0.1), ("masked_diffusion", 0.25)])
def test_a_small_trained_model_comes_near_the_true_entropy_and_not_below(make_config, objective, distance):
    config = make_config(
        f"objective={objective}", "data=hidden_markov", "data.sequence_length=32", "budget.flops=3e10", "arch.width=16",
        "data.tokens.language={states:4,symbols:8,concentration:0.2,seed:3}", "data.tokens.train_tokens=262144",
        "data.tokens.heldout_tokens=16384", "data.allow_repeats=true",
    )  # fmt: skip
    row = execute(config)
    language = instantiate(config.data.tokens.language)
    data = instantiate(config.data.tokens)
    windows = torch.from_numpy(data.heldout.astype("int64")).view(-1, 32)
    entropy = -language.log_likelihood(windows).sum().item() / math.log(2) / data.heldout_bytes
    assert row["status"] == "done", row["error"]
    assert entropy - 3 * row["bits_per_byte_se"] - 0.01 < row["bits_per_byte"] < entropy + distance
