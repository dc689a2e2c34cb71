"""The mixture of experts against a loop over tokens and against published blocks; balance, cost and extremes."""

import contextlib
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.channels.mlp import MLP, activate
from archs.channels.moe import MoE

SIZES = {"experts": 8, "top_k": 3, "hidden": 10, "activation": "silu", "gated": True}
SOFTMAX = {"gate": "softmax", "normalise": True}
DEEPSEEK = {
    "gate": "sigmoid",
    "normalise": True,
    "groups": 4,
    "group_limit": 2,
    "bias_update_rate": 0.1,
    "route_scale": 2.5,
}


def build(width=12, dtype=torch.float64, std=1.0, **options):
    """A mixture in which every term matters."""
    torch.manual_seed(0)
    moe = MoE(width, **SIZES | SOFTMAX | options).to(dtype)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(std * torch.randn_like(p))
        if moe.router.choice_bias is not None:
            moe.router.choice_bias.copy_(torch.randn(moe.router.experts))
    return moe


def tokens(B=2, T=9, width=12, dtype=torch.float64, seed=1):
    return torch.randn(B, T, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive(moe, x_BTD):
    """The definition, one token and one expert at a time; also the chosen experts of each token."""
    router = moe.router
    size = router.experts // router.groups
    ys, choices = [], []
    for x in x_BTD.flatten(0, 1):
        logits = router.linear.weight @ x + (0 if router.linear.bias is None else router.linear.bias)
        scores = logits.softmax(0) if router.gate == "softmax" else 1 / (1 + (-logits).exp())
        rank = (scores if router.choice_bias is None else scores + router.choice_bias).tolist()
        best = [sum(sorted(rank[g * size : (g + 1) * size])[-2:]) for g in range(router.groups)]
        open_groups = sorted(range(router.groups), key=lambda g: -best[g])[: router.group_limit]
        allowed = [e for e in range(router.experts) if e // size in open_groups]
        chosen = sorted(allowed, key=lambda e: -rank[e])[: router.top_k]
        total = sum(scores[e] for e in chosen) if router.normalise else 1
        y = 0
        for e in chosen:
            hidden = moe.gate_up.weight[e] @ x
            if moe.gate_up.bias is not None:
                hidden = hidden + moe.gate_up.bias[e]
            out = moe.out_proj.weight[e] @ activate(hidden, moe.activation, moe.gated)
            if moe.out_proj.bias is not None:
                out = out + moe.out_proj.bias[e]
            y = y + router.route_scale * scores[e] / total * out
        if moe.shared is not None:
            y = y + moe.shared(x) * (1 if moe.shared_gate is None else moe.shared_gate(x).sigmoid())
        ys.append(y)
        choices.append(set(chosen))
    return torch.stack(ys).view_as(x_BTD), choices


EVERY = pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalise": False},
        {"bias": True, "activation": "clamped_silu"},
        {"gated": False, "activation": "relu2", "bias": True},
        {"gate": "sigmoid", "normalise": False, "route_scale": 1.7},
        {"bias_update_rate": 0.1},
        DEEPSEEK | {"shared": 2},
        {"shared": 1, "shared_hidden": 7, "shared_gate": True},
        {"top_k": 8},
        {"top_k": 1, "experts": 1},
    ],
)


@EVERY
def test_output_and_every_gradient_equal_those_of_a_loop_over_tokens(options):
    moe, x = build(**options), tokens().requires_grad_()
    wanted = [x, *moe.parameters()]
    truth, _ = naive(moe, x)
    weight = torch.randn_like(truth)
    truth_grads = torch.autograd.grad((truth * weight).sum(), wanted, allow_unused=True)
    got = moe(x)
    grads = torch.autograd.grad((got * weight).sum(), wanted, allow_unused=True)
    torch.testing.assert_close(got, truth)
    for p, grad, expected in zip(wanted, grads, truth_grads, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(p) if expected is None else expected)


