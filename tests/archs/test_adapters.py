"""Low-rank adapters on every backbone: they begin as nothing, learn alone, merge exactly, and cost what they cost."""

from copy import deepcopy

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from archs.adapters import LoRA, LowRankExperts, adapted_layers, merge, training_flops
from archs.channels.experts import ExpertLinear
from archs.channels.router import Router
from archs.checkpoints import adapter as files
from archs.language_model import LanguageModel
from archs.mixers.sparse_attention import Indexer
from archs.parameters import Role
from archs.visibility import BIDIRECTIONAL, CAUSAL
from tests.contracts.discovery import CONFIGS, LENGTH, VOCABULARY, names
from tests.contracts.test_backbones import build, plain, tokens

EXPERTS = "deepseek_v3", "gpt_oss", "qwen3_moe", "qwen3_next"
every = pytest.mark.parametrize("name", names("arch"))
mixtures = pytest.mark.parametrize("name", EXPERTS)
LORA = LoRA(rank=3, alpha=5.0)


def base(name: str) -> LanguageModel:
    """In evaluation and float64, with weights that all matter."""
    return deepcopy(build(name))


def adapted(name: str, adapter: LoRA = LORA) -> LanguageModel:
    """The base with adapters that matter."""
    model = base(name)
    torch.manual_seed(1)
    adapter.adapt(model)
    for layer in adapted_layers(model).values():
        nn.init.normal_(layer.lora_B.weight, std=0.2)
    return model


def loss_of(model: LanguageModel) -> torch.Tensor:
    """Of training, with all auxiliary losses."""
    return model.train()(tokens(2)).square().mean() + sum(model.auxiliary_losses().values())


@every
@torch.no_grad()  # under which attention takes the same kernel, whether or not its mask is learned
def test_an_adapted_model_begins_as_its_base_bit_for_bit_and_keeps_the_names_of_its_weights(name):
    model, x = base(name), tokens(2)
    before, weights = model(x), {n: t.clone() for n, t in model.state_dict().items()}
    LORA.adapt(model)
    assert torch.equal(model(x), before)
    after = model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in weights.items())
    assert {n.rpartition(".lora_")[2] for n in after.keys() - weights.keys()} == {"A.weight", "B.weight"}


@every
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_merged_model_is_a_plain_one_with_the_logits_of_the_adapters(name, dtype, tolerance):
    model, x = adapted(name).to(dtype), tokens(2)
    want, shapes = model(x), {n: t.shape for n, t in base(name).state_dict().items()}
    assert (want - base(name).to(dtype)(x)).abs().max() > 1e-3
    assert merge(model) is model
    got = model(x)
    assert (got - want).abs().max() <= tolerance * want.abs().max()
    assert {n: t.shape for n, t in model.state_dict().items()} == shapes
    assert all(p.requires_grad for p in model.parameters())
    kinds = [[type(m) for m in one.modules()] for one in (model, base(name))]
    assert kinds[0] == kinds[1]


@every
def test_a_prompt_and_then_token_by_token_equals_one_pass_through_the_adapters(name):
    model, x = adapted(name), tokens(3)
    states, got = model.empty_states(3), []
    for piece in (x[:, :13], *x[:, 13:].split(1, dim=1)):
        hidden, states = model.extend(piece, states)
        got.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(got, 1), model(x), rtol=1e-8, atol=1e-8)


@every
def test_adapters_alone_get_gradients_all_of_them_and_are_all_that_an_optimiser_is_given(name):
    model = adapted(name)
    loss_of(model).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n}
    roles = model.roles()
    assert [r.name for r in roles] == [n for n, p in model.named_parameters() if n in trained]
    assert all(r.role is Role.MATRIX and r.fan_in == r.parameter.shape[-1] for r in roles)
    assert all((r.fan_in == LORA.rank) == (".lora_B" in r.name) for r in roles if "indexer" not in r.name)


