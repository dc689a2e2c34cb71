"""Objectives against a language small enough to know everything about: a joint law over V^L sequences."""

import itertools
import math

import pytest
import torch

from archs.visibility import CAUSAL
from objectives.masked_diffusion import MaskedDiffusion, spread
from objectives.next_token import NextToken, draw


class Oracle:
    """In place of a LanguageModel: the exact conditionals of a joint law p over sequences, [V] * L."""

    def __init__(self, joint, extra_columns=0):
        self.joint, self.V, self.L = joint, joint.shape[0], joint.dim()
        self.extra = extra_columns

    def hidden(self, tokens_BT, visibility, states=None):
        rows = []
        for row in tokens_BT.tolist():
            # Causal inputs are shifted by the start token; a masked position is any id that is not a symbol.
            known = row[1:] + [self.V] if visibility is CAUSAL else row
            rows.append(torch.stack([self.conditional(known, t, visibility) for t in range(len(row))]))
        return torch.stack(rows)

    def logits(self, hidden):
        return torch.nn.functional.pad(hidden, (0, self.extra), value=5.0)  # a mask column that wants to be chosen

    def conditional(self, known, t, visibility):
        index = [
            slice(None) if i == t or known[i] >= self.V or (visibility is CAUSAL and i >= t) else known[i]
            for i in range(self.L)
        ]
        p = self.joint[tuple(index)]
        free = [i for i in range(self.L) if isinstance(index[i], slice)]
        others = [d for d, i in enumerate(free) if i != t]
        p = p.sum(others) if others else p
        return (p / p.sum()).log()

    def prefill(self, tokens_BT, states=None):
        self.so_far = tokens_BT if states is None else torch.cat([self.so_far, tokens_BT], 1)
        T = self.so_far.shape[1]
        padded = torch.nn.functional.pad(self.so_far, (0, max(0, self.L - T)), value=self.V)
        return self.hidden(padded, CAUSAL)[:, :T], []

    def step(self, tokens_B, states):
        logits, _ = self.prefill(tokens_B[:, None], states)
        return logits[:, -1], states


def joint_law(V=3, L=3):
    torch.manual_seed(0)
    return torch.distributions.Dirichlet(torch.full((V**L,), 0.5, dtype=torch.float64)).sample().view([V] * L)


SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=3)))
P = joint_law()
ORACLE = Oracle(P, extra_columns=1)
DIFFUSION = MaskedDiffusion(vocab_size=3, eot=0)


def subsets(L, k):
    return torch.tensor([[i in chosen for i in range(L)] for chosen in itertools.combinations(range(L), k)])


def test_next_token_with_exact_conditionals_gives_the_likelihood_of_every_sequence():
    got = NextToken(vocab_size=3, eot=3).bound(Oracle(P), SEQUENCES, torch.Generator())
    torch.testing.assert_close(got.nats_B, -P.flatten().log())
    assert got.exact and got.variance == 0


@pytest.mark.parametrize("x", SEQUENCES.tolist())
def test_masked_diffusion_with_exact_conditionals_is_tight_for_every_sequence(x):
    """K1 and K2: k uniform on 1..L, k positions masked, weight L / k, in expectation over all masks."""
    total = 0.0
    for k in (1, 2, 3):
        masks = subsets(3, k)
        nats = DIFFUSION.masked_nats(ORACLE, torch.tensor([x]).expand(len(masks), 3), masks).sum(1)
        total += nats.mean() / k  # (1 / L) * (L / k)
    assert total.item() == pytest.approx(-math.log(P[tuple(x)]), rel=1e-12)


