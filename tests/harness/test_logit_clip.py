"""The logits of attention are clipped through the weights of queries and keys where that is asked for (QK-Clip)."""

import pytest
import torch

from archs.mixers.attention import Attention
from archs.positions import Rotary
from archs.visibility import CAUSAL
from experiments.harness.assembly import measure, prepare_run
from experiments.harness.logit_clip import LogitClip
from experiments.harness.parts import build_model, build_objective
from experiments.harness.run import execute
from experiments.harness.weights import load_run

GROUPED = "arch.model.mixers.attention.queries_per_kv=2"
HEADS = ("arch.model.mixers.attention.head_dim=4", "budget.flops=2e8")


@pytest.fixture(params=[1, 2, 4], ids=["multi-head", "grouped", "multi-query"])
def attention(request):
    """Attention of four heads with biases whose second head has large logits, and its input."""
    torch.manual_seed(0)
    mixer = Attention(32, head_dim=8, queries_per_kv=request.param, position=Rotary(), bias=True)
    torch.nn.init.normal_(mixer.qkv.bias)
    with torch.no_grad():
        mixer.qkv.weight[8:16] *= 20
    return mixer, torch.randn(3, 70, 32)


def largest(attention, x_BTD):
    attention.watch_logits()
    attention(x_BTD, CAUSAL)
    return attention.watch_logits()


def clip(attention, most):
    clipping = LogitClip(torch.nn.ModuleList([attention]), most)
    return clipping


def test_no_logit_of_the_batch_exceeds_the_bound_afterwards_and_those_below_stay(attention):
    attention, x_BTD = attention
    before_H = largest(attention, x_BTD)
    most = float(before_H.sort().values[-2]) * 1.1  # of one head alone
    clipping = clip(attention, most)
    attention(x_BTD, CAUSAL)
    clipping.after_step()
    torch.testing.assert_close(largest(attention, x_BTD), before_H.clamp(max=most))
    assert clipping.clipped == 1 and clipping.largest == float(before_H.max())


def test_where_all_heads_exceed_a_shared_key_is_scaled_too(attention):
    attention, x_BTD = attention
    before, before_H = attention.qkv.weight.detach().clone(), largest(attention, x_BTD)
    clipping = clip(attention, most=float(before_H.min()) / 2)
    attention(x_BTD, CAUSAL)
    clipping.after_step()
    torch.testing.assert_close(largest(attention, x_BTD), torch.full_like(before_H, clipping.most))
    ratios = (attention.qkv.weight.detach() / before)[:, 0].unflatten(0, (-1, 8))
    of_keys = ratios[4 : 4 + attention.kv_heads]
    assert (of_keys < 1).all() and torch.equal(ratios[4 + attention.kv_heads :], torch.ones_like(of_keys))


def test_a_model_below_the_bound_is_untouched_bit_for_bit(attention):
    attention, x_BTD = attention
    before = {name: x.clone() for name, x in attention.state_dict().items()}
    clipping = clip(attention, most=1e6)
    attention(x_BTD, CAUSAL)
    clipping.after_step()
    assert clipping.clipped == 0 and before.keys() == attention.state_dict().keys()
    assert all(torch.equal(x, before[name]) for name, x in attention.state_dict().items())


def test_the_largest_logit_is_that_of_all_passes_of_a_step_and_of_none_without_gradients(attention):
    attention, x_BTD = attention
    found_H = largest(attention, x_BTD)
    for x_1TD in x_BTD.split(1):
        attention(x_1TD, CAUSAL)
    with torch.no_grad():
        attention(100 * x_BTD, CAUSAL)
    attention.eval()(100 * x_BTD, CAUSAL)
    torch.testing.assert_close(attention.watch_logits(), found_H)


@pytest.mark.parametrize("settings", [(), (GROUPED,), ("objective=block_diffusion",), ("data.packed=true",)])
def test_a_run_clips_heads_and_says_how_often(make_run, data, settings):
    runs = [make_run(*HEADS, *settings, f"+trainer.clip_logits={most}") for most in (0.01, 1e6)]
    rows = [execute(run, data) for run in runs]
    assert rows[0]["status"] == "done" and rows[0]["clipped_logits"] > 0
    assert rows[0]["bits_per_byte"] != rows[1]["bits_per_byte"] and rows[1]["clipped_logits"] == 0
    assert load_run(runs[0].folder, data).model.blocks[0].mixer.largest_H is None


@pytest.mark.parametrize("step", [4])
def test_a_run_that_goes_on_clips_as_one_that_was_not_stopped(make_run, data, killed_at, tmp_path, step):
    settings = (*HEADS, "+trainer.clip_logits=0.1")
    whole = execute(make_run(*settings), data)
    run = make_run(*settings, f"session.root={tmp_path / 'again'}", "session.checkpoint_seconds=0")
    with killed_at(step):
        execute(run, data)
    row = execute(run, data)
    assert [row[name] for name in ("clipped_logits", "bits_per_byte")] == [
        whole[name] for name in ("clipped_logits", "bits_per_byte")
    ]


def test_the_scores_are_charged_once(make_config, data):
    plain, clipped = (make_config(*more) for more in ((), ("+trainer.clip_logits=100",)))
    costs = [measure(config, data).costs.flops_per_token for config in (plain, clipped)]
    T, model = plain.data.sequence_length, build_model(plain, build_objective(plain, data))
    scores = sum(2 * block.mixer.heads * block.mixer.head_dim * CAUSAL.pairs(T) for block in model.blocks)
    assert costs[1] - costs[0] == pytest.approx(scores / T)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("arch=min_gru",), "clip_logits=100 with arch=min_gru: it has no attention"),
        (("arch=deepseek_v3",), "clip_logits=100 with arch=deepseek_v3: it has LatentAttention"),
        (("arch.model.mixers.attention.qk_norm=head",), "its queries and keys are normed, which bounds logits"),
        (("adapter=lora",), "clip_logits=100 scales weights that adapters leave as they are"),
        (("+trainer.clip_logits=0",), "trainer.clip_logits=0 must be above 0, or null"),
    ],
)
def test_what_it_cannot_serve_is_refused(make_run, data, settings, words):
    if "clip_logits" not in settings[0]:
        settings = (*settings, "+trainer.clip_logits=100")
    with pytest.raises(ValueError, match=words):
        prepare_run(make_run(*settings), data)
