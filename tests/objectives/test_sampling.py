"""Samplers against the exact law: which follow it, by how much the others err, and what each costs."""

import math

import pytest
import torch

from objectives import sampling
from objectives.block_diffusion import BlockDiffusion
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.sampling import Ancestral, Draw, LeftToRight, Ordered, Remask, Threshold, choose
from objectives.uniform_diffusion import Revise, UniformDiffusion
from tests.objectives.exact import L, Oracle, P, V, uniform_kernel

MASKED, ORACLE = MaskedDiffusion(vocab_size=V, eot=0), Oracle(extra_columns=1)
UNIFORM = UniformDiffusion(V, 0), Oracle(kernel=uniform_kernel)
COPIED = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(objective, oracle, n=3000, length=L, **options):
    return objective.sample(oracle, torch.zeros(n, 0, dtype=torch.long), length, generator(), **options)


def chi_square(tokens_BT, joint):
    V, L = joint.shape[0], joint.dim()
    counts = torch.bincount(tokens_BT @ V ** torch.arange(L - 1, -1, -1), minlength=V**L).double()
    expected = len(tokens_BT) * joint.flatten()
    return ((counts - expected) ** 2 / expected)[expected > 3].sum()


@pytest.mark.parametrize(
    ("objective", "oracle", "sampler"),
    [
        (NextToken(V, V), Oracle(), None),
        (MASKED, ORACLE, Ordered("random", steps=L)),
        (MASKED, ORACLE, Ancestral(steps=200)),
        (MASKED, ORACLE, Remask(steps=200, eta=0.02)),
        (MASKED, ORACLE, LeftToRight(1, Ancestral(1))),
        (MASKED, ORACLE, LeftToRight(2, Ancestral(100))),
        (BlockDiffusion(V, 0, 1), ORACLE, None),
        (BlockDiffusion(V, 0, 2), ORACLE, Ancestral(100)),
        (BlockDiffusion(V, 0, 3), ORACLE, Ancestral(100)),
        (*UNIFORM, Revise(100)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_with_enough_steps_samples_follow_the_law(objective, oracle, sampler):
    out = samples(objective, oracle, sampler=sampler).tokens_BT
    assert chi_square(out, P) < 60  # 26 degrees of freedom: 1 in 10,000 lies above 61


def test_ancestral_sampling_of_two_copied_bits_errs_with_probability_one_half_per_step():
    """K6: filled independently only when both fall into the same of T steps."""
    n = 20_000
    for steps in (1, 2, 4):
        out = samples(MaskedDiffusion(2, 0), Oracle(COPIED, 1), n, 2, sampler=Ancestral(steps))
        wrong = (out.tokens_BT[:, 0] != out.tokens_BT[:, 1]).double().mean().item()
        expected = 1 / (2 * steps)
        assert abs(wrong - expected) < 4 * math.sqrt(expected * (1 - expected) / n)
        assert out.predictions == 2 and out.evaluations <= min(2, steps)


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(Ordered("random", 2), 2), (Ordered("confidence", 2), 2), (Ordered("margin", 2), 2), (Threshold(0.6), 2)],
    ids=lambda x: type(x).__name__,
)
def test_one_copied_bit_at_a_time_is_never_wrong(sampler, evaluations):
    out = samples(MaskedDiffusion(2, 0), Oracle(COPIED, 1), 500, 2, sampler=sampler)
    assert (out.tokens_BT[:, 0] == out.tokens_BT[:, 1]).all()
    assert out.evaluations == evaluations and out.predictions == 3


def test_remasking_takes_tokens_back_and_keeps_the_share_of_gaps_on_its_schedule():
    shares, back = [], []

    class Watch(Oracle):
        def hidden(self, tokens_BT, visibility, states=None, time=None):
            gaps = tokens_BT == V
            if shares:
                back.append((gaps & ~self.before).double().mean().item())
            self.before = gaps
            shares.append(gaps.double().mean().item())
            return super().hidden(tokens_BT, visibility)

    samples(MASKED, Watch(extra_columns=1), 20_000, sampler=Remask(5, eta=0.4))
    assert shares == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=0.01)
    assert back[0] == pytest.approx(0.0) and min(back[1:]) > 0.03
    same = [samples(MASKED, ORACLE, 200, sampler=s).tokens_BT for s in (Ancestral(4), Remask(4, eta=0.0))]
    assert torch.equal(*same)


def test_the_best_predictions_come_first():
    """Position 0 is nearly certain, 1 a fair coin, 2 in between: the order in which they are filled."""
    first = torch.tensor([0.98, 0.02])
    joint = torch.einsum("a,b,c->abc", first, torch.tensor([0.5, 0.5]), torch.tensor([0.8, 0.2])).double()
    for by in ("confidence", "margin", "entropy"):
        left = []

        class Watch(Oracle):
            def hidden(self, tokens_BT, visibility, states=None, time=None):
                left.append((tokens_BT == 2).double().mean(0))
                return super().hidden(tokens_BT, visibility)

        objective = MaskedDiffusion(2, 0)
        empty = torch.zeros(400, 0, dtype=torch.long)
        objective.sample(Watch(joint, 1), empty, 3, generator(), Draw(temperature=0), Ordered(by, 3))
        assert torch.stack(left).tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 0]]


def test_a_low_threshold_takes_all_at_once_and_a_high_one_one_by_one():
    assert samples(MASKED, ORACLE, 50, sampler=Threshold(1e-9)).evaluations == 1
    out = samples(MASKED, ORACLE, 50, sampler=Threshold(1.0))
    assert out.evaluations == L and out.predictions == 6


