"""The cross entropy of a linear head: every backend against the definition with all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels import cross_entropy, linear_cross_entropy, linear_cross_entropy_flops
from kernels.cross_entropy import blocks
from tests.kernels.cases import assert_equal, assert_within_twice

OPTIONS = {
    "plain": {},
    "soft cap": {"soft_cap": 2.0},
    "z-loss": {"z_loss": 0.1},
    "both": {"soft_cap": 2.0, "z_loss": 0.1},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
biased = pytest.mark.parametrize("biased", [False, True])
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
thorough = pytest.mark.thorough


def problem(T=20, width=12, vocabulary=33, biased=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = cross_entropy.OPERATION.random_problem(T, batch=1, width=width, vocabulary=vocabulary, generator=generator)
    return inputs | ({"bias": torch.randn(vocabulary, generator=generator, dtype=torch.float64)} if biased else {})


def run(inputs, backend, device="cpu", dtype=None, **options):
    """Losses and the gradients of half of their weighted sum, of inputs in `dtype` or as they are."""
    dtype = dtype or inputs["hidden"].dtype
    leaves = cross_entropy.OPERATION.leaves(inputs, device, dtype, gradients=True)
    total, losses = linear_cross_entropy(**leaves, backend=backend, **options)
    names = [name for name in ("hidden", "weight", "bias") if name in leaves]
    gradients = torch.autograd.grad(total / 2, [leaves[name] for name in names])
    torch.testing.assert_close(total, (losses * leaves["token_weights"].to(losses)).sum())
    return {"losses": losses} | {f"d{name}": x for name, x in zip(names, gradients, strict=True)}


def assert_right(inputs, backend, device="cpu", dtype=torch.float32, **options):
    truth = run(inputs, "reference", dtype=torch.float64, **options)
    plain = [run(inputs, "reference", dtype=dtype, **options)]
    thirds = backend == "triton" and dtype == torch.float32  # products of three TF32 parts, as in the other kernels
    assert_within_twice(run(inputs, backend, device, dtype, **options), plain, truth, 8 if thirds else 2)


def rounded(inputs, dtype):
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


@options
@biased
@pytest.mark.parametrize("T", [0, 1, 20, 300])
def test_torch_equals_the_definition_in_losses_and_gradients(options, biased, T):
    inputs = problem(T, biased=biased)
    assert_equal(run(inputs, "torch", **options), run(inputs, "reference", **options))


@options
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_in_half_precision_errs_no_more_than_twice_as_much(options, dtype, poisoned):
    assert_right(rounded(problem(300, 40, 70, biased=True), dtype), "torch", dtype=dtype, **options)


@thorough
@on_triton
@options
@biased
@pytest.mark.parametrize("T", [20, 150])
def test_triton_is_right(options, biased, T, triton_device):
    assert_right(problem(T, biased=biased), "triton", triton_device, **options)


@thorough
@on_triton
@options
def test_triton_is_right_for_a_token_alone(options, triton_device):
    """So few numbers err by luck: they are near the truth, not twice as near as others."""
    inputs = problem(1, biased=True)
    truth = run(inputs, "reference", **options)
    for name, x in run(inputs, "triton", triton_device, torch.float32, **options).items():
        torch.testing.assert_close(x.double().cpu(), truth[name], rtol=1e-5, atol=1e-6)


@thorough
@on_triton
@options
def test_triton_is_right_over_several_blocks_of_token_ids(options, triton_device, monkeypatch):
    from kernels.cross_entropy import triton_operators

    monkeypatch.setattr(triton_operators, "COLUMNS", 64)
    assert_right(problem(9, 20, 200, biased=True), "triton", triton_device, **options)


@thorough
@on_triton
def test_triton_in_half_precision_errs_no_more_than_twice_as_much(triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    dtype = torch.bfloat16 if triton_device == "cuda" else torch.float16
    assert_right(rounded(problem(140, 40, 70), dtype), "triton", triton_device, dtype)


@thorough
@on_triton
def test_two_runs_of_triton_are_equal_bit_for_bit(triton_device):
    first, second = (run(problem(140), "triton", triton_device, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=thorough)])
def test_a_token_of_weight_zero_is_not_computed(backend, triton_device):
    """What stands there may be anything: it reaches neither losses nor gradients."""
    device = triton_device if backend == "triton" else "cpu"
    inputs = problem(150)
    left_out = inputs["token_weights"] == 0
    assert left_out.any()
    spoilt = inputs | {"hidden": inputs["hidden"].masked_fill(left_out[:, None], torch.nan)}
    got, clean = (run(x, backend, device, torch.float32) for x in (spoilt, inputs))
    assert all(torch.equal(got[name], clean[name]) for name in clean)
    assert not got["losses"][left_out].any() and not got["dhidden"][left_out].any()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=thorough)])
def test_where_no_token_counts_all_is_zero(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    inputs = problem(5) | {"token_weights": torch.zeros(5)}
    assert not any(x.any() for x in run(inputs, backend, device, torch.float32).values())


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=thorough)])
def test_extreme_logits_give_finite_losses_and_gradients(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    inputs = problem(20)
    inputs = inputs | {"hidden": inputs["hidden"] * 1e4}
    found = run(inputs, backend, device, torch.float32)
    truth = run(rounded(inputs, torch.float32), "reference", dtype=torch.float64)
    assert all(x.isfinite().all() for x in found.values())
    torch.testing.assert_close(found["losses"].double().cpu(), truth["losses"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("backend", ["reference", "torch", pytest.param("triton", marks=thorough)])
def test_a_bias_of_minus_infinity_bars_a_token_id(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    inputs = problem(20, vocabulary=33)
    inputs["targets"] = inputs["targets"] % 32
    fewer = inputs | {"weight": inputs["weight"][:32]}
    barred = torch.zeros(33, dtype=torch.float64)
    barred[32] = -torch.inf
    got = run(inputs | {"bias": barred}, backend, device, torch.float32)
    truth = run(fewer, "reference", dtype=torch.float32)
    torch.testing.assert_close(got["losses"].cpu(), truth["losses"])
    torch.testing.assert_close(got["dhidden"].cpu(), truth["dhidden"])
    assert not got["dweight"][32].any()


def test_no_tensor_of_tokens_by_token_ids_is_made():
    """In all the process holds an eighth of the logits, a few times over."""
    largest = 0
    empty = torch.Tensor.new_empty

    def note(x, *shape, **kwargs):
        nonlocal largest
        y = empty(x, *shape, **kwargs)
        largest = max(largest, y.numel())
        return y

    inputs = problem(2048, 8, 500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", note)
        run(inputs, "torch", dtype=torch.float32)
    assert 0 < largest <= 2048 // 8 * 500


def test_without_weights_every_token_counts_as_one():
    inputs = problem() | {"token_weights": None}
    total, losses = linear_cross_entropy(**inputs)
    truth = F.cross_entropy(inputs["hidden"] @ inputs["weight"].T, inputs["targets"], reduction="none")
    torch.testing.assert_close((total, losses), (truth.sum(), truth))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_flops_are_three_products_less_those_of_frozen_tensors(frozen):
    inputs = problem()
    for name in ("hidden", "weight"):
        inputs[name].requires_grad_(frozen not in (name, "both"))
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(**inputs)
    products = {"hidden": 2, "weight": 2, "both": 1}[frozen]
    assert counter.get_total_flops() == products * linear_cross_entropy_flops(20, 12, 33)


def test_a_second_backward_pass_is_refused():
    inputs = problem()
    total, _ = linear_cross_entropy(**inputs | {"hidden": inputs["hidden"].requires_grad_()})
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_losses_and_weights_get_no_gradient():
    inputs = problem()
    weights = inputs["token_weights"].requires_grad_()
    total, losses = linear_cross_entropy(**inputs | {"hidden": inputs["hidden"].requires_grad_()})
    assert not losses.requires_grad and torch.autograd.grad(total, weights, allow_unused=True) == (None,)


def test_under_autocast_it_is_a_head_in_the_dtype_of_autocast():
    inputs = rounded(problem(), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(**inputs)
    low = {name: inputs[name].bfloat16() for name in ("hidden", "weight")}
    assert all(torch.equal(a, b) for a, b in zip(got, linear_cross_entropy(**inputs | low), strict=True))
    assert got[0].dtype == torch.float32


def test_forward_mode_derivatives_run_on_the_definition():
    inputs = problem()
    hidden = inputs.pop("hidden")

    def loss(hidden, backend="auto"):
        return linear_cross_entropy(hidden, **inputs, backend=backend)[0]

    leaf = hidden.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, "reference"), leaf)
    _, slope = torch.func.jvp(loss, (hidden,), (torch.ones_like(hidden),))
    torch.testing.assert_close(slope, gradient.sum())


def test_torch_compile_goes_through_without_a_break():
    inputs = cross_entropy.OPERATION.leaves(problem(), "cpu", torch.float32, gradients=True)
    leaves = (inputs["hidden"], inputs["weight"])
    inputs["token_weights"].requires_grad_(False)

    def loss(inputs):
        return 2 * linear_cross_entropy(**inputs)[0]

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, plain = (torch.autograd.grad(f(inputs), leaves) for f in (compiled, loss))
    torch.testing.assert_close(got, plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(2, 5, 3)}, r"takes hidden \[N, D\] and weight \[V, D\]; got hidden \[2, 5, 3\]"),
        ({"weight": torch.zeros(7, 4)}, r"weight \[7, 4\]"),
        ({"targets": torch.zeros(4, dtype=torch.long)}, r"targets of linear_cross_entropy is \[4\], it must be \[5\]"),
        ({"token_weights": torch.zeros(4)}, r"token_weights of linear_cross_entropy is \[4\]"),
        ({"bias": torch.zeros(4)}, r"bias of linear_cross_entropy is \[4\], it must be \[7\]"),
        ({"targets": torch.zeros(5)}, "targets of linear_cross_entropy are torch.float32, they must be int64"),
        ({"targets": torch.tensor([0, 1, 7, 0, 0])}, "target 7 is not one of the 7 token ids"),
        ({"targets": torch.tensor([0, 1, -100, 0, 0])}, "target -100 is not one of the 7"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be above 0, or None"),
        ({"hidden": torch.zeros(5, 3).bfloat16()}, "hidden of linear_cross_entropy is torch.bfloat16 and weight"),
        ({"backend": "cuda"}, "unknown backend 'cuda' for linear_cross_entropy"),
    ],
)
def test_bad_input_is_refused_by_name(change, words):
    good = {"hidden": torch.zeros(5, 3), "weight": torch.zeros(7, 3), "targets": torch.zeros(5, dtype=torch.long)}
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(**good | change)


def test_a_block_has_an_eighth_of_the_tokens_where_that_is_neither_few_nor_many():
    assert [blocks.rows_of_a_block(N) for N in (10, 2048, 100_000)] == [128, 256, 512]


@thorough
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operator_passes_pytorchs_own_checks(backend, triton_device):
    x = cross_entropy.OPERATION.leaves(problem(), triton_device, torch.float32, gradients=False)
    arguments = (x["hidden"].requires_grad_(), x["weight"].requires_grad_(), None, x["targets"], x["token_weights"])
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        cross_entropy.operators.forward, (*arguments, None, 0.0, True, True, torch.float32, backend), test_utils=checks
    )
