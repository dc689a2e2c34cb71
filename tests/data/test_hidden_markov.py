"""Everything is compared with sums over all paths of states and all sequences, which is the definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from experiments.data.hidden_markov import HiddenMarkovLanguage, hidden_markov
from experiments.data.windows import heldout_windows

SIZES = [(1, 2, 3), (2, 3, 4), (3, 2, 5), (3, 4, 1)]  # states, symbols, length


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_sequences(symbols: int, length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(symbols), repeat=length)))


def probability(language: HiddenMarkovLanguage, tokens) -> float:
    """p(x_1 .. x_T) as a sum over all paths of states."""
    start, move, emit = (x.tolist() for x in (language.initial_S, language.transition_SS, language.emission_SV))
    total = 0.0
    for path in itertools.product(range(language.states), repeat=len(tokens)):
        p = start[path[0]] * math.prod(move[a][b] for a, b in itertools.pairwise(path))
        total += p * math.prod(emit[state][token] for state, token in zip(path, tokens, strict=True))
    return total


@pytest.fixture(params=SIZES, ids=str)
def case(request):
    states, symbols, length = request.param
    language = HiddenMarkovLanguage(states, symbols, concentration=0.7, seed=3)
    tokens_NT = all_sequences(symbols, length)
    return (
        language,
        tokens_NT,
        torch.tensor([probability(language, row) for row in tokens_NT.tolist()], dtype=torch.float64),
    )


def test_the_likelihood_is_the_sum_over_paths_and_sums_to_one(case):
    language, tokens_NT, p_N = case
    assert torch.allclose(language.log_likelihood(tokens_NT).exp(), p_N, rtol=1e-12)
    assert math.isclose(float(language.log_likelihood(tokens_NT).exp().sum()), 1.0, rel_tol=1e-12)


def test_the_conditionals_are_ratios_of_sums_and_chain_to_the_likelihood(case):
    language, tokens_NT, p_N = case
    logp_NTV = language.conditionals(tokens_NT)
    assert torch.allclose(logp_NTV.exp().sum(-1), torch.ones(tokens_NT.shape).double())
    chained = logp_NTV.gather(2, tokens_NT[..., None]).sum((1, 2))
    assert torch.allclose(chained, language.log_likelihood(tokens_NT), rtol=1e-12)
    for row, logp_TV in zip(tokens_NT.tolist(), logp_NTV, strict=True):
        for t in range(len(row)):
            past = [p for other, p in zip(tokens_NT.tolist(), p_N.tolist(), strict=True) if other[:t] == row[:t]]
            for v in range(language.symbols):
                with_v = [*row[:t], v]
                both = sum(p for o, p in zip(tokens_NT.tolist(), p_N.tolist(), strict=True) if o[: t + 1] == with_v)
                assert math.isclose(math.exp(logp_TV[t, v]), both / sum(past), rel_tol=1e-9)


def test_the_posterior_is_the_share_of_the_sequences_that_agree(case):
    language, tokens_NT, p_N = case
    length = tokens_NT.shape[1]
    for pattern in itertools.product([False, True], repeat=length):
        masked_NT = torch.tensor(pattern).expand(len(tokens_NT), -1)
        p_NTV = language.posterior(tokens_NT.masked_fill(masked_NT, 99), masked_NT)
        agree_NN = ((tokens_NT[:, None] == tokens_NT[None]) | torch.tensor(pattern)).all(-1).double()
        weight_NN = agree_NN * p_N / (agree_NN * p_N).sum(1, keepdim=True)
        one_hot_NTV = torch.nn.functional.one_hot(tokens_NT, language.symbols).double()
        assert torch.allclose(p_NTV, torch.einsum("nm,mtv->ntv", weight_NN, one_hot_NTV), atol=1e-12)


def test_the_process_is_stationary():
    language = HiddenMarkovLanguage(7, 5, seed=1)
    assert torch.allclose(language.initial_S @ language.transition_SS, language.initial_S, atol=1e-14)
    assert math.isclose(float(language.initial_S.sum()), 1.0, rel_tol=1e-12) and language.initial_S.min() > 0
    everything_masked = torch.ones(1, 20, dtype=torch.bool)
    marginal_TV = language.posterior(torch.zeros(1, 20, dtype=torch.int64), everything_masked)[0]
    assert torch.allclose(marginal_TV, (language.initial_S @ language.emission_SV).expand(20, -1), atol=1e-12)


@pytest.mark.parametrize("concentration", [0.01, 0.1, 1.0, 100.0])
def test_rows_are_laws_in_which_nothing_is_impossible(concentration):
    language = HiddenMarkovLanguage(6, 9, concentration, seed=2)
    for rows in (language.transition_SS, language.emission_SV):
        assert rows.dtype == torch.float64 and rows.min() > 1e-7
        assert torch.allclose(rows.sum(1), torch.ones(6).double())
    worst = language.emission_SV.amax(0).argmin().expand(1, 500)
    assert torch.isfinite(language.log_likelihood(worst)).all()


@pytest.mark.parametrize("at", [0, 6])
def test_sampled_bigrams_follow_the_law_at_any_position(at):
    language = HiddenMarkovLanguage(3, 4, concentration=0.5, seed=5)
    tokens_BT = language.sample(20_000, 8, generator(1))
    pairs = all_sequences(4, 2)
    expected = language.log_likelihood(pairs).exp().numpy() * len(tokens_BT)
    observed = np.bincount((tokens_BT[:, at] * 4 + tokens_BT[:, at + 1]).numpy(), minlength=16)
    keep = expected > 5
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-4


def test_samples_follow_the_generator_alone():
    language = HiddenMarkovLanguage(3, 4)
    first, again, other = (language.sample(5, 9, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == (5, 9) and first.dtype == torch.int64
    assert torch.equal(first, again) and not torch.equal(first, other)
    same = HiddenMarkovLanguage(3, 4)
    assert torch.equal(language.transition_SS, same.transition_SS)
    assert not torch.equal(language.transition_SS, HiddenMarkovLanguage(3, 4, seed=1).transition_SS)


def test_entropy_bounds_are_conditional_entropies_and_close_in_on_the_rate():
    language = HiddenMarkovLanguage(3, 2, concentration=0.5, seed=4)

    def entropy(length: int) -> float:
        p = [probability(language, row) for row in all_sequences(2, length).tolist()]
        return -sum(x * math.log(x) for x in p)

    bounds = [language.entropy_bounds(n) for n in range(1, 9)]
    for n in (2, 3, 4):
        assert math.isclose(bounds[n - 1][1], entropy(n) - entropy(n - 1), rel_tol=1e-10)
    lower, upper = zip(*bounds, strict=True)
    assert list(lower) == sorted(lower) and list(upper) == sorted(upper, reverse=True)
    assert lower[-1] <= upper[-1] and upper[-1] - lower[-1] < 0.2 * (upper[0] - lower[0])
    rate, error = language.entropy_rate(length=200, burn_in=100, samples=400, generator=generator())
    assert lower[-1] - 4 * error < rate < upper[-1] + 4 * error
    assert 0 < error < 0.01


def test_with_one_state_every_entropy_is_that_of_the_emissions():
    language = HiddenMarkovLanguage(1, 6, concentration=1.0, seed=0)
    p = language.emission_SV[0]
    exact = float(-(p * p.log()).sum())
    rate, error = language.entropy_rate(length=10, burn_in=5, samples=3, generator=generator())
    assert math.isclose(rate, exact, rel_tol=1e-12) and error < 1e-12
    assert all(math.isclose(bound, exact, rel_tol=1e-10) for bound in language.entropy_bounds(3))


def test_entropy_per_token_is_the_entropy_of_a_window_and_falls_with_its_length():
    language = HiddenMarkovLanguage(3, 4, concentration=0.3, seed=6)
    p = language.log_likelihood(all_sequences(4, 5)).exp()
    exact = float(-(p * p.log()).sum()) / 5
    value, error = language.entropy_per_token(5, 20_000, generator(2))
    assert abs(value - exact) < 4 * error < 0.01
    longer, _ = language.entropy_per_token(100, 1000, generator(3))
    assert longer < value


def test_the_entropy_rate_is_estimated_after_the_burn_in_alone():
    language = HiddenMarkovLanguage(3, 4, concentration=0.3, seed=6)
    first, sixth = language.entropy_bounds(1)[1], language.entropy_bounds(6)[1]
    value, error = language.entropy_rate(length=6, burn_in=5, samples=20_000, generator=generator(4))
    assert abs(value - sixth) < 4 * error < 0.1 * (first - sixth)


def test_standard_errors_are_those_of_repeated_estimates():
    language = HiddenMarkovLanguage(3, 4, concentration=0.3, seed=6)
    estimates = [language.entropy_per_token(10, 50, generator(seed)) for seed in range(200)]
    values, errors = np.array(estimates).T
    assert 0.8 < values.std(ddof=1) / errors.mean() < 1.25  # the ratio itself has an error of 5 %


LANGUAGE = HiddenMarkovLanguage(4, 6, concentration=0.2, seed=0)


def test_as_data_its_windows_are_independent_sequences_of_the_language():
    data = hidden_markov(LANGUAGE, sequence_length=32, train_tokens=10_000, heldout_tokens=32_000, seed=1)
    assert (len(data.train), len(data.heldout), data.heldout_bytes) == (10_000, 32_000, 32_000)
    assert (data.vocab_size, data.eot) == (7, 6) and max(data.train.max(), data.heldout.max()) < 6
    whole = torch.from_numpy(data.heldout.astype("int64")).view(-1, 32)
    assert math.isclose(data.heldout_entropy, -float(LANGUAGE.log_likelihood(whole).sum()), rel_tol=1e-12)
    windows_NT, tail = heldout_windows(data.heldout, 32)
    nats_N = -LANGUAGE.log_likelihood(windows_NT) / 32
    expected, error = LANGUAGE.entropy_per_token(32, 2000, generator())
    assert tail is None
    assert abs(nats_N.mean() - expected) < 4 * math.hypot(error, nats_N.std() / len(nats_N) ** 0.5)
    assert data.decode([0, 5, 6]) == "0 5 \n<eot>\n"


def test_the_held_out_symbols_do_not_depend_on_how_many_are_trained_on():
    short, long, other = (
        hidden_markov(LANGUAGE, 32, train_tokens, 1000, seed) for train_tokens, seed in ((50, 1), (5000, 1), (50, 2))
    )
    assert np.array_equal(short.heldout, long.heldout) and not np.array_equal(short.heldout, other.heldout)
    assert len({short.digest, long.digest, other.digest}) == 3
    assert hidden_markov(LANGUAGE, 32, 50, 1000, 1).digest == short.digest


TOKENS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HiddenMarkovLanguage(0, 2), "states=0"),
        (lambda: HiddenMarkovLanguage(2, 1), "symbols=1"),
        (lambda: HiddenMarkovLanguage(2, 2, concentration=0.0), "concentration=0.0"),
        (lambda: LANGUAGE.sample(0, 3, generator()), "batch=0"),
        (lambda: LANGUAGE.sample(3, 0, generator()), "length=0"),
        (lambda: LANGUAGE.log_likelihood(TOKENS[:, :0]), "T >= 1"),
        (lambda: LANGUAGE.log_likelihood(TOKENS[0]), "int64"),
        (lambda: LANGUAGE.conditionals(TOKENS.int()), "int32"),
        (lambda: LANGUAGE.conditionals(TOKENS + 6), "6 .. 6, and the language has symbols 0 .. 5"),
        (lambda: LANGUAGE.log_likelihood(TOKENS - 1), "-1 .. -1"),
        (lambda: LANGUAGE.posterior(TOKENS, TOKENS), "masked_BT must be bool"),
        (lambda: LANGUAGE.posterior(TOKENS, TOKENS[:1].bool()), r"tokens' shape \(2, 3\)"),
        (lambda: LANGUAGE.posterior(TOKENS + 6, TOKENS.bool()), "symbols 0 .. 5"),
        (lambda: LANGUAGE.entropy_bounds(0), "length=0"),
        (lambda: LANGUAGE.entropy_bounds(40), "length=40"),
        (lambda: LANGUAGE.entropy_rate(5, 5, 10, generator()), "burn_in=5"),
        (lambda: LANGUAGE.entropy_per_token(5, 1, generator()), "samples=1"),
        (lambda: hidden_markov(LANGUAGE, 32, 0, 10, 0), "train_tokens=0"),
        (lambda: hidden_markov(LANGUAGE, 32, 10, 0, 0), "heldout_tokens=0"),
        (lambda: hidden_markov(LANGUAGE, 0, 10, 10, 0), "sequence_length=0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
