"""With exact conditionals every bound is -log p(x) of every x: the known-answer tests of weights, masks and
schedules."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Batch
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.noise import TIMES, Cosine, Polynomial, mask_some
from objectives.uniform_diffusion import UniformDiffusion
from tests.objectives.exact import ENTROPY, NATS, SEQUENCES, L, Oracle, P, V, batch_of, leave_one_out, uniform_kernel

MASKED = MaskedDiffusion(vocab_size=V, eot=0)
ORACLE = Oracle(extra_columns=1)
UNIFORM = Oracle(kernel=uniform_kernel)
nodes, weights = np.polynomial.legendre.leggauss(64)
QUADRATURE = list(zip((nodes + 1) / 2, weights / 2, strict=True))


def subsets(n):
    """All non-empty sets of n positions, as bool [2^n - 1, n]."""
    return torch.tensor([[bool(i >> j & 1) for j in range(n)] for i in range(1, 2**n)])


def exact_masked_nats(objective=MASKED, oracle=ORACLE, x=SEQUENCES):
    """nats [N, subsets] summed over the masked positions, for every sequence and every set of masked positions."""
    masks = subsets(x.shape[1])
    return masks, torch.stack(
        [objective.masked_nats(oracle, Batch.of(x), m.expand(len(x), -1)).sum(1) for m in masks], 1
    )


def test_the_language_is_the_one_whose_entropy_is_known():
    assert ENTROPY == pytest.approx(2.8829121132, abs=1e-10)


def test_next_token_gives_the_likelihood_of_every_sequence():
    got = NextToken(vocab_size=V, eot=V).evaluate(Oracle(), Batch.of(SEQUENCES), torch.Generator())
    torch.testing.assert_close(got.nats_B, NATS)
    assert got.exact and got.variance == 0 and got.interval() == (got.nats_B.sum().item(),) * 2


@pytest.mark.parametrize("schedule", [Polynomial(), Polynomial(0.5), Polynomial(3.0), Cosine()])
def test_the_integral_of_masked_diffusion_over_time_is_tight_whatever_the_schedule(schedule):
    """K1. Substituting t = s^4 makes the ends of all these schedules smooth enough for Gauss-Legendre."""
    masks, nats = exact_masked_nats()
    k = masks.sum(1).double()
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for s, w in QUADRATURE:
        t = torch.tensor(s**4)
        p, rate = schedule.noised(t), schedule.rate(t)
        chance = p**k * (1 - p) ** (L - k)
        total += 4 * s**3 * w * rate / p * (nats * chance).sum(1)
    torch.testing.assert_close(total, NATS, rtol=1e-9, atol=1e-9)


def test_with_the_fraction_integrated_out_it_is_tight_too():
    """K2: k masked tokens, k uniform on 1 .. L, weight L / k."""
    masks, nats = exact_masked_nats()
    k = masks.sum(1)
    choose = torch.tensor([math.comb(L, n) for n in k.tolist()])
    torch.testing.assert_close((nats / (k * choose)).sum(1), NATS, rtol=1e-12, atol=1e-12)


def test_it_is_the_mean_of_autoregression_over_all_orders():
    """Any-order autoregression: with conditionals that belong to no joint distribution, so that orders differ."""

    class Inconsistent(Oracle):
        def hidden(self, tokens_BT, visibility, time=None):
            torch.manual_seed(int((tokens_BT * torch.tensor([16, 4, 1])).sum(1).max()))
            return torch.randn(len(tokens_BT), L, V, dtype=torch.float64)

    oracle, x = Inconsistent(extra_columns=1), SEQUENCES[[14]]
    masks, nats = exact_masked_nats(oracle=oracle, x=x)
    k = masks.sum(1)
    choose = torch.tensor([math.comb(L, n) for n in k.tolist()])
    bound = (nats / (k * choose)).sum(1)
    orders = []
    for order in itertools.permutations(range(L)):
        total = 0.0
        for i, position in enumerate(order):
            masked = torch.zeros(1, L, dtype=torch.bool)
            masked[0, list(order[i:])] = True
            total += MASKED.masked_nats(oracle, Batch.of(x), masked)[0, position]
        orders.append(total)
    torch.testing.assert_close(bound[0], torch.stack(orders).mean(), rtol=1e-12, atol=1e-12)
    assert torch.stack(orders).std() > 0.1


def test_denoising_score_entropy_is_the_same_loss():
    """SEDD, absorbing, with s = q (1 - p) / p from the same network: its integrand in p, over all masked positions."""
    masks, nats = exact_masked_nats()
    for p in (0.1, 0.5, 0.9):
        for m, expected in zip(masks, nats.T, strict=True):
            log_q = ORACLE.hidden(SEQUENCES.masked_fill(m, V), MASKED.visibility)
            ratio = (1 - p) / p  # r of the clean token, 0 of the others
            s = log_q.exp() * ratio
            log_s_x = (log_q + math.log(ratio)).gather(2, SEQUENCES[..., None])[..., 0]
            score_entropy = s.sum(-1) - ratio * log_s_x + ratio * (math.log(ratio) - 1)
            # The rate at which p falls away in reverse is 1 / (1 - p), sigma' of their noise.
            torch.testing.assert_close((score_entropy * m).sum(1) / (1 - p), expected / p, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_block_diffusion_is_tight_for_every_block_size(size):
    """K2, with blocks that do not divide the length among them."""
    objective = BlockDiffusion(V, 0, block_size=size)
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for start in range(0, L, size):
        n = min(size, L - start)
        for inside in subsets(n):
            masked = torch.zeros(len(SEQUENCES), L, dtype=torch.bool)
            masked[:, start : start + n] = inside
            nats = objective.masked_nats(ORACLE, Batch.of(SEQUENCES), masked).sum(1)
            k = int(inside.sum())
            total += nats / (k * math.comb(n, k))
    torch.testing.assert_close(total, NATS, rtol=1e-12, atol=1e-12)


def uniform_bound(others_only):
    """The integral of uniform diffusion over p for every sequence, summed over every noised sequence."""
    objective = UniformDiffusion(V, 0)
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for s, w in QUADRATURE:
        p = torch.tensor(s**4)
        kernel = uniform_kernel(p)
        chance_xz = kernel[SEQUENCES[:, None], SEQUENCES[None]].prod(-1)  # q(z | x) of all pairs
        evidence = kernel[:, SEQUENCES].permute(1, 2, 0)
        conditional = leave_one_out(P, evidence)
        if not others_only:
            conditional = conditional * evidence
            conditional = conditional / conditional.sum(-1, keepdim=True)
        for z, q in enumerate(conditional):
            for position in range(L):
                log_q = q[position].log().expand(len(SEQUENCES), -1)
                noised = SEQUENCES[z, position].expand(len(SEQUENCES))
                value = objective.integrand(log_q, SEQUENCES[:, position], noised, p.expand(len(SEQUENCES)))
                total += 4 * s**3 * w * chance_xz[:, z] * value
    return total


@pytest.mark.thorough
def test_uniform_diffusion_is_tight_for_what_all_other_tokens_tell_and_not_with_the_noised_one_too():
    """K3."""
    torch.testing.assert_close(uniform_bound(others_only=True), NATS, rtol=1e-9, atol=1e-9)
    assert (P.flatten() * uniform_bound(others_only=False)).sum().item() == pytest.approx(4.294081, abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_finitely_many_steps_are_looser_by_what_the_tokens_tell_of_each_other_over_the_number_of_steps(steps):
    """K4, on two tokens: H + I / T."""
    joint = torch.from_numpy(np.random.default_rng(1).dirichlet(np.full(4, 0.5))).view(2, 2)
    x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    masks, nats = exact_masked_nats(MaskedDiffusion(2, 0), Oracle(joint, 1), x)
    k, total = masks.sum(1).double(), 0.0
    for i in range(1, steps + 1):
        p = i / steps
        total = total + (1 / steps) / p * (nats * p**k * (1 - p) ** (2 - k)).sum(1)
    entropy = -(joint * joint.log()).sum()
    information = -sum((joint.sum(d) * joint.sum(d).log()).sum() for d in (0, 1)) - entropy
    assert (joint.flatten() * total).sum().item() == pytest.approx((entropy + information / steps).item(), rel=1e-12)


@pytest.mark.thorough
def test_an_evaluator_that_cuts_the_window_reports_too_little_and_ours_does_not():
    """K5, tokens that tell nothing of each other: from p = 1e-3 on the integral gives what the token noised so much
    still tells of the clean one, and the entropy of that noise, 0.019 nats, is missing."""
    K = 50258  # GPT-2's and a mask
    objective = UniformDiffusion(K, 0)
    log_q = torch.full((2, K), -math.log(K), dtype=torch.float64)

    step, cut = 0.03, torch.tensor(1e-3, dtype=torch.float64).logit()

    def integral(first):
        """By the trapezoid rule in the logit of p, where the integrand falls off at both ends."""
        total = 0.0
        for i in range(first, 1230):
            p, weight = (cut + step * i).sigmoid(), step / 2 if i == first else step
            clean, noised = torch.tensor([0, 0]), torch.tensor([0, 1])
            same, other = objective.integrand(log_q, clean, noised, p.expand(2)).tolist()
            stays = 1 - p + p / K
            total += weight * p * (1 - p) * (stays * same + (1 - stays) * other)
        return total.item()

    assert integral(-770) == pytest.approx(math.log(K), abs=1e-5)
    changed = 1e-3 * (K - 1) / K
    noise = -(1 - changed) * math.log(1 - changed) - changed * math.log(changed / (K - 1))
    assert noise == pytest.approx(0.0187, abs=1e-4)
    assert integral(0) == pytest.approx(math.log(K) - noise, abs=1e-4)


class Uniform:
    """A model that knows nothing: uniform over what it may say."""

    def hidden(self, tokens_BT, visibility, time=None):
        return torch.zeros(*tokens_BT.shape, 6, dtype=torch.float64)

    def logits(self, hidden):
        return hidden


@pytest.mark.parametrize("T", [1, 7, 64])
@pytest.mark.parametrize(
    "objective",
    [NextToken(6, 0), MaskedDiffusion(5, 0), BlockDiffusion(5, 0, 4), BlockDiffusion(5, 0, 1)],
    ids=lambda o: type(o).__name__,
)
def test_a_uniform_model_is_at_exactly_log_vocabulary_size(objective, T):
    got = objective.evaluate(Uniform(), Batch.of(torch.randint(5, (9, T))), torch.Generator())
    expected = torch.full((9,), T * math.log(objective.vocab_size), dtype=torch.float64)
    torch.testing.assert_close(got.nats_B, expected)
    assert got.variance < 1e-18 and got.exact == (got.degrees == 0)


ALL = {
    "next_token": (NextToken(V, V), Oracle()),
    **{f"masked {times}": (MaskedDiffusion(V, 0, times=times), ORACLE) for times in TIMES},
    "masked cosine": (MaskedDiffusion(V, 0, schedule=Cosine()), ORACLE),
    "masked cubic": (MaskedDiffusion(V, 0, schedule=Polynomial(3.0)), ORACLE),
    "block 1": (BlockDiffusion(V, 0, 1), ORACLE),
    "block 2": (BlockDiffusion(V, 0, 2), ORACLE),
    "block 3": (BlockDiffusion(V, 0, 3), ORACLE),
    "uniform": (UniformDiffusion(V, 0), UNIFORM),
    "uniform linear": (UniformDiffusion(V, 0, schedule=Polynomial(1.5), times="stratified"), UNIFORM),
}
every = pytest.mark.parametrize("name", ALL)


@pytest.mark.thorough
@every
def test_estimates_of_loss_and_bound_agree_with_the_exact_value(name):
    objective, oracle = ALL[name]
    x = SEQUENCES[[5, 11, 20, 26]].repeat(8, 1)
    truth = NATS[[5, 11, 20, 26]].sum() * 8
    bounds = [objective.evaluate(oracle, Batch.of(x), torch.Generator().manual_seed(i)).nats_B.sum() for i in range(60)]
    losses = [objective.loss(oracle, Batch.of(x), torch.Generator().manual_seed(i)) for i in range(60)]
    for values, exact in ((bounds, truth), (losses, truth / x.numel())):
        values = torch.stack([torch.as_tensor(v).double() for v in values])
        assert abs(values.mean() - exact) < 4 * values.std() / len(values) ** 0.5 + 1e-6


@pytest.mark.thorough
@every
def test_the_exact_denoiser_never_falls_below_the_entropy(name):
    """K9: what does is no bound."""
    objective, oracle = ALL[name]
    assert falls_below(lambda g: objective.evaluate(oracle, Batch.of(SEQUENCES), g).nats_B) is False


def falls_below(nats_of):
    """Whether the expectation over the language lies significantly below its entropy."""
    values = torch.stack([(P.flatten() * nats_of(torch.Generator().manual_seed(i))).sum() for i in range(200)])
    return bool(values.mean() < ENTROPY - 4 * values.std() / len(values) ** 0.5 - 1e-9)


def test_a_score_that_is_no_bound_is_found_out():
    """Whole words scored from partly masked letters, over the masked fraction of letters: Sum_k H_k / k <= H (Han)."""

    def word_score(generator):
        masked, weight, _ = mask_some(torch.ones_like(SEQUENCES, dtype=torch.bool), generator)
        known = ORACLE.known(SEQUENCES.masked_fill(masked, V))
        joint = P[None] * known[:, 0, :, None, None] * known[:, 1, None, :, None] * known[:, 2, None, None, :]
        word = P.flatten() / joint.flatten(1).sum(1)
        return -word.log() * weight

    assert falls_below(word_score)
    assert falls_below(lambda g: MASKED.evaluate(ORACLE, Batch.of(SEQUENCES), g).nats_B * 0.9)


class FirstGiven(Oracle):
    """Knows that the first token is not noised."""

    def conditionals(self, evidence):
        first = torch.nn.functional.one_hot(evidence[:, :1].argmax(-1), V).double()
        return super().conditionals(torch.cat([first, evidence[:, 1:]], 1))


@pytest.mark.thorough
@every
def test_only_answers_are_noised_trained_on_and_scored(name):
    """The value is that of the answers given the rest, where all else is known; tokens that are no answer stay."""
    objective, oracle = ALL[name]
    if isinstance(objective, UniformDiffusion):
        oracle = FirstGiven(kernel=uniform_kernel)
    answers = torch.tensor([[False, True, True]]).expand(len(SEQUENCES), -1)
    given = -(P / P.sum((1, 2), keepdim=True)).log().flatten()  # the first token is given
    values = [
        objective.evaluate(oracle, batch_of(SEQUENCES, answers), torch.Generator().manual_seed(i)).nats_B
        for i in range(150)
    ]
    losses = [
        objective.loss(oracle, batch_of(SEQUENCES, answers), torch.Generator().manual_seed(i)) for i in range(150)
    ]
    values = torch.stack(values)
    error = values.std(0) / len(values) ** 0.5
    assert ((values.mean(0) - given).abs() < 5 * error + 1e-6).all()
    losses = torch.stack(losses).double()
    expected = given.sum() / answers.sum()
    assert abs(losses.mean() - expected) < 4 * losses.std() / len(losses) ** 0.5 + 1e-6


@every
def test_a_batch_without_an_answer_has_no_loss(name):
    objective, oracle = ALL[name]
    none = torch.zeros_like(SEQUENCES, dtype=torch.bool)
    assert objective.loss(oracle, batch_of(SEQUENCES, none), torch.Generator()) == 0
    assert (objective.evaluate(oracle, batch_of(SEQUENCES, none), torch.Generator()).nats_B == 0).all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["masked stratified", "block 2", "uniform"])
def test_the_interval_of_the_bound_covers_its_long_run_mean_as_often_as_it_says(name):
    objective, oracle = ALL[name]
    objective = type(objective)(**_settings(objective), evaluation_draws=12)
    x = SEQUENCES.repeat(2, 1)
    runs = [objective.evaluate(oracle, Batch.of(x), torch.Generator().manual_seed(i)) for i in range(300)]
    mean = 2 * NATS.sum().item()
    covered = sum(low <= mean <= high for low, high in (run.interval() for run in runs))
    assert 0.925 * 300 <= covered <= 0.975 * 300
    observed = torch.stack([run.nats_B.sum() for run in runs]).var().item()
    stated = sum(run.variance for run in runs) / len(runs)
    assert 0.8 < stated / observed < 1.25


def _settings(objective):
    settings = {"vocab_size": objective.vocab_size, "eot": 0}
    return settings | ({"block_size": objective.block_size} if isinstance(objective, BlockDiffusion) else {})


class HarderWithMoreMasked:
    """Token 0 is always right, and the surer the less is masked: the loss of a row depends on its time."""

    def hidden(self, tokens_BT, visibility, time=None):
        masked_B11 = (tokens_BT == V).double().mean(1)[:, None, None]
        return torch.tensor([9.0, 0.0, 0.0, 0.0]).double() * (1 - masked_B11).expand(*tokens_BT.shape, 4)

    def logits(self, hidden):
        return hidden


@pytest.mark.thorough
def test_the_ways_of_drawing_times_vary_in_the_order_that_theory_says():
    x, model = torch.zeros(16, 64, dtype=torch.long), HarderWithMoreMasked()

    def variance(of):
        return torch.stack([of(torch.Generator().manual_seed(i)) for i in range(300)]).var().item()

    independent, antithetic, stratified, rotated = (
        variance(lambda g, times=times: MaskedDiffusion(V, 0, times=times).loss(model, Batch.of(x), g))
        for times in TIMES
    )
    integrated_out = 2 * variance(
        lambda g: MASKED.evaluate(model, Batch.of(x), g).nats_B.mean() / 64
    )  # of one draw, not of two
    assert independent > 1.2 * antithetic > 2.4 * rotated > 3 * stratified
    assert integrated_out < rotated


@pytest.mark.parametrize("options", [{}, {"timed": True}])
def test_unmasked_positions_and_the_mask_token_are_never_predicted(options):
    """K13."""
    objective = MaskedDiffusion(5, 0, **options)
    attention = partial(Attention, head_dim=8, queries_per_kv=1, position=None)
    model = LanguageModel(6, 16, ["a"], {"a": attention}, depth=1, **objective.model_options).double()
    torch.nn.init.normal_(model.head.weight)
    x = torch.randint(5, (3, 9), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    nats = objective.masked_nats(model, Batch.of(x), masked, torch.full((3,), 0.5))
    assert (nats[~masked] == 0).all() and (nats[masked] > 0).all()
    nats.sum().backward()
    assert (model.head.weight.grad[5] == 0).all()
    with pytest.raises(ValueError, match="timed"):
        objective_other = MaskedDiffusion(5, 0, timed=not options)
        objective_other.masked_nats(model, Batch.of(x), masked, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskedDiffusion(3, 0, evaluation_draws=1), "evaluation_draws=1: a standard error needs at least 2"),
        (lambda: MaskedDiffusion(3, 0, times="sobol"), "times='sobol' must be one of independent"),
        (lambda: MaskedDiffusion(3, 0, weighting="none"), "weighting='none' must be 'bound' or 'flat'"),
        (
            lambda: MaskedDiffusion(3, 0, schedule=Clipped()),
            "noises a fraction 0 of the tokens at t = 0 and 0.9 at t = 1",
        ),
        (lambda: UniformDiffusion(3, 0, schedule=Clipped()), "it must rise from 0 to 1"),
        (lambda: BlockDiffusion(3, 0, block_size=0), "block_size=0 must be at least 1"),
        (lambda: NextToken(3, 0, ahead=-1), "ahead=-1 must be 0"),
    ],
)
def test_bad_settings_say_what_is_allowed(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class Clipped(Polynomial):
    def noised(self, t):
        return 0.9 * t
