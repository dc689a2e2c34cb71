"""Samplers against the exact distribution: which follow it, by how much the others err, and what each costs."""

import math

import pytest
import torch

from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Request
from objectives.decoding import draws
from objectives.decoding.draws import Draw, choose
from objectives.decoding.revising import Revise
from objectives.decoding.unmasking import Ancestral, LeftToRight, Ordered, Remask, Threshold
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.uniform_diffusion import UniformDiffusion
from tests.objectives.exact import L, Oracle, P, V, request, uniform_kernel

MASKED, ORACLE = MaskedDiffusion(vocab_size=V, eot=0), Oracle(extra_columns=1)
UNIFORM = UniformDiffusion(V, 0), Oracle(kernel=uniform_kernel)
COPIED = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


EMPTY, FULL = torch.zeros(1, 0, dtype=torch.long), torch.zeros(2, L, dtype=torch.long)


def samples(objective, oracle, n=3000, length=L, sampler=None, **options):
    return objective.sample(oracle, request(EMPTY, length, copies=n, **options), sampler)


def chi_square(tokens_BT, joint):
    V, L = joint.shape[0], joint.dim()
    counts = torch.bincount(tokens_BT @ V ** torch.arange(L - 1, -1, -1), minlength=V**L).double()
    expected = len(tokens_BT) * joint.flatten()
    return ((counts - expected) ** 2 / expected)[expected > 3].sum()


@pytest.mark.thorough
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
        (*UNIFORM, Revise(60)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_with_enough_steps_samples_follow_the_distribution(objective, oracle, sampler):
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


def test_remasking_takes_tokens_back_and_keeps_the_masked_fraction_on_its_schedule():
    fractions, back = [], []

    class Watch(Oracle):
        def hidden(self, tokens_BT, visibility, time=None):
            masked = tokens_BT == V
            if fractions:
                back.append((masked & ~self.before).double().mean().item())
            self.before = masked
            fractions.append(masked.double().mean().item())
            return super().hidden(tokens_BT, visibility)

    samples(MASKED, Watch(extra_columns=1), 20_000, sampler=Remask(5, eta=0.4))
    assert fractions == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=0.01)
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
            def hidden(self, tokens_BT, visibility, time=None):
                left.append((tokens_BT == 2).double().mean(0))  # noqa: B023, called within the loop
                return super().hidden(tokens_BT, visibility)

        objective = MaskedDiffusion(2, 0)
        objective.sample(Watch(joint, 1), request(EMPTY, 3, copies=400, draw=Draw(temperature=0)), Ordered(by, 3))
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
def test_masked_positions_are_filled_and_what_is_given_is_kept(objective, oracle):
    prompt = torch.tensor([[2, -1, 1]])
    out = objective.sample(oracle, request(prompt, L, copies=400))
    assert (out.tokens_BT[:, [0, 2]] == prompt[:, [0, 2]]).all()
    assert ((out.tokens_BT[:, 1] >= 0) & (out.tokens_BT[:, 1] < V)).all()
    if isinstance(objective, MaskedDiffusion):
        truth = P[2, :, 1] / P[2, :, 1].sum()
        found = torch.bincount(out.tokens_BT[:, 1], minlength=V) / 400
        assert ((found - truth).abs() < 4 * (truth * (1 - truth) / 400).sqrt() + 1e-9).all()


@pytest.mark.parametrize("objective", [NextToken(V, V), MASKED, BlockDiffusion(V, 0, 2), UniformDiffusion(V, 0)])
def test_a_prompt_is_kept_and_continued(objective):
    oracle = UNIFORM[1] if isinstance(objective, UniformDiffusion) else Oracle(extra_columns=0)
    if isinstance(objective, MaskedDiffusion | BlockDiffusion):
        oracle = ORACLE
    out = objective.sample(oracle, request(torch.tensor([[2], [1]]), L))
    assert out.tokens_BT[:, 0].tolist() == [2, 1] and out.tokens_BT.shape == (2, L)