@EVERY
def test_a_token_alone_comes_out_as_in_a_batch(options):
    moe, x = build(**options), tokens()
    whole = moe(x)
    with torch.no_grad():  # as in decoding
        torch.testing.assert_close(moe(x[1:, 4:5]), whole[1:, 4:5])
    torch.testing.assert_close(moe(x.flip(1)), whole.flip(1))


def test_group_limited_routing_keeps_each_token_within_its_groups():
    moe, x = build(**DEEPSEEK), tokens(T=100)
    _, chosen_NK, _ = moe.router(x.flatten(0, 1))
    assert all(len(groups.unique()) <= 2 for groups in chosen_NK // 2)
    _, choices = naive(moe, x)
    assert [set(row.tolist()) for row in chosen_NK] == choices
    moe.router.group_limit = 4
    assert any(len(groups.unique()) == 3 for groups in moe.router(x.flatten(0, 1))[1] // 2)


def published(family):
    """A transformers block, the options that express it here, and our names of its parameters."""
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
    from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

    sizes = {"hidden_size": 12, "num_experts_per_tok": 3, "num_hidden_layers": 1}
    qwen = sizes | {"num_experts": 8, "moe_intermediate_size": 10}
    match family:
        case "qwen3_moe":
            config = qwen3.Qwen3MoeConfig(**qwen, norm_topk_prob=True)
            return qwen3.Qwen3MoeSparseMoeBlock(config), {}
        case "qwen3_moe, not normalised":
            config = qwen3.Qwen3MoeConfig(**qwen, norm_topk_prob=False)
            return qwen3.Qwen3MoeSparseMoeBlock(config), {"normalise": False}
        case "qwen3_next":
            config = qwen3_next.Qwen3NextConfig(**qwen, shared_expert_intermediate_size=7, norm_topk_prob=True)
            return qwen3_next.Qwen3NextSparseMoeBlock(config), {"shared": 1, "shared_hidden": 7, "shared_gate": True}
        case "granitemoehybrid":
            config = granite.GraniteMoeHybridConfig(
                **sizes, intermediate_size=10, num_local_experts=8, mamba_n_heads=1, num_attention_heads=1,
                num_key_value_heads=1, layer_types=["mamba"],
            )  # fmt: skip
            return granite.GraniteMoeHybridMoE(config), {}
        case "gpt_oss":
            config = gpt_oss.GptOssConfig(**sizes, intermediate_size=10, num_local_experts=8)
            return gpt_oss.GptOssMLP(config), {"bias": True, "activation": "clamped_silu"}
        case "deepseek_v3":
            config = deepseek.DeepseekV3Config(
                **sizes, moe_intermediate_size=10, n_routed_experts=8, n_shared_experts=2, n_group=4, topk_group=2,
                routed_scaling_factor=2.5, norm_topk_prob=True,
            )  # fmt: skip
            return deepseek.DeepseekV3MoE(config), DEEPSEEK | {"shared": 2}


@torch.no_grad()
def copy_weights(theirs, ours, family):
    """Names differ; gpt_oss stores [in, out] and alternates gate and up, and others keep them apart when shared."""
    state = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("shared_experts.", "shared.").replace("shared_expert.", "shared.")
        name = name.replace("shared_expert_gate", "shared_gate").replace("experts.", "")
        name = name.replace("gate.e_score_correction_bias", "router.choice_bias")
        name = name.replace("router.weight", "gate.weight").replace("router.bias", "gate.bias")
        if name.startswith("gate."):
            name = "router.linear." + name.removeprefix("gate.")
        elif family == "gpt_oss":
            value = value.mT if value.dim() == 3 else value
            value = torch.cat([value[:, ::2], value[:, 1::2]], 1) if name.startswith("gate_up") else value
        name = (
            name.replace("down_proj", "out_proj").replace("gate_up_proj", "gate_up").replace("proj_bias", "proj.bias")
        )
        if name in ("gate_up", "out_proj"):
            name += ".weight"
        state[name.replace("gate_up_bias", "gate_up.bias")] = value
    if "shared.up_proj.weight" in state:
        halves = [state.pop(f"shared.{half}_proj.weight") for half in ("gate", "up")]
        state["shared.gate_up.weight"] = torch.cat(halves)
    ours.load_state_dict(state)


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "qwen3_moe, not normalised", "qwen3_next", "granitemoehybrid", "gpt_oss", "deepseek_v3"],
)
def test_equals_the_published_block_with_the_same_large_weights(family):
    torch.manual_seed(0)
    theirs, options = published(family)
    theirs.double()
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.normal_(std=2.0)
    ours = build(**options)
    copy_weights(theirs, ours, family)
    x = tokens(T=40)
    truth = theirs(x)
    truth = truth[0] if isinstance(truth, tuple) else truth
    # their softmax and DeepSeek's scores are float32 whatever the model is
    torch.testing.assert_close(ours(x), truth, rtol=1e-4, atol=1e-4 * truth.std().item())


