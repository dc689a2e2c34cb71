"""The loss of the lightning indexer in blocks, against all pairs at once, in both stages."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import lightning_indexer, lightning_indexer_loss, lightning_indexer_loss_flops
from kernels.indexer import loss
from kernels.indexer.problems import random_loss_problem
from tests.kernels.cases import assert_equal, assert_within_twice
from tests.kernels.test_lightning_indexer import Largest

SIZES = {"heads": 3, "head_dim": 8, "attention_heads": 4, "key_heads": 2, "attention_dim": 6}
LEARN = ("q", "k", "weights")
stages = pytest.mark.parametrize("topk", [None, 7, 100], ids=["dense", "sparse", "all picked"])


def problem(T, *, batch=2, keys=None, **sizes):
    generator = torch.Generator().manual_seed(0)
    return random_loss_problem(T, batch=batch, keys=keys, **SIZES | sizes, generator=generator)


def picks(inputs, topk, **options):
    chosen = {name: inputs[name].double() for name in LEARN}
    return None if topk is None else lightning_indexer(**chosen, topk=topk, **options, backend="reference")


def run(inputs, backend, indices, dtype=torch.float64, **options):
    """The divergences, and the gradients of a random projection of them."""
    leaves = {name: x.to(dtype).requires_grad_(name in LEARN) for name, x in inputs.items()}
    y = lightning_indexer_loss(**leaves, scale=0.4, indices=indices, backend=backend, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    gradients = torch.autograd.grad((y * weight).sum(), [leaves[name] for name in LEARN])
    return {"y": y} | {f"d{name}": x for name, x in zip(LEARN, gradients, strict=True)}


@stages
@pytest.mark.parametrize(
    ("T", "S", "causal"), [(1, 1, True), (37, 37, True), (37, 60, True), (37, 60, False), (60, 37, False)]
)
@pytest.mark.parametrize("products", [1, 5000, 1 << 20])
def test_values_and_gradients_are_those_of_all_pairs_at_once(T, S, causal, topk, products, monkeypatch):
    monkeypatch.setattr(loss, "PRODUCTS", products)
    inputs = problem(T, keys=S)
    indices = picks(inputs, topk, causal=causal)
    got, truth = (run(inputs, backend, indices, causal=causal) for backend in ("torch", "reference"))
    assert_equal(got, truth)
    assert (truth["y"] > 0).any() or S == 1


@pytest.mark.parametrize("products", [1, 5000, 1 << 20])
def test_where_most_are_picked_a_mask_gives_what_gathering_gives(products, monkeypatch):
    """With queries in a row that pick none, by themselves a block."""
    monkeypatch.setattr(loss, "PRODUCTS", products)
    inputs = problem(37)
    indices = picks(inputs, 20)
    indices[:, 10:20] = -1
    truth = run(inputs, "reference", indices)
    for most in (True, False):
        monkeypatch.setattr(loss, "names_most", lambda *inputs, most=most: most)
        assert_equal(run(inputs, "torch", indices), truth)


@stages
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_each_as_if_alone(topk, causal):
    inputs, bounds = problem(41, batch=1), [0, 13, 14, 30, 41]
    options = {"causal": causal, "cu_seqlens": torch.tensor(bounds)}
    indices = picks(inputs, topk, **options)
    got, truth = (run(inputs, backend, indices, **options) for backend in ("torch", "reference"))
    assert_equal(got, truth)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        part = {name: x[:, begin:end] for name, x in inputs.items()}
        alone = lightning_indexer_loss(**part, scale=0.4, indices=picks(part, topk, causal=causal), causal=causal)
        torch.testing.assert_close(got["y"][:, begin:end], alone)


def test_all_that_are_visible_picked_is_the_dense_stage():
    inputs = problem(37)
    sparse, dense = (run(inputs, "torch", picks(inputs, topk)) for topk in (100, None))
    assert_equal(sparse, dense)


@stages
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_errs_at_most_twice_as_much_as_all_pairs_at_once(topk, dtype):
    low = {name: x.to(dtype) for name, x in problem(70).items()}
    indices = picks(low, topk)
    truth = run(low, "reference", indices)
    got, plain = (run(low, backend, indices, dtype) for backend in ("torch", "reference"))
    assert_within_twice(got, [plain], truth)


@stages
def test_extreme_scores_give_finite_losses_and_gradients(topk):
    inputs = {name: 100 * x for name, x in problem(37).items()}
    indices = picks(inputs, topk)
    got, truth = (run(inputs, backend, indices) for backend in ("torch", "reference"))
    assert_equal(got, truth)
    assert all(x.isfinite().all() for x in got.values())


def test_a_query_that_reads_nothing_adds_nothing():
    inputs = problem(5)
    indices = picks(inputs, 3)
    indices[:, 2] = -1
    got = run(inputs, "torch", indices)
    assert (got["y"][:, 2] == 0).all() and (got["dq"][:, 2] == 0).all()
    assert all(x.isfinite().all() for x in got.values())


def test_attention_teaches_and_does_not_learn():
    leaves = {name: x.requires_grad_() for name, x in problem(9).items()}
    lightning_indexer_loss(**leaves, scale=0.4).sum().backward()
    assert [name for name, x in leaves.items() if x.grad is None] == ["query", "key"]


@stages
def test_two_runs_are_equal_bit_for_bit_and_autocast_changes_nothing(topk):
    inputs = problem(37)
    indices = picks(inputs, topk)
    first = run(inputs, "torch", indices, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        second = run(inputs, "torch", indices, torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("topk", [None, 5])
def test_no_more_is_in_memory_than_a_block_makes(topk, monkeypatch):
    monkeypatch.setattr(loss, "PRODUCTS", 1 << 14)
    T = 1000
    inputs = problem(T, batch=1)
    arguments = (*inputs.values(), picks(inputs, topk), None, 0.4, True)
    with Largest() as seen:
        loss.forward._init_fn(*arguments)
        loss.backward._init_fn(*arguments, torch.ones(1, T, dtype=torch.float64))
    assert seen.most <= 40 * T < T * T


@stages
def test_flops_are_those_of_both_products_forward_and_of_the_indexers_gradients_backward(topk):
    inputs, sizes = problem(40), (SIZES[name] for name in ("heads", "head_dim", "attention_heads", "attention_dim"))
    heads, head_dim, attention_heads, attention_dim = sizes
    leaves = {name: x.requires_grad_(name in LEARN) for name, x in inputs.items()}
    indices = picks({name: x.detach() for name, x in inputs.items()}, topk, causal=False)
    with FlopCounterMode(display=False) as counter:
        y = lightning_indexer_loss(**leaves, scale=0.4, indices=indices, causal=False)
        forward = counter.get_total_flops()
        y.sum().backward()
    pairs = 2 * 40 * (40 if topk is None else topk)
    assert forward == 2 * pairs * (heads * head_dim + attention_heads * attention_dim)
    assert forward == 2 * lightning_indexer_loss_flops(
        40, 40, heads, head_dim, attention_heads, attention_dim, topk=topk, causal=False
    )
    assert counter.get_total_flops() == 2 * forward + 2 * 2 * pairs * heads * head_dim


@pytest.mark.thorough
@pytest.mark.parametrize("topk", [None, 3])
def test_the_operator_passes_pytorchs_own_checks(topk):
    inputs = {name: x.requires_grad_(name in LEARN) for name, x in problem(5).items()}
    indices = picks({name: x.detach() for name, x in inputs.items()}, topk)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(loss.forward, (*inputs.values(), indices, None, 0.4, True), test_utils=checks)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(2, 5, 3, 6)}, "with A a multiple of G; got query"),
        ({"query": torch.zeros(2, 4, 4, 6)}, r"query is \(2, 4, 4, 6\), it must be \(2, 5, 4, 6\)"),
        ({"key": torch.zeros(2, 5, 2, 7)}, r"key is \(2, 5, 2, 7\), it must be \(2, 5, 2, 6\)"),
        ({"indices": torch.zeros(2, 4, 3, dtype=torch.int32)}, r"indices is \(2, 4, 3\), it must be \(2, 5, 3\)"),
        (
            {"backend": "triton"},
            "unknown backend 'triton' for lightning_indexer_loss: choose from auto, torch, reference",
        ),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        lightning_indexer_loss(**problem(5) | {"scale": 1.0} | change)
