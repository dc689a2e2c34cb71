"""The duties of every backbone of configs/arch as a whole model: decoding, causality, packing, cost, a first loss."""

import math
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from archs.costs import costs
from archs.language_model import LanguageModel
from archs.parameters import Role
from archs.positions import Rotary, Yarn
from archs.visibility import BIDIRECTIONAL, CAUSAL, Kind, block_causal
from experiments.anatomy import anatomy
from experiments.harness.weights import begin_from, save_weights
from objectives.contracts import Batch
from objectives.next_token import NextToken
from tests.contracts.discovery import LENGTH, VOCABULARY, composed, names, shaken

ARCHS = names("arch")
every = pytest.mark.parametrize("name", ARCHS)
both = pytest.mark.parametrize("visibility", [CAUSAL, BIDIRECTIONAL], ids=["causal", "bidirectional"])


def plain(name: str, **options) -> LanguageModel:
    torch.manual_seed(0)
    return instantiate(composed(f"arch={name}").arch.model, vocab_size=VOCABULARY, **options)


@cache
def build(name: str) -> LanguageModel:
    """In evaluation, with weights that all matter."""
    model = shaken(plain(name))
    with torch.no_grad():
        model.head.weight.normal_()
    return model.eval()


def tokens(B: int, T: int = LENGTH) -> torch.Tensor:
    return torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))


@every
def test_the_name_of_a_config_is_that_of_its_file_and_its_width_the_one_asked_for(name):
    arch = composed(f"arch={name}").arch
    assert arch.name == name and plain(name).width == arch.width


@every
def test_a_prompt_and_then_token_by_token_equals_one_pass(name):
    model, x = build(name), tokens(3)
    states, got = model.empty_states(3), []
    for piece in (x[:, :13], *x[:, 13:].split(1, dim=1)):
        hidden, states = model.extend(piece, states)
        got.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(got, 1), model(x), rtol=1e-8, atol=1e-8)


def stretch(node, scaling: dict) -> int:
    """Give every rotary position of a config this scaling; return how many there are."""
    found = 0
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        found += stretch(child, scaling)
    if isinstance(node, dict) and node.get("_target_") == "archs.positions.Rotary":
        node["scaling"] = scaling
        found += 1
    return found


@every
@torch.no_grad()
def test_weights_go_on_under_the_rotary_positions_of_the_new_config(name, tmp_path):
    source, x = build(name), tokens(2)
    save_weights(source, tmp_path / "model.safetensors")
    arch = OmegaConf.to_container(composed(f"arch={name}").arch, resolve=True)
    arch["model"]["mixers"] = used(arch["model"])
    yarn = {"_target_": "archs.positions.Yarn", "factor": 4.0, "original_length": 8}
    rotary = stretch(arch["model"], yarn)
    model = instantiate(arch["model"], vocab_size=VOCABULARY).double().eval()
    begin_from(model, tmp_path)

    expected = deepcopy(source)
    for module in expected.modules():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, Rotary):
                setattr(module, attribute, replace(value, scaling=Yarn(4.0, 8)))
    torch.testing.assert_close(model(x), expected(x))
    assert ((model(x) - source(x)).abs().max() > 1e-3) == (rotary > 0)


def used(model: dict) -> dict:
    """The mixers of a model that stand in its pattern."""
    entries = "+".join([*model.get("first", []), *model["pattern"]]).split("+")
    return {mixer: part for mixer, part in model["mixers"].items() if mixer in entries}


def test_learned_positions_do_not_reach_further_than_they_were_learned(tmp_path):
    save_weights(plain("gpt2"), tmp_path / "model.safetensors")
    longer = instantiate(composed("arch=gpt2", f"data.sequence_length={2 * LENGTH}").arch.model, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=rf"positions.weight is \[{LENGTH}, 32\] there and \[{2 * LENGTH}, 32\] here"):
        begin_from(longer, tmp_path)