def skewed(**options):
    """A mixture and tokens that nearly all prefer expert 0."""
    moe, x = build(std=0.1, **options), 1 + tokens(B=4, T=64)
    with torch.no_grad():
        moe.router.linear.weight[0] += 0.15
    return moe, x


# The rate is to be well under the differences between scores, or the biases circle around the even load.
@pytest.mark.parametrize(("gate", "rate"), [("softmax", 0.001), ("sigmoid", 0.003)])
def test_choice_biases_even_out_a_skewed_router_and_get_no_gradient(gate, rate):
    moe, x = skewed(gate=gate, bias_update_rate=rate)
    moe.router.choice_bias.zero_()
    loads = []
    for _ in range(300):
        moe(x).sum().backward()
        loads.append(moe.telemetry()["expert_load"])
        moe.after_step()
    assert loads[0] > 2 and loads[-1] < 1.2
    assert not moe.router.choice_bias.requires_grad and moe.router.choice_bias.grad is None


def test_one_update_moves_each_bias_by_the_rate_towards_the_even_load():
    moe = build(bias_update_rate=0.5)
    moe.router.choice_bias.mul_(0.01)
    bias = moe.router.choice_bias.clone()
    passes = [moe.router(tokens(T=T, seed=T).flatten(0, 1))[2] for T in (30, 3)]  # two forward passes, one step
    moe.eval()(tokens(T=100))  # not counted
    moe.after_step()
    direction, last = (torch.sign(loads.double().mean() - loads) for loads in (sum(passes), passes[-1]))
    assert (direction != last).any()
    torch.testing.assert_close(moe.router.choice_bias, bias + 0.5 * direction)
    moe.after_step()  # nothing was routed since
    torch.testing.assert_close(moe.router.choice_bias, bias + 0.5 * direction)


def test_loads_are_summed_over_processes_before_the_biases_move(monkeypatch):
    moe = build(bias_update_rate=0.5)
    moe.router.choice_bias.zero_()
    moe(tokens())
    other = torch.tensor([0] * 7 + [1000])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda loads: loads.add_(other))
    moe.after_step()
    assert moe.router.choice_bias.tolist() == [0.5] * 7 + [-0.5]


def test_choice_biases_are_part_of_the_saved_state():
    moe, other = build(**DEEPSEEK), build(**DEEPSEEK)
    other.router.choice_bias.zero_()
    other.load_state_dict(moe.state_dict())
    assert (other.router.choice_bias == moe.router.choice_bias).all() and moe.router.choice_bias.any()


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_balance_loss_is_its_coefficient_at_uniform_routing_and_larger_at_skewed(gate):
    moe = build(gate=gate, balance_loss=0.3)
    moe(tokens())
    assert moe.auxiliary_losses["balance"].item() > 0.301
    moe.router.linear.weight.data.zero_()
    moe(tokens())
    assert moe.auxiliary_losses["balance"].item() == pytest.approx(0.3)