@pytest.mark.parametrize(
    ("objective", "oracle"),
    [(MASKED, ORACLE), (BlockDiffusion(V, 0, 2), ORACLE), UNIFORM],
    ids=lambda o: type(o).__name__,
)
def test_gaps_are_filled_and_what_is_given_is_kept(objective, oracle):
    prompt = torch.tensor([[2, -1, 1]]).expand(400, -1)
    out = objective.sample(oracle, prompt, L, generator())
    assert torch.equal(out.tokens_BT[:, [0, 2]], prompt[:, [0, 2]])
    assert ((out.tokens_BT[:, 1] >= 0) & (out.tokens_BT[:, 1] < V)).all()
    if isinstance(objective, MaskedDiffusion):
        law = P[2, :, 1] / P[2, :, 1].sum()
        share = torch.bincount(out.tokens_BT[:, 1], minlength=V) / 400
        assert ((share - law).abs() < 4 * (law * (1 - law) / 400).sqrt() + 1e-9).all()


@pytest.mark.parametrize("objective", [NextToken(V, V), MASKED, BlockDiffusion(V, 0, 2), UniformDiffusion(V, 0)])
def test_a_prompt_is_kept_and_continued(objective):
    oracle = UNIFORM[1] if isinstance(objective, UniformDiffusion) else Oracle(extra_columns=0)
    if isinstance(objective, MaskedDiffusion | BlockDiffusion):
        oracle = ORACLE
    out = objective.sample(oracle, torch.tensor([[2], [1]]), L, generator())
    assert out.tokens_BT[:, 0].tolist() == [2, 1] and out.tokens_BT.shape == (2, L)


def test_categorical_draws_have_the_whole_tail(monkeypatch):
    """K7: the share of the line that maps to a token of probability 1e-9 is 1e-9; a float32 uniform has no such step."""
    p = torch.tensor([[0.6, 0.4 - 1e-9, 1e-9]], dtype=torch.float64)
    for at, expected in (
        (0.0, 0),
        (0.6 - 1e-12, 0),
        (0.6 + 1e-12, 1),
        (1 - 1.1e-9, 1),
        (1 - 0.9e-9, 2),
        (1 - 2**-53, 2),
    ):
        monkeypatch.setattr(sampling, "uniform", lambda shape, g, at=at: torch.full(shape, at, dtype=torch.float64))
        assert choose(p, generator()).tolist() == [expected]
    assert choose(torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64), generator()).tolist() == [1]


def test_a_float32_gumbel_would_be_colder_than_what_it_draws_from_and_ours_is_not():
    """On a grid of 2^-12 in place of 2^-24, so that a few thousand draws show it: weight p h(a), a = 2^12 p."""
    n, rare, tokens = 20_000, 2**-12, 1024  # a quarter of the mass lies on tokens of probability 2^-12
    p = torch.cat([torch.tensor([0.75]), torch.full((tokens,), rare)]).double()
    u = torch.randint(2**12, (n, tokens + 1), generator=generator()).double() / 2**12
    coarse = (p.log() - (-(u + 1e-10).log()).log()).argmax(1)
    ours = torch.cat([Draw()(p.log().expand(1000, -1), generator(i)) for i in range(n // 1000)])
    share = [(ids > 0).double().mean().item() for ids in (coarse, ours)]
    error = math.sqrt(0.25 * 0.75 / n)
    assert share[0] < 0.25 - 10 * error
    assert abs(share[1] - 0.25) < 4 * error


def test_temperature_and_top_p_change_the_law_as_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double().log()
    torch.testing.assert_close(Draw().probabilities(logits), logits.exp())
    cold = Draw(temperature=0.5).probabilities(logits)
    torch.testing.assert_close(cold, logits.exp() ** 2 / (logits.exp() ** 2).sum())
    nucleus = Draw(top_p=0.7).probabilities(logits)
    torch.testing.assert_close(nucleus, torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double())
    assert Draw(top_p=1e-9).probabilities(logits).tolist() == [[1, 0, 0, 0]]
    assert Draw(temperature=0)(logits, generator()).tolist() == [0]


EMPTY, FULL = torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, L, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Draw(temperature=-1), "temperature=-1 must be 0"),
        (lambda: Draw(top_p=0), "top_p=0 must be above 0"),
        (lambda: Ancestral(0), "steps=0 must be at least 1"),
        (lambda: Revise(0), "steps=0 must be at least 1"),
        (lambda: Ordered("luck", 1), "by='luck' must be one of confidence, margin, entropy, random"),
        (lambda: Threshold(0), "threshold=0 must be above 0"),
        (lambda: Remask(3, 2.0), "eta=2.0 must lie between 0 and 1"),
        (lambda: LeftToRight(0, Ancestral(1)), "size=0 must be at least 1"),
        (lambda: samples(MASKED, ORACLE, 2, sampler=Ordered("random", 4)), "steps=4 is more than the 3 tokens to fill"),
        (lambda: MASKED.sample(ORACLE, FULL, L, generator()), "3 tokens already and no gaps"),
        (lambda: NextToken(V, V).sample(Oracle(), FULL, L, generator()), "3 tokens already"),
        (lambda: NextToken(V, V).sample(Oracle(), EMPTY, L, generator(), sampler=Ancestral(1)), "leave sampler="),
        (lambda: NextToken(V, V).sample(Oracle(), EMPTY - 1, L, generator(), sampler=Ancestral(1)), "leave sampler="),
        (lambda: NextToken(V, V).sample(Oracle(), FULL[:, :1] - 1, L, generator()), "cannot fill gaps"),
        (lambda: samples(*UNIFORM, 2, sampler=Ancestral(1)), r"use Revise\(steps\)"),
    ],
)
def test_bad_requests_say_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()