@pytest.mark.thorough
@every
@pytest.mark.parametrize("t", [0, 11, LENGTH - 1])
def test_a_changed_token_changes_no_earlier_logit(name, t):
    model, x = build(name), tokens(1)
    y = x.clone()
    y[0, t] = (y[0, t] + 1) % VOCABULARY
    change = (model(x) - model(y)).abs().amax(-1)[0]
    # An expert's tokens are multiplied together, so another grouping may round differently.
    assert (change[:t] < 1e-9).all() and change[t] > 1e-6
    both = (model(x, BIDIRECTIONAL) - model(y, BIDIRECTIONAL)).abs().amax(-1)[0]
    assert (both > 1e-9).all()


@every
@pytest.mark.parametrize("kind", Kind)
def test_packed_documents_are_each_as_if_alone(name, kind):
    model = build(name)
    visibility = {Kind.CAUSAL: CAUSAL, Kind.BIDIRECTIONAL: BIDIRECTIONAL}.get(kind, block_causal(4))
    if kind not in model.visibilities:
        with pytest.raises(ValueError, match=f"needs {kind.value} visibility"):
            instantiate(composed("objective=block_diffusion").objective.build, vocab_size=8, eot=0).check(model, 32)
        return
    clean, noised = tokens(2), tokens(2).flip(1)
    x = torch.cat([noised, clean], 1) if visibility.copies == 2 else clean
    starts = torch.zeros(2, LENGTH, dtype=torch.bool)
    starts[0, [9, 10]], starts[1, 15] = True, True
    packed = model(x, visibility.packed(starts))
    for row, begins in enumerate(([0, 9, 10, LENGTH], [0, 15, LENGTH])):
        for begin, end in zip(begins, begins[1:], strict=False):
            place = torch.cat([torch.arange(begin, end) + copy * LENGTH for copy in range(visibility.copies)])
            alone = model(x[row : row + 1, place], visibility)
            torch.testing.assert_close(packed[row : row + 1, place], alone, rtol=1e-8, atol=1e-8)


@pytest.mark.thorough
@every
def test_answers_packed_into_a_window_teach_what_they_teach_one_by_one(name):
    """One normaliser over all tokens of all answers: a mean of means would give short ones more weight."""
    model, objective, x = build(name), NextToken(VOCABULARY, 0), tokens(1)
    starts, answers = torch.zeros(1, LENGTH, dtype=torch.bool), torch.zeros(1, LENGTH)
    begins = [0, 9, 12, LENGTH]  # of conversations whose last two tokens are the answer, of the first one four
    for begin, end in zip(begins, begins[1:], strict=False):
        starts[0, begin] = True
        answers[0, end - (4 if begin == 0 else 2) : end] = 1.0

    def taught(batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        counted = sum(batch.counted_BT.sum() for batch in batches)
        losses = [objective.loss(model, b, torch.Generator()) * b.counted_BT.sum() / counted for b in batches]
        sum(losses).backward()
        return sum(losses).detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    together, gradients = taught([Batch(x, answers, starts)])
    parts = [slice(begin, end) for begin, end in zip(begins, begins[1:], strict=False)]
    apart, each = taught([Batch(x[:, part], answers[:, part]) for part in parts])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=0)
    largest = max(g.abs().max() for g in each.values())
    assert gradients.keys() == each.keys()
    for name_ in gradients:
        torch.testing.assert_close(gradients[name_], each[name_], rtol=1e-6, atol=1e-8 * float(largest), msg=name_)


@every
@both
def test_gradients_reach_every_parameter(name, visibility):
    model = shaken(plain(name))
    loss = model(tokens(2), visibility).square().sum() + sum(model.auxiliary_losses().values())
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    model.after_step()
    assert all(isinstance(x, float) for x in model.telemetry().values())


@every
def test_every_parameter_has_a_role_and_matrices_their_fan_in(name):
    model = plain(name)
    roles = model.roles()
    assert [r.name for r in roles] == [n for n, _ in model.named_parameters()]
    for r in roles:
        inner = r.name.startswith("blocks.") and r.parameter.dim() > 1
        inner = inner and not r.name.endswith(("conv_weight", "bias"))
        assert (r.role is Role.MATRIX) == inner
        assert r.fan_in == (r.parameter.shape[-1] if r.role in (Role.MATRIX, Role.HEAD) else 1)
        if r.role is Role.MATRIX:  # as it starts; what is written to the residual stream starts smaller
            assert 0.1 < r.parameter.std() * r.fan_in**0.5 < 1.2
    embeddings = {r.name for r in roles if r.role is Role.EMBEDDING}
    assert embeddings == {"embedding.weight"} | ({"positions.weight"} if model.positions is not None else set())