def test_categorical_draws_have_the_whole_tail(monkeypatch):
    """K7: the part of the line that maps to a token of probability 1e-9 is 1e-9; a float32 uniform has no such step."""
    p = torch.tensor([[0.6, 0.4 - 1e-9, 1e-9]], dtype=torch.float64)
    for at, expected in (
        (0.0, 0),
        (0.6 - 1e-12, 0),
        (0.6 + 1e-12, 1),
        (1 - 1.1e-9, 1),
        (1 - 0.9e-9, 2),
        (1 - 2**-53, 2),
    ):
        monkeypatch.setattr(draws, "uniform", lambda shape, g, at=at: torch.full(shape, at, dtype=torch.float64))
        assert choose(p, generator())[0].tolist() == [expected]
    assert choose(torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64), generator())[0].tolist() == [1]


@pytest.mark.thorough
def test_a_float32_gumbel_would_be_colder_than_what_it_draws_from_and_ours_is_not():
    """On a grid of 2^-12 in place of 2^-24, so that a few thousand draws show it: weight p h(a), a = 2^12 p."""
    n, tokens = 20_000, 1024  # a quarter of the mass lies on tokens of probability 2^-12
    p = torch.cat([torch.tensor([0.75]), torch.full((tokens,), 2**-12)]).double()
    u = torch.randint(2**12, (n, tokens + 1), generator=generator()).double() / 2**12
    coarse = (p.log() - (-(u + 1e-10).log()).log()).argmax(1)
    ours = torch.cat([Draw()(p.log().expand(1000, -1), generator(i))[0] for i in range(n // 1000)])
    rare = [(ids > 0).double().mean().item() for ids in (coarse, ours)]
    error = math.sqrt(0.25 * 0.75 / n)
    assert rare[0] < 0.25 - 10 * error
    assert abs(rare[1] - 0.25) < 4 * error


def test_temperature_and_top_p_change_the_distribution_as_they_say():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double().log()
    torch.testing.assert_close(Draw().probabilities(logits), logits.exp())
    cold = Draw(temperature=0.5).probabilities(logits)
    torch.testing.assert_close(cold, logits.exp() ** 2 / (logits.exp() ** 2).sum())
    nucleus = Draw(top_p=0.7).probabilities(logits)
    torch.testing.assert_close(nucleus, torch.tensor([[0.625, 0.375, 0.0, 0.0]]).double())
    assert Draw(top_p=1e-9).probabilities(logits).tolist() == [[1, 0, 0, 0]]
    assert Draw(temperature=0)(logits, generator())[0].tolist() == [0]


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
        (lambda: request(FULL, L), "length=3 leaves nothing to fill .* prompt of 3 tokens"),
        (lambda: request(FULL, L - 1), "length=2 leaves nothing to fill"),
        (lambda: request([], L), "0 prompts of 1 copies"),
        (lambda: request(EMPTY, L, copies=0), "1 prompts of 0 copies"),
        (
            lambda: samples(NextToken(V, V), Oracle(), 2, sampler=Ancestral(1)),
            "NextToken cannot be decoded by Ancestral: it takes one of Autoregression",
        ),
        (lambda: NextToken(V, V).sample(Oracle(), request(FULL[:, :1] - 1, L)), "only continue, not fill masked"),
        (lambda: samples(*UNIFORM, 2, sampler=Ancestral(1)), "cannot be decoded by Ancestral: it takes one of Revise"),
        (lambda: samples(MASKED, ORACLE, 2, sampler=Revise(1)), "takes one of Unmasking"),
    ],
)
def test_bad_requests_say_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()


EVERY = {
    "next_token": (NextToken(V, V), Oracle(), None),
    "masked": (MASKED, ORACLE, Ordered("random", 1)),
    "block": (BlockDiffusion(V, 0, 2), ORACLE, Ancestral(3)),
    "uniform": (*UNIFORM, Revise(5)),
}
every = pytest.mark.parametrize("name", EVERY)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "sampler"), [("next_token", None), ("masked", Ancestral(100)), ("block", Ancestral(100))]
)
def test_prompts_of_several_lengths_are_each_continued_as_they_would_be_alone(name, sampler):
    """The tokens that follow a prompt have the distribution given that prompt, whatever others stand beside it."""
    objective, oracle, _ = EVERY[name]
    prompts, n = [torch.tensor([2]), torch.tensor([], dtype=torch.long), torch.tensor([1, 0])], 1500
    out = objective.sample(oracle, Request(prompts, L, generator(), copies=n), sampler)
    for i, prompt in enumerate(prompts):
        rows = out.tokens_BT[i * n : (i + 1) * n]
        assert (rows[:, : len(prompt)] == prompt).all()
        given = P[tuple(prompt.tolist())]
        truth = (given / given.sum()).flatten()
        rest = rows[:, len(prompt) :]
        ids = rest @ V ** torch.arange(rest.shape[1] - 1, -1, -1)
        found = torch.bincount(ids, minlength=len(truth)).double() / n
        assert ((found - truth).abs() < 5 * (truth * (1 - truth) / n).sqrt() + 0.012).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_those_of_the_distribution_that_was_drawn_from(temperature):
    """Autoregression: their sum is the log-probability of the whole sequence."""
    out = samples(NextToken(V, V), Oracle(), 200, draw=Draw(temperature))
    expected = torch.zeros(200, dtype=torch.float64)
    for t in range(L):
        conditional = P.sum(tuple(range(t + 1, L))) if t + 1 < L else P
        rows = conditional[tuple(out.tokens_BT[:, :t].T)] if t else conditional.expand(200, -1)
        q = (rows / rows.sum(-1, keepdim=True)) ** (1 / temperature)
        q = q / q.sum(-1, keepdim=True)
        expected += q.gather(1, out.tokens_BT[:, t : t + 1])[:, 0].log()
    torch.testing.assert_close(out.log_probs_BT.sum(1), expected)