def test_the_balance_loss_is_the_published_formula():
    moe, x = build(balance_loss=0.3), tokens()
    moe(x)
    scores = (x.flatten(0, 1) @ moe.router.linear.weight.T).softmax(-1)
    _, choices = naive(moe, x)
    share = torch.tensor([sum(e in chosen for chosen in choices) / (3 * len(choices)) for e in range(8)])
    expected = 0.3 * 8 * (share * scores.mean(0)).sum()
    torch.testing.assert_close(moe.auxiliary_losses["balance"], expected)


def test_the_gradient_of_the_balance_loss_evens_out_the_load():
    moe, x = skewed(balance_loss=1.0)
    optimiser = torch.optim.Adam(moe.router.parameters(), lr=0.03)
    loads = []
    for _ in range(60):
        moe(x)
        loads.append(moe.telemetry()["expert_load"])
        optimiser.zero_grad()
        moe.auxiliary_losses["balance"].backward()
        optimiser.step()
    assert loads[0] > 2 and loads[-1] < 1.3


def test_the_z_loss_is_the_mean_square_of_the_log_normaliser():
    moe, x = build(z_loss=0.2), tokens()
    moe(x)
    logits = x @ moe.router.linear.weight.T
    expected = 0.2 * logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(moe.auxiliary_losses["router_z"], expected)
    moe.auxiliary_losses["router_z"].backward()
    assert moe.router.linear.weight.grad.abs().sum() > 0


def test_losses_are_there_only_in_training_and_only_where_asked_for():
    moe = build(balance_loss=0.1, z_loss=0.1)
    moe(tokens())
    assert set(moe.auxiliary_losses) == {"balance", "router_z"}
    moe.eval()(tokens())
    assert moe.auxiliary_losses == {}
    plain = build()
    plain(tokens())
    assert plain.auxiliary_losses == {}


def skew(moe):
    """Every token to experts 0, 1 and 2."""
    with torch.no_grad():
        moe.router.linear.weight.zero_()
        moe.router.linear.bias.copy_(-50.0 * torch.arange(8))


def test_all_tokens_to_the_same_experts_are_all_computed_and_the_rest_get_zero_gradients():
    moe, x = build(bias=True), tokens()
    skew(moe)
    y = moe(x)
    torch.testing.assert_close(y, naive(moe, x)[0])
    y.square().sum().backward()
    grads = moe.out_proj.weight.grad.abs().sum((1, 2))
    assert grads[0] > 0 and (grads[3:] == 0).all()
    figures = moe.telemetry()
    assert figures["expert_load"] == pytest.approx(8 / 3) and figures["dead_experts"] == 5 / 8
    assert figures["router_entropy"] == pytest.approx(0, abs=1e-12)


def test_telemetry_is_of_the_last_training_forward():
    moe = build()
    assert moe.telemetry() == {}
    moe.router.linear.weight.data.zero_()
    moe(tokens())
    figures = moe.telemetry()
    assert figures["router_entropy"] == pytest.approx(math.log(8)) and figures["dropped_tokens"] == 0
    moe.router.linear.weight.data.normal_()
    moe.eval()(tokens(T=100))
    assert moe.telemetry() == figures


@EVERY
@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counted_flops_are_those_that_pytorch_counts(options, T, device):
    moe = build(**options).to(device)
    with FlopCounterMode(display=False) as counter:
        y = moe(torch.zeros(1, T, 12, device=device, dtype=torch.float64))
    assert moe.flops(T) == counter.get_total_flops() and y.shape == (1, T, 12)