@every
def test_the_first_loss_is_near_that_of_a_guess(name):
    model = plain(name)
    loss = torch.nn.functional.cross_entropy(model(tokens(4)).flatten(0, 1), tokens(4).flatten())
    # A head of its own begins at zero; one that is the embedding does not.
    assert loss.item() == pytest.approx(math.log(VOCABULARY), abs=1.0 if model.tied else 1e-6)


@pytest.mark.thorough
@every
@pytest.mark.parametrize("T", [1, 5])
def test_counted_flops_are_those_that_pytorch_counts_where_every_pair_is_seen(name, T):
    with torch.device("meta"):
        model, x = plain(name), torch.zeros(1, T, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, BIDIRECTIONAL)
    assert model.flops(T, BIDIRECTIONAL) == counter.get_total_flops()


COUNTED = {
    "mm",
    "bmm",
    "addmm",
    "convolution",
    "delta_rule_chunked",
    "_scaled_dot_product_fused_attention_overrideable",
    "sparse_attention_gathered",
    "lightning_indexer_blocks",
    "lightning_indexer_loss",
    "grouped_matmul",
}
FREE = {  # data movement, and elementwise or reducing work of order one FLOP per element
    "_embedding_bag", "_fused_rms_norm", "_log_softmax", "_safe_softmax", "_softmax", "_to_copy", "_unsafe_view",
    "abs", "add", "add_", "addcmul", "any", "arange", "bitwise_and", "bitwise_not", "bitwise_or", "cat", "clamp",
    "clamp_", "clone", "constant_pad_nd", "copy_", "cos", "cumsum", "detach", "div", "div_", "embedding",
    "empty_like", "eq", "exp", "exp_", "expand", "flip", "floor_divide", "gather", "ge", "gelu", "gt", "index_put_",
    "index_select", "isneginf", "le", "log1p", "lt", "masked_fill", "masked_fill_", "mean", "mT", "mul",
    "native_layer_norm", "neg", "new_empty", "new_zeros", "ones", "ones_like", "permute", "pow", "promote_types",
    "relu", "remainder", "repeat", "repeat_interleave", "rsqrt", "rsub", "scalar_tensor", "scatter_", "scatter_add_",
    "select", "sigmoid", "silu", "sin", "slice", "softplus", "sort", "split", "split_with_sizes", "stack", "sub",
    "sub_", "sum", "t", "topk", "transpose", "tril", "unbind", "unfold", "unsqueeze", "view", "where", "xlogy",
    "zeros", "zeros_like",
}  # fmt: skip


@pytest.mark.thorough
@every
@both
def test_no_operation_escapes_the_count(name, visibility):
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        model, x = plain(name, max_length=70), torch.zeros(1, 70, dtype=torch.long)
    with Watch():
        model(x, visibility)
    assert seen - COUNTED - FREE == set()


@pytest.mark.thorough
@every
def test_costs_are_those_of_the_real_tensors_and_do_not_shrink_with_length(name):
    real = plain(name)
    with torch.device("meta"):
        meta = plain(name)
    counted = costs(meta, LENGTH, 3 * meta.flops(LENGTH, CAUSAL))
    _, states = real.extend(tokens(1), real.empty_states(1))
    assert counted.state_bytes == sum(state.nbytes for state in states) > 0
    assert counted.params_total == sum(p.numel() for p in real.parameters())
    assert counted.params_active <= counted.params_total
    short, long = (anatomy(composed_for_anatomy(name, T), T) for T in (64, 256))
    assert long["state_bytes@256"] >= short["state_bytes@64"]
    assert long["flops_per_token@256"] >= 0.9 * short["flops_per_token@64"]


def composed_for_anatomy(name: str, T: int) -> DictConfig:
    config = composed(f"arch={name}").copy()
    config.data.sequence_length = T
    arch = OmegaConf.to_container(config.arch, resolve=True)
    return OmegaConf.create({"arch": arch, "vocab_size": 257, "visibility": "causal"})