@every
def test_every_linear_layer_of_the_blocks_but_routers_has_an_adapter(name):
    model = base(name)
    inner = {n: m for n, m in model.blocks.named_modules() if isinstance(m, nn.Linear | ExpertLinear)}
    routers = {n for n in inner if isinstance(model.blocks.get_submodule(n.rpartition(".")[0]), Router)}
    layers = adapted_layers(LORA.adapt(model))
    assert layers.keys() == {f"blocks.{n}" for n in inner.keys() - routers}
    if name in EXPERTS:
        assert any(isinstance(layer, LowRankExperts) for layer in layers.values())


@every
def test_the_gradients_of_an_adapter_are_projections_of_the_gradient_of_the_whole_weight(name):
    model, full = adapted(name), merge(adapted(name))
    for one in (model, full):
        loss_of(one).backward()
    for n, layer in adapted_layers(model).items():
        dW, A, B = full.get_submodule(n).weight.grad, layer.lora_A.weight, layer.lora_B.weight
        torch.testing.assert_close(B.grad, layer.scale * dW @ A.mT, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(A.grad, layer.scale * B.mT @ dW, rtol=1e-7, atol=1e-10)


@mixtures
def test_a_step_leaves_the_choice_biases_of_frozen_routers(name):
    model = adapted(name)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    loss_of(model)
    model.after_step()
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize(("scale", "factor"), [("standard", 32 / 4), ("rank_stabilised", 32 / 2)])
def test_a_starts_uniform_by_its_fan_in_b_at_zero_and_the_scale_divides_alpha(scale, factor):
    model = LoRA(rank=4, alpha=32, scale=scale).adapt(plain("qwen3_moe", width=64))
    for layer in adapted_layers(model).values():
        A, bound = layer.lora_A.weight, layer.in_features**-0.5
        assert A.shape[-2:] == (4, layer.in_features) and A.abs().max() <= bound
        assert A.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
        assert not layer.lora_B.weight.any() and layer.scale == factor


@pytest.mark.parametrize("layers", ["mixers", "channels"])
def test_adapters_can_be_on_the_layers_of_mixers_or_of_channels_alone(layers):
    chosen = adapted_layers(LoRA(rank=2, alpha=4, layers=layers).adapt(plain("qwen3_next")))
    assert chosen and {n.split(".")[2] for n in chosen} == {layers.removesuffix("s")}


def test_further_tokens_have_adapters_too():
    model = LORA.adapt(plain("transformer", ahead=1))
    assert {"ahead.0.merge", "ahead.0.block.mixer.qkv"} <= adapted_layers(model).keys()


@mixtures
def test_a_copy_of_an_adapted_model_is_the_same_and_its_own(name):
    model, x = adapted(name), tokens(2)
    before, copy = model(x), deepcopy(model)
    assert torch.equal(copy(x), before)
    with torch.no_grad():
        for p in copy.parameters():
            p.mul_(0.5)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "adapter.rank=0 must be a whole number of at least 1"),
        ({"rank": 2.5}, "adapter.rank=2.5 must be a whole number"),
        ({"alpha": 0.0}, "adapter.alpha=0.0 must be above 0"),
        ({"scale": "big"}, "adapter.scale='big' must be one of standard, rank_stabilised"),
        ({"layers": "head"}, "adapter.layers='head' must be one of all, mixers, channels"),
    ],
)
def test_adapters_that_cannot_be_are_refused_in_a_sentence(changes, words):
    with pytest.raises(ValueError, match=words):
        LoRA(**({"rank": 8, "alpha": 32.0} | changes))


def test_a_model_adapted_twice_one_without_such_layers_and_a_merge_of_nothing_are_refused():
    model = plain("mamba2")
    with pytest.raises(ValueError, match="adapter.layers='channels': the model has no such layer"):
        LoRA(rank=2, alpha=4, layers="channels").adapt(model)
    with pytest.raises(ValueError, match="the model has no adapters"):
        merge(model)
    with pytest.raises(ValueError, match="has adapters already"):
        LORA.adapt(LORA.adapt(model))


def test_the_config_builds_what_it_says():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("adapter/lora")["adapter"]
    assert instantiate(config, rank=4) == LoRA(rank=4, alpha=32)


