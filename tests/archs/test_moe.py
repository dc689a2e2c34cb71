"""The mixture of experts against a loop over tokens and against published blocks; cost and extremes."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from archs.channels.mlp import MLP
from archs.channels.moe import MoE
from tests.archs.mixtures import DEEPSEEK, SIZES, SOFTMAX, build, naive, tokens

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