@every
def test_every_token_that_was_drawn_has_a_log_probability_and_no_other(name):
    objective, oracle, sampler = EVERY[name]
    out = objective.sample(oracle, request(torch.tensor([[2]]), L, copies=50), sampler)
    assert (out.log_probs_BT[:, 0] == 0).all() and out.log_probs_BT.isfinite().all()
    assert (out.log_probs_BT[:, 1:] < 0).all()
    if name == "masked":  # all in one pass: what each position has by itself, given the prompt
        marginal = torch.stack([P[2].sum(1), P[2].sum(0)]) / P[2].sum()
        expected = marginal[torch.arange(2), out.tokens_BT[:, 1:]].log()
        torch.testing.assert_close(out.log_probs_BT[:, 1:], expected)


@every
def test_a_sequence_ends_with_the_first_stop_token_that_is_drawn(name):
    objective, oracle, sampler = EVERY[name]
    out = objective.sample(oracle, request(torch.tensor([[1]]), L, copies=300, stop=(1,)), sampler)
    for tokens, length in zip(out.tokens_BT.tolist(), out.lengths_B.tolist(), strict=True):
        drawn = tokens[1:length]  # a stop token in the prompt is no end
        assert 1 not in drawn[:-1] and (length == L or drawn[-1] == 1)
    assert 2 in out.lengths_B and L in out.lengths_B


def test_autoregression_stops_when_every_sequence_has_ended():
    joint = torch.zeros(2, 2, 2, 2, dtype=torch.float64)
    joint[1] = 1 / 8
    out = samples(NextToken(2, 2), Oracle(joint), 20, 4, stop=(1,))
    assert out.evaluations == out.predictions == 1 and (out.lengths_B == 1).all()
