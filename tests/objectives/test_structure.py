"""What objectives ask of real models: two copies in blocks, a cache of blocks, further tokens, and what it all
costs."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.channels.mlp import MLP
from archs.language_model import LanguageModel
from archs.mixers.attention import Attention
from archs.mixers.gated_delta import GatedDelta
from archs.mixers.latent_attention import LatentAttention
from archs.positions import Alibi, Rotary
from archs.visibility import BIDIRECTIONAL, CAUSAL, Kind, block_causal
from objectives.block_diffusion import BlockDiffusion
from objectives.contracts import Batch
from objectives.decoding.draws import Draw
from objectives.decoding.unmasking import Ancestral, Ordered
from objectives.masked_diffusion import MaskedDiffusion
from objectives.next_token import NextToken
from objectives.uniform_diffusion import UniformDiffusion
from tests.objectives.exact import batch_of, request

V, T = 11, 12
HEADS = dict(head_dim=8, queries_per_kv=1)
MIXERS = {
    "rotary": partial(Attention, **HEADS, position=Rotary()),
    "grouped with sinks": partial(Attention, head_dim=8, queries_per_kv=2, position=Rotary(), sinks=True),
    "alibi": partial(Attention, **HEADS, position=Alibi()),
    "learned": partial(Attention, **HEADS, position=None),
    "latent": partial(LatentAttention, head_dim=8, kv_rank=12, position=Rotary(layout="interleaved")),
    "delta": partial(GatedDelta, head_dim=8, value_heads_per_key_head=1, conv_width=4),
}
CHANNELS = {"mlp": partial(MLP, activation="silu", gated=True, expansion=2, multiple_of=8)}
blocks = pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "delta"])


def build(mixer, vocab_size=V + 1, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options |= {"max_length": 2 * T} if mixer == "learned" else {}
    model = LanguageModel(vocab_size, 32, [f"{mixer}+mlp"], MIXERS, CHANNELS, depth=2, **options).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        model.head.weight.normal_()
    return model


def tokens(B=3, T=T, seed=1):
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("length", "size"), [(4, 2), (12, 1), (12, 5), (12, 12), (7, 3)])
def test_the_pairs_of_two_copies_in_blocks(length, size):
    """K8: with whole blocks L^2 + L size."""
    seen = block_causal(size).visible(2 * length, 2 * length)
    for q in range(2 * length):
        for k in range(2 * length):
            block_q, block_k = q % length // size, k % length // size
            if q < length:
                expected = block_q == block_k if k < length else block_q > block_k
            else:
                expected = k >= length and block_q >= block_k
            assert seen[q, k] == expected
    assert seen.sum() == block_causal(size).pairs(2 * length)
    if length % size == 0:
        assert seen.sum() == length**2 + length * size


@blocks
def test_one_block_of_the_whole_length_is_masked_diffusion(mixer):
    model, x = build(mixer), tokens()
    masked = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    one = BlockDiffusion(V, 0, T).masked_nats(model, Batch.of(x), masked)
    torch.testing.assert_close(one, MaskedDiffusion(V, 0).masked_nats(model, Batch.of(x), masked))


@blocks
def test_blocks_of_one_token_are_autoregression(mixer):
    """The chain rule, one token after the other with the same weights: the next token is asked for by a mask."""
    model, x = build(mixer), tokens()
    got = BlockDiffusion(V, 0, 1).evaluate(model, Batch.of(x), torch.Generator())
    total = 0.0
    states = model.empty_states(len(x))
    for t in range(T):
        asked = model.logits(model.extend(torch.full((len(x), 1), V), states)[0])[:, 0, :V]
        states = model.extend(x[:, t : t + 1], states)[1]
        total = total - asked.log_softmax(-1).gather(1, x[:, t : t + 1])[:, 0]
    torch.testing.assert_close(got.nats_B, total.detach())
    assert got.exact


@blocks
@pytest.mark.parametrize("size", [3, 4])
def test_what_a_block_predicts_depends_on_its_own_noised_tokens_and_clean_ones_before(mixer, size):
    model, objective, x = build(mixer), BlockDiffusion(V, 0, size), tokens(1)
    masked = torch.zeros(1, T, dtype=torch.bool)
    masked[0, ::2] = True
    start, end = size, 2 * size
    before = objective.masked_nats(model, Batch.of(x), masked)[:, start:end]
    for t in range(T):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % V
        after = objective.masked_nats(model, Batch.of(y), masked)[:, start:end]
        own = start <= t < end
        if t >= end:
            assert torch.equal(after, before)
        elif own and masked[0, t]:  # only its own score changes, since another token is asked for
            changed = (after != before).nonzero()[:, 1].tolist()
            assert changed == [t - start]
        else:
            assert (after != before)[masked[:, start:end]].all()


@blocks
@pytest.mark.parametrize("timed", [False, True])
def test_blocks_from_the_cache_are_predicted_as_in_training(mixer, timed):
    objective = BlockDiffusion(V, 0, 4, timed=timed)
    model, x = build(mixer, **objective.model_options), tokens()
    seen = {}

    class Keep(Draw):
        def __call__(self, logits, generator):
            seen[len(seen)] = logits
            return super().__call__(logits, generator)

    out = objective.sample(model, request(x[:, :4], T, draw=Keep()), Ancestral(1)).tokens_BT
    assert torch.equal(out[:, :4], x[:, :4]) and (out < V).all()
    masked = torch.zeros_like(out, dtype=torch.bool)
    masked[:, 4:] = True
    answers = objective.logits(model, batch_of(out, masked)).view(len(out), 2, 4, V)
    for block in (0, 1):
        torch.testing.assert_close(seen[block].view(len(out), 4, V), answers[:, block])


def test_recurrent_backbones_cannot_run_two_copies_and_say_so():
    assert Kind.BLOCK_CAUSAL not in build("delta").visibilities
    assert Kind.BLOCK_CAUSAL in build("rotary").visibilities
    windowed = Attention(32, **HEADS, position=None, window=4)
    assert windowed.visibilities == {Kind.CAUSAL, Kind.BIDIRECTIONAL}
    with pytest.raises(ValueError, match="needs block-causal visibility.*choose another arch"):
        BlockDiffusion(V, 0, 4).check(build("delta"), T)


def test_a_block_size_must_divide_the_length_of_training():
    with pytest.raises(ValueError, match="block_size=5 does not divide sequence_length=12"):
        BlockDiffusion(V, 0, 5).check(build("rotary"), T)


OBJECTIVES = {
    "next_token": lambda: NextToken(V, 0),
    "two further tokens": lambda: NextToken(V, 0, ahead=2),
    "masked": lambda: MaskedDiffusion(V, 0),
    "masked timed": lambda: MaskedDiffusion(V, 0, timed=True),
    "block 4": lambda: BlockDiffusion(V, 0, 4),
    "block timed": lambda: BlockDiffusion(V, 0, 4, timed=True),
    "uniform": lambda: UniformDiffusion(V, 0),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("mixer", ["rotary", "latent"])
def test_the_forward_flops_of_training_are_those_that_run(name, mixer):
    """K11: but for unseen pairs, and the head on masked positions, which is counted at its mean."""
    objective = OBJECTIVES[name]()
    with torch.device("meta"):
        model = build(mixer, objective.model_vocab_size, torch.float32, **objective.model_options)
    real = build(mixer, objective.model_vocab_size, torch.float32, **objective.model_options)
    x, predicted = tokens(8), []
    inner = real.logits
    real.logits = lambda hidden: predicted.append(hidden.numel() // 32) or inner(hidden)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        objective.loss(real, Batch.of(x), torch.Generator().manual_seed(0))
    layers = [(b.mixer, T * objective.visibility.copies) for b in model.blocks]
    layers += [(a.block.mixer, T - k) for k, a in enumerate(model.ahead, 1)]
    unseen = sum(m.pair_flops * (n * n - objective.visibility.pairs(n)) for m, n in layers)
    without_head = counter.get_total_flops() / 8 - unseen - sum(predicted) / 8 * model.head_flops
    mean_head = {"masked": 0.5, "masked timed": 0.5, "block 4": 5 / 8, "block timed": 5 / 8}.get(name, 1.0)
    heads = T * mean_head + sum(T - k for k in range(1, len(model.ahead) + 1))
    assert objective.flops(model, T) == pytest.approx(without_head + heads * model.head_flops, rel=1e-4)


def test_a_plain_transformer_costs_what_the_textbook_says():
    """K11: 24 l d^2 + 2 V d + 4 T d l a token, bidirectional."""
    d, depth, vocab = 64, 3, 50
    channel = partial(MLP, activation="gelu", gated=False, expansion=4)
    model = LanguageModel(vocab, d, ["rotary+mlp"], MIXERS, {"mlp": channel}, depth=depth)
    expected = 24 * depth * d**2 + 2 * vocab * d + 4 * T * d * depth
    assert model.flops(T, BIDIRECTIONAL) / T == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("depth", [1, 2])
def test_further_tokens_are_predicted_from_what_stands_before_them_alone(depth):
    """The k-th further prediction at t reads the tokens up to t + k - 1 and asks for the one after."""
    model, x = build("rotary", V, ahead=depth), tokens(1)
    objective = NextToken(V, 0, ahead=depth)
    inputs = torch.cat([torch.zeros(1, 1, dtype=torch.long), x[:, :-1]], 1)

    def predictions(x):
        inputs = torch.cat([torch.zeros(1, 1, dtype=torch.long), x[:, :-1]], 1)
        return [model.logits(h) for h in model.look_ahead(model.hidden(inputs, CAUSAL), x, CAUSAL)]

    before = predictions(x)
    assert [p.shape[1] for p in before] == [T - k for k in range(1, depth + 1)]
    for t in range(T):
        y = x.clone()
        y[0, t] = (y[0, t] + 1) % V
        for k, (p, q) in enumerate(zip(before, predictions(y), strict=True), 1):
            changed = (p != q).any(-1)[0].nonzero().flatten().tolist()
            assert changed == list(range(max(0, t - k + 1), T - k))  # position i predicts x[i + k] from x[: i + k]
    loss = objective.loss(model, Batch.of(x), torch.Generator())
    plain = NextToken(V, 0).loss(model, Batch.of(x), torch.Generator())
    further = [torch.nn.functional.cross_entropy(p[0], x[0, k:]) for k, p in enumerate(before, 1)]
    torch.testing.assert_close(loss, plain + 0.3 * sum(further) / depth)
    torch.testing.assert_close(plain, torch.nn.functional.cross_entropy(model(inputs)[0], x[0]))
    assert objective.evaluate(model, Batch.of(x), torch.Generator()).nats_B[0] == pytest.approx(plain.item() * T)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("mixer", ["rotary", "delta"])
def test_a_sampler_reports_passes_predictions_and_flops(mixer):
    asked = request(torch.zeros(2, 0, dtype=torch.long), T)
    model = build(mixer, V)
    out = NextToken(V, 0).sample(model, asked)
    assert (out.evaluations, out.predictions) == (T, T)
    assert NextToken(V, 0).sampling_flops(model, asked, out) == model.flops(T, CAUSAL)
    model, objective = build(mixer), MaskedDiffusion(V, 0)
    out = objective.sample(model, asked, Ordered("random", 3))
    assert (out.evaluations, out.predictions) == (3, 12 + 8 + 4)
    expected = 3 * model.flops(T, BIDIRECTIONAL, 0.0) + 24 * model.head_flops
    assert objective.sampling_flops(model, asked, out) == expected


def test_copies_of_a_prompt_are_charged_for_it_once():
    model, objective = build("rotary", V), NextToken(V, 0)
    asked = request(tokens(1, 5), T, copies=4)
    out = objective.sample(model, asked)
    prompt, whole = model.flops(5, CAUSAL, 0.0), model.flops(T, CAUSAL, 0.0)
    expected = whole - 3 / 4 * prompt + (T - 5) * model.head_flops
    assert objective.sampling_flops(model, asked, out) == pytest.approx(expected)


def test_block_sampling_costs_one_pass_per_step_and_one_to_remember_each_block():
    model, objective = build("rotary"), BlockDiffusion(V, 0, 4)
    asked = request(torch.zeros(2, 0, dtype=torch.long), T)
    out = objective.sample(model, asked, Ordered("random", 2))
    assert (out.evaluations, out.predictions) == (3 * 2 + 2, 3 * (4 + 2))
    clean = model.flops(2 * T, objective.visibility, 0.0) / 2  # all blocks once, each after those before it
    assert objective.sampling_flops(model, asked, out) == pytest.approx(8 * clean / 3 + 18 * model.head_flops)