def test_the_time_integral_of_the_training_loss_is_the_same_bound():
    """The expectation over masks of (1/t) sum of nats is a polynomial in t: Gauss-Legendre integrates it exactly."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(8)
    x = torch.tensor([[2, 0, 1]])
    total = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2):
        for k in (1, 2, 3):
            for mask in subsets(3, k):
                nats = DIFFUSION.masked_nats(ORACLE, x, mask[None]).sum().item()
                total += weight * node ** (k - 1) * (1 - node) ** (3 - k) * nats
    assert total == pytest.approx(-math.log(P[2, 0, 1]), rel=1e-12)


def test_the_estimates_of_loss_and_bound_agree_with_the_exact_value():
    x = SEQUENCES[[5, 11, 20, 26]].repeat(8, 1)
    truth = -P[tuple(x.T)].log()
    bounds = [DIFFUSION.bound(ORACLE, x, torch.Generator().manual_seed(i)).nats_B.sum() for i in range(60)]
    losses = [DIFFUSION.loss(ORACLE, x, torch.Generator().manual_seed(i)) for i in range(60)]
    for values, exact in ((bounds, truth.sum()), (losses, truth.sum() / x.numel())):
        values = torch.stack(values)
        assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5


def test_the_stated_variance_is_that_of_repeated_evaluations():
    x = SEQUENCES.repeat(2, 1)
    results = [DIFFUSION.bound(ORACLE, x, torch.Generator().manual_seed(i)) for i in range(300)]
    observed = torch.stack([r.nats_B.sum() for r in results]).var().item()
    stated = sum(r.variance for r in results) / len(results)
    assert 0.7 < stated / observed < 1.4  # either has a relative error near sqrt(2 / 300) = 0.08


class Uniform:
    """A model that knows nothing."""

    def hidden(self, tokens_BT, visibility, states=None):
        return torch.zeros(*tokens_BT.shape, 6, dtype=torch.float64)

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("T", [1, 7, 64])
def test_a_uniform_model_is_at_exactly_log_vocabulary_size(T):
    x = torch.randint(5, (9, T))
    got = MaskedDiffusion(vocab_size=5, eot=0).bound(Uniform(), x, torch.Generator())
    torch.testing.assert_close(got.nats_B, torch.full((9,), T * math.log(5), dtype=torch.float64))
    assert got.variance < 1e-18 and not got.exact


@pytest.mark.parametrize("n", [1, 2, 64])
def test_times_are_spread_one_to_a_stratum_and_each_is_uniform(n):
    draws = torch.stack([spread(n, torch.Generator().manual_seed(i)) for i in range(2000)])
    assert ((draws >= 0) & (draws < 1)).all()
    assert ((draws * n).long().sort(1).values == torch.arange(n)).all()
    first = draws[:, 0].sort().values  # Kolmogorov-Smirnov at the 0.1 % level
    steps = torch.arange(1, 2001) / 2000
    assert (first - steps).abs().max() < 1.95 / 2000**0.5


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_ancestral_sampling_of_two_copied_bits_errs_with_probability_one_half_per_step(steps):
    """K6: two equal bits, filled independently only when both fall into the same of T steps: 1 / (2 T)."""
    copied = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)
    table = {(2, 2): [0.5, 0.5], (0, 2): [1.0, 0.0], (1, 2): [0.0, 1.0], (2, 0): [1.0, 0.0], (2, 1): [0.0, 1.0]}

    class Copied(Oracle):
        def hidden(self, tokens_BT, visibility, states=None):
            first, second = tokens_BT.T
            p = torch.tensor([[[0.5, 0.5]] * 2] * len(tokens_BT), dtype=torch.float64)
            for (a, b), law in table.items():
                p[(first == a) & (second == b)] = torch.tensor(law, dtype=torch.float64)
            return p.log()

    n = 20_000
    process = MaskedDiffusion(vocab_size=2, eot=0)
    empty = torch.zeros(n, 0, dtype=torch.long)
    out = process.sample(Copied(copied, 1), empty, 2, torch.Generator().manual_seed(0), steps=steps)
    wrong = (out.tokens_BT[:, 0] != out.tokens_BT[:, 1]).double().mean().item()
    expected = 1 / (2 * steps)
    assert abs(wrong - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
    assert out.evaluations == steps and (out.tokens_BT < 2).all()


@pytest.mark.parametrize("build", [lambda: (NextToken(3, 3), Oracle(P)), lambda: (DIFFUSION, ORACLE)])
def test_samples_one_token_at_a_time_follow_the_joint_law(build):
    objective, oracle = build()
    n = 1500
    # Enough steps that two positions are hardly ever filled in the same one.
    steps = 60 if isinstance(objective, MaskedDiffusion) else None
    empty = torch.zeros(n, 0, dtype=torch.long)
    out = objective.sample(oracle, empty, 3, torch.Generator().manual_seed(0), steps=steps).tokens_BT
    counts = torch.bincount(out @ torch.tensor([9, 3, 1]), minlength=27).double()
    expected = n * P.flatten()
    chi2 = ((counts - expected) ** 2 / expected.clamp_min(1e-9))[expected > 3].sum()
    assert chi2 < 60  # 26 degrees of freedom: 1 in 10,000 lies above 61


def test_a_prompt_is_kept():
    prompt = torch.tensor([[2], [1]])
    for objective, oracle in ((NextToken(3, 3), Oracle(P)), (DIFFUSION, ORACLE)):
        out = objective.sample(oracle, prompt, 3, torch.Generator())
        assert torch.equal(out.tokens_BT[:, :1], prompt) and out.tokens_BT.shape == (2, 3)


def test_temperature_zero_takes_the_likeliest_token_and_a_negative_one_is_refused():
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    assert draw(logits, 0.0, torch.Generator()).tolist() == [1]
    with pytest.raises(ValueError, match="temperature -1"):
        draw(logits, -1.0, torch.Generator())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MaskedDiffusion(3, 0, evaluation_draws=1), "at least 2"),
        (lambda: DIFFUSION.sample(ORACLE, SEQUENCES, 3, torch.Generator()), "3 tokens already"),
        (lambda: DIFFUSION.sample(ORACLE, SEQUENCES[:, :1], 3, torch.Generator(), steps=0), "steps=0"),
        (lambda: NextToken(3, 3).sample(ORACLE, SEQUENCES[:, :1], 3, torch.Generator(), steps=1), "steps=1 must be 2"),
    ],
)
def test_bad_requests_say_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()