def counted(model: LanguageModel, backward: bool) -> float:
    """The FLOPs that PyTorch counts in a pass, the gradients of taps aside, all inputs of layers having gradients."""
    model.embedding.register_forward_hook(lambda _, __, out: out.detach().requires_grad_())
    # Sinks that learn keep attention from its fused kernel, whose products are not counted; the plain one runs for all.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y = model(tokens(1), BIDIRECTIONAL)
        if backward:
            (y.sum() + sum(model.auxiliary_losses().values())).backward()
    flops = counter.get_flop_counts()["Global"]
    return sum(n for op, n in flops.items() if "convolution_backward" not in str(op))


@pytest.mark.thorough
@every
def test_adapters_add_their_flops_and_save_the_gradients_of_frozen_weights_as_pytorch_counts_them(name):
    """What is counted of the base is tested with it; here the difference of adapters. Indexers read what is detached,
    so that no gradient goes on from theirs: 2 r in per token of each that is charged and not run."""
    full, model = plain(name), LORA.adapt(plain(name))
    forward = model.flops(LENGTH, BIDIRECTIONAL) - full.flops(LENGTH, BIDIRECTIONAL)
    assert forward == counted(model, False) - counted(full, False) > 0
    inner = [m for indexer in model.modules() if isinstance(indexer, Indexer) for m in indexer.children()]
    unread = sum(2 * LENGTH * m.lora_A.weight.numel() for m in inner if hasattr(m, "lora_A"))
    charged = [training_flops(m, lambda m: m.flops(LENGTH, BIDIRECTIONAL)) for m in (full, model)]
    assert charged[0] == 3 * full.flops(LENGTH, BIDIRECTIONAL)
    assert charged[0] - charged[1] == counted(full, True) - counted(model, True) - unread


def test_frozen_weights_are_saved_where_the_head_and_further_tokens_are_run_on_fewer_tokens():
    model, T, V = LORA.adapt(plain("transformer", ahead=1, timed=True)), LENGTH, VOCABULARY
    weights = sum(layer.weight.numel() for n, layer in adapted_layers(model).items() if n.startswith("blocks"))
    ahead = sum(layer.weight.numel() for n, layer in adapted_layers(model).items() if n.startswith("ahead"))
    head, time = V * model.width, model.time.weight.numel()

    def forward(m: LanguageModel) -> float:
        return m.flops(T, CAUSAL, 0.25) + m.ahead_flops(T)

    saved = 2 * T * (weights + time + 0.25 * head) + 2 * (T - 1) * (ahead + head)
    assert 3 * forward(model) - training_flops(model, forward) == saved


@every
def test_adapters_on_the_meta_device_cost_nothing_and_count_the_same(name):
    with torch.device("meta"):
        meta = LORA.adapt(plain(name))
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    real = LORA.adapt(plain(name))
    assert meta.flops(LENGTH, CAUSAL) == real.flops(LENGTH, CAUSAL)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


@every
def test_saved_adapters_are_loaded_as_they_were(name, tmp_path):
    model, x = adapted(name), tokens(2)
    files.save(model, tmp_path)
    again = base(name)
    files.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [r.name for r in model.roles()]


def test_adapters_of_another_model_or_kind_are_refused(tmp_path):
    files.save(adapted("transformer"), tmp_path)
    with pytest.raises(ValueError, match="names other layers of this model than all, its mixers' or its channels'"):
        files.load(base("mamba2"), tmp_path)
    wide = plain("transformer", width=64)
    with pytest.raises(ValueError, match=r"has no matrices \(3, 64\) and \(192, 3\) of blocks.0.mixer.qkv"):
        files.load(wide, tmp_path)
    config = tmp_path / files.CONFIG
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ValueError, match="use_dora is True, and False alone is supported"):
        files.load(base("transformer"), tmp_path)


@pytest.mark.thorough
@every
def test_peft_loads_what_is_saved_and_merges_it_into_the_same_logits(name, tmp_path):
    import peft  # takes seconds

    model, x = adapted(name), tokens(2)
    files.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(name), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(theirs.merge_and_unload()(x), model(x), rtol=1e-6, atol=1e-6)
