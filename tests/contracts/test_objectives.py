"""The duties of every objective (`objectives.contracts.Objective`), found by its config, on a small real model.

That its bound is one, and tight, is tested on languages that are known (tests/objectives).
"""

from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from archs.language_model import LanguageModel
from objectives.contracts import Batch, Objective, Request, Sampler
from tests.contracts.discovery import LENGTH, WIDTH, composed, likelihoods, names, shaken

V, EOT = 16, 15
OBJECTIVES, SAMPLERS = likelihoods(), [name for name in names("sampler") if name != "auto"]
every = pytest.mark.parametrize("name", OBJECTIVES)


def build(name: str, *overrides: str) -> Objective:
    extra = ["objective.build.block_size=4"] if name == "block_diffusion" else []
    return instantiate(composed(f"objective={name}", *extra, *overrides).objective.build, vocab_size=V, eot=EOT)


def model_for(objective: Objective, arch: str = "transformer", dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    config = composed(f"arch={arch}")
    model = instantiate(config.arch.model, vocab_size=objective.model_vocab_size, **objective.model_options)
    model = shaken(model, dtype)
    with torch.no_grad():
        model.head.weight.normal_()
    return model


def batch(B: int = 5, T: int = LENGTH) -> Batch:
    return Batch.of(torch.randint(V - 1, (B, T), generator=torch.Generator().manual_seed(1)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@every
def test_it_says_what_it_needs_and_its_model_can_be_built_and_checked(name):
    objective = build(name)
    assert isinstance(objective, Objective) and objective.vocab_size == V <= objective.model_vocab_size
    assert objective.samplers and all(issubclass(kind, Sampler) for kind in objective.samplers)
    objective.check(model_for(objective), LENGTH)
    assert composed(f"objective={name}").objective.name == name


@every
def test_the_loss_is_a_scalar_whose_gradient_reaches_every_parameter_and_all_chance_is_the_generators(name):
    objective = build(name)
    model = model_for(objective)
    torch.manual_seed(1)
    loss = objective.loss(model, batch(), generator())
    torch.manual_seed(2)
    assert objective.loss(model, batch(), generator()) == loss
    assert loss.shape == () and loss.isfinite() and loss > 0
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every
def test_tokens_of_weight_zero_are_given_and_neither_predicted_nor_noised(name):
    """Whatever is predicted is predicted from them as they are; only where they change does a prediction change."""
    objective = build(name)
    model = model_for(objective).eval()
    weights = torch.zeros(5, LENGTH)
    weights[:, 8:12] = 1.0
    answers = replace(batch(), weights_BT=weights)
    got = objective.evaluate(model, answers, generator())
    whole = objective.evaluate(model, batch(), generator())
    assert (got.nats_B < whole.nats_B).all() and got.nats_B.shape == (5,) and got.nats_B.dtype == torch.float64
    assert objective.logits(model, answers).shape[0] == 5 * 4
    assert objective.logits(model, answers).shape[1] >= V
    none = replace(batch(), weights_BT=torch.zeros(5, LENGTH))
    assert objective.evaluate(model, none, generator()).nats_B.abs().max() == 0
    if objective.model_options.get("ahead") is None:
        assert objective.loss(model, none, generator()) == 0


@every
def test_a_weight_counts_as_a_factor_on_the_loss_of_its_token(name):
    objective = build(name)
    model = model_for(objective).eval()
    one = objective.loss(model, batch(), generator())
    double = replace(batch(), weights_BT=torch.full((5, LENGTH), 2.0))
    torch.testing.assert_close(objective.loss(model, double, generator()), 2 * one, rtol=1e-5, atol=0)
    signs = torch.where(torch.arange(LENGTH) % 2 == 0, 1.0, -1.0).expand(5, -1)
    rest = (replace(batch(), weights_BT=w) for w in (signs.clamp(min=1), signs))  # advantages may be negative
    assert all(objective.loss(model, b, generator()).isfinite() for b in rest)


@every
@pytest.mark.parametrize("packed", [False, True])
def test_the_losses_of_the_parts_of_a_batch_sum_to_its_loss_and_what_a_part_holds_draws_nothing(name, packed):
    objective = build(name)
    model, whole = model_for(objective), batch()
    weights_BT = torch.rand(whole.tokens_BT.shape, generator=generator(2)).mul(2).clamp(min=1) - 1  # half count
    starts_BT = (torch.arange(LENGTH) % 4 == 0).expand_as(weights_BT) if packed else None
    whole = replace(whole, weights_BT=weights_BT.double() * torch.arange(5)[:, None], starts_BT=starts_BT)
    loss = objective.loss(model, whole, generator())
    noised = replace(whole, noise=objective.noise(whole, generator()))
    parts = [objective.loss(model, noised.part(slice(*rows)), generator(9)) for rows in ((0, 1), (1, 3), (3, 5))]
    torch.testing.assert_close(sum(parts), loss)


@every
def test_a_held_out_value_says_whether_it_is_exact_and_how_far_a_bound_is_off(name):
    objective = build(name)
    model = model_for(objective).eval()
    first, again = (objective.evaluate(model, batch(), generator(s)) for s in (0, 1))
    assert first.exact == (first.variance == 0) == (first.degrees == 0)
    assert first.exact == torch.equal(first.nats_B, again.nats_B)
    low, high = first.interval()
    assert low <= first.nats_B.sum() <= high


@every
def test_packed_documents_are_predicted_as_if_alone(name):
    objective = build(name)
    model, tokens = model_for(objective).eval(), batch(1, 20)
    lengths = [8, 1, 11]
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [0, 8, 9]] = True
    packed = objective.logits(model, replace(tokens, starts_BT=starts))
    begin = 0
    for length in lengths:
        one = Batch.of(tokens.tokens_BT[:, begin : begin + length])
        if name == "uniform_diffusion":  # the noise that stands in for what is asked goes by the place in the batch
            begin += length
            continue
        torch.testing.assert_close(packed[begin : begin + length], objective.logits(model, one), rtol=1e-9, atol=1e-9)
        begin += length
    objective.loss(model, replace(tokens, starts_BT=starts), generator()).backward()


@every
def test_packed_documents_are_worth_what_they_are_worth_alone(name):
    """The bound of the pack is the sum of those of its documents, in the mean over the noise."""
    objective = build(name)
    model, tokens = model_for(objective).eval(), batch(1, 12).tokens_BT
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [0, 5]] = True
    draws = 400

    def mean(b: Batch) -> tuple[float, float]:
        many = Batch(b.tokens_BT.repeat(draws, 1), b.weights_BT.repeat(draws, 1))
        if b.starts_BT is not None:
            many = replace(many, starts_BT=b.starts_BT.repeat(draws, 1))
        nats_B = objective.evaluate(model, many, generator()).nats_B
        return nats_B.mean().item(), nats_B.var().item() / draws

    together, error = mean(replace(Batch.of(tokens), starts_BT=starts))
    parts = [mean(Batch.of(part)) for part in tokens.split([5, 7], dim=1)]
    error = (error + sum(e for _, e in parts)) ** 0.5
    assert abs(together - sum(m for m, _ in parts)) < 5 * error + 1e-6 * together


@every
def test_the_flops_of_training_are_those_that_run_but_for_pairs_that_are_not_seen_and_the_chance_of_masks(name):
    objective = build(name)
    model, B = model_for(objective, dtype=torch.float32), 64
    tokens, head = batch(B), []
    inner = model.logits
    model.logits = lambda hidden: head.append(hidden.numel() // WIDTH) or inner(hidden)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        objective.loss(model, tokens, generator())
    T = LENGTH * objective.visibility.copies
    layers = [(block.mixer, T) for block in model.blocks]
    layers += [(ahead.block.mixer, LENGTH - k) for k, ahead in enumerate(model.ahead, 1)]
    unseen = sum(mixer.pair_flops * (n * n - objective.visibility.pairs(n)) for mixer, n in layers)
    run = counter.get_total_flops() / B - unseen
    # The head runs on as many tokens as are masked, which is a matter of chance: within four standard errors.
    chance = 4 * model.head_flops * LENGTH * 0.3 / B**0.5
    assert abs(objective.flops(model, LENGTH) - run) <= (chance if "diffusion" in name else 0) + 1e-6 * run
    half = objective.flops(model, LENGTH, 0.5)
    assert half < objective.flops(model, LENGTH)


PAIRS = [(o, s) for o in OBJECTIVES for s in SAMPLERS]


def able(objective: Objective, sampler: Sampler) -> bool:
    return isinstance(sampler, objective.samplers)


@pytest.mark.parametrize(("name", "sampler"), [*PAIRS, *((o, None) for o in OBJECTIVES)])
def test_every_sampler_that_can_decode_it_keeps_prompts_and_says_what_it_did_and_every_other_is_refused(name, sampler):
    objective = build(name)
    model = model_for(objective).eval()
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7])]
    request = Request(prompts, LENGTH, generator(), copies=3, stop=(EOT,))
    if sampler is not None:
        sampler = instantiate(composed_sampler(sampler))
        if not able(objective, sampler):
            with pytest.raises(ValueError, match=f"cannot be decoded by {type(sampler).__name__}: it takes one of"):
                objective.sample(model, request, sampler)
            return
    out = objective.sample(model, request, sampler)
    assert out.tokens_BT.shape == (6, LENGTH) == out.log_probs_BT.shape and out.lengths_B.shape == (6,)
    for row, prompt in enumerate([prompts[0]] * 3 + [prompts[1]] * 3):
        assert torch.equal(out.tokens_BT[row, : len(prompt)], prompt)
        length = int(out.lengths_B[row])
        ended = (out.tokens_BT[row, len(prompt) : length] == EOT).nonzero()[:, 0].tolist()
        assert length == LENGTH or ended == [length - len(prompt) - 1]
        log_probs = out.log_probs_BT[row]
        assert (log_probs[: len(prompt)] == 0).all() and (log_probs[len(prompt) : length] < 0).all()
    assert ((out.tokens_BT >= 0) & (out.tokens_BT < V)).all()
    assert out.evaluations > 0 and 0 < out.predictions
    assert objective.sampling_flops(model, request, out) > 0
    again = objective.sample(model, replace(request, generator=generator()), sampler)
    assert torch.equal(out.tokens_BT, again.tokens_BT)


def composed_sampler(name: str):
    from hydra import compose, initialize_config_dir

    from experiments import CONFIGS

    small = {"ancestral": "steps=6", "ordered": "steps=6", "remask": "steps=9", "revise": "steps=5"}
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        overrides = [f"sampler.{small[name]}"] if name in small else []
        return compose("sample", [f"sampler={name}", "run=none", *overrides]).sampler