def test_only_the_chosen_experts_of_a_token_are_active():
    moe = build(bias=True)
    total = sum(p.numel() for p in moe.parameters())
    fewer = sum(p.numel() for p in build(bias=True, experts=3).parameters())
    assert total - moe.inactive_params == fewer + 5 * (12 + 1)  # the router still scores all of them


@pytest.mark.parametrize(
    ("top_k", "shared", "multiple_of", "hidden"), [(2, 0, 1, 85), (3, 1, 1, 42), (3, 1, 16, 48), (1, 0, 1, 170)]
)
def test_an_expansion_makes_a_token_cost_what_the_dense_mlp_does(top_k, shared, multiple_of, hidden):
    options = {"activation": "silu", "gated": True, "expansion": 8 / 3, "multiple_of": multiple_of}
    moe = MoE(64, experts=8, top_k=top_k, shared=shared, **options, **SOFTMAX)
    assert moe.out_proj.in_features == hidden
    router = 2 * 64 * 8
    assert moe.flops(1) - router == 6 * 64 * hidden * (top_k + shared)
    if multiple_of == 1:
        assert moe.flops(1) - router == pytest.approx(MLP(64, **options).flops(1), rel=0.02)


def test_fresh_experts_start_at_the_scale_of_a_linear_layer():
    torch.manual_seed(0)
    moe = MoE(64, **SIZES | {"hidden": 100, "bias": True}, **SOFTMAX)
    assert moe.gate_up.weight.std().item() == pytest.approx(64**-0.5, rel=0.02)
    assert moe.out_proj.weight.std().item() == pytest.approx(100**-0.5, rel=0.02)
    assert not moe.gate_up.bias.any() and not moe.out_proj.bias.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_the_router_stays_in_float32_and_the_output_near(autocast):
    moe, x = build(dtype=torch.float32, std=0.3), tokens(dtype=torch.float32).bfloat16().float()
    with torch.no_grad():
        moe.router.linear.weight.copy_(moe.router.linear.weight.bfloat16())
    truth, (gates, chosen, _) = moe(x), moe.router(x.flatten(0, 1))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    if not autocast:
        moe, x = moe.bfloat16(), x.bfloat16()
    with context:
        got, (low_gates, low_chosen, _) = moe(x), moe.router(x.flatten(0, 1))
    assert got.dtype == torch.bfloat16 and low_gates.dtype == torch.float32
    assert (low_chosen == chosen).all()
    torch.testing.assert_close(low_gates, gates)
    assert (got.float() - truth).abs().mean() < 0.02 * truth.std()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 9}, "top_k 9 must lie between 1 and the 8 experts"),
        ({"top_k": 0}, "top_k 0 must lie between"),
        ({"gate": "tanh"}, "gate 'tanh' is not known: choose 'softmax' or 'sigmoid'"),
        ({"groups": 3}, "8 experts do not form 3 equal groups"),
        ({"groups": 8, "group_limit": 4}, "8 experts do not form 8 equal groups of two"),
        ({"groups": 4, "group_limit": 5}, "group_limit 5 must lie between 1 and the 4 groups"),
        ({"groups": 4, "group_limit": 1}, "groups of 2 experts must hold top_k 3"),
        ({"bias_update_rate": -1.0}, "bias_update_rate -1.0 must not be negative"),
        ({"balance_loss": -1.0}, "balance_loss -1.0 must not be negative"),
        ({"z_loss": -1.0}, "z_loss -1.0 must not be negative"),
        ({"shared": -1}, "shared -1"),
        ({"shared_gate": True}, "shared 0 must be at least 1 for"),
        ({"shared_hidden": 4}, "shared 0 must be at least 1 for"),
        ({"hidden": None, "expansion": 2.0, "shared": 1, "shared_hidden": 4}, "shared_hidden goes with hidden"),
        ({"expansion": 2.0}, "expansion .* and hidden 10: give one"),
        ({"activation": "swish"}, "activation 'swish' is not known"),
    ],
)
def test_mixtures_that_cannot_be_built_say_why(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)
