"""The grouped product: every backend against the definition, at any load of the experts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import grouped, grouped_matmul, grouped_matmul_flops
from kernels.grouped import segments
from tests.kernels.cases import assert_equal, assert_within_twice

LOADS = {
    "even": [16, 16, 16],
    "uneven": [3, 64, 1, 70, 2],
    "with empty experts": [0, 5, 0, 0, 37, 0],
    "all to the last": [0, 0, 67],
    "all to the first": [67, 0, 0],
    "one expert": [9],
    "one row": [0, 1],
    "no row": [0, 0],
}
loads = pytest.mark.parametrize("counts", LOADS.values(), ids=LOADS)
transposed = pytest.mark.parametrize("transposed", [False, True], ids=["[E, D, F]", "[E, F, D]"])
on_triton = pytest.mark.usefixtures("triton_device", "poisoned")
thorough = pytest.mark.thorough


def problem(counts, width=12, outputs=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = {"experts": len(counts), "width": width, "outputs": outputs}
    return grouped.OPERATION.random_problem(sum(counts), batch=1, **sizes, generator=generator) | {
        "counts": torch.tensor(counts)
    }


def run(inputs, backend, device="cpu", dtype=None, transposed=False):
    """Output and gradients of a random projection of it, of inputs in `dtype` or as they are."""
    leaves = {
        name: x.detach().to(device, dtype or x.dtype).requires_grad_() for name, x in inputs.items() if name != "counts"
    }
    weight = leaves["weight"].mT.contiguous().mT if transposed else leaves["weight"]
    y = grouped_matmul(leaves["x"], weight, inputs["counts"].to(device), backend=backend)
    projection = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    dx, dweight = torch.autograd.grad((y * projection).sum(), leaves.values())
    return {name: x for name, x in {"y": y, "dx": dx, "dweight": dweight}.items() if x.numel()}


def assert_right(inputs, backend, device, dtype, transposed):
    truth = run(inputs, "reference", dtype=torch.float64)
    plain = [run(inputs, "reference", dtype=dtype, transposed=transposed)]
    thirds = backend == "triton" and dtype == torch.float32  # products of three TF32 parts, as in the other kernels
    assert_within_twice(run(inputs, backend, device, dtype, transposed), plain, truth, 8 if thirds else 2)


@loads
@transposed
def test_torch_equals_the_definition_in_output_and_gradients(counts, transposed):
    inputs = problem(counts)
    assert_equal(run(inputs, "torch", transposed=transposed), run(inputs, "reference"))


@loads
@transposed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_in_half_precision_errs_no_more_than_twice_as_much(counts, transposed, dtype, poisoned):
    inputs = {name: x.to(dtype) if name != "counts" else x for name, x in problem(counts).items()}
    assert_right(inputs, "torch", "cpu", dtype, transposed)


@thorough
@on_triton
@loads
@transposed
def test_triton_is_right_at_every_load(counts, transposed, triton_device):
    assert_right(problem(counts), "triton", triton_device, torch.float32, transposed)


@thorough
@on_triton
@transposed
@pytest.mark.parametrize("counts", [[150, 0, 131], [260]])
def test_triton_is_right_over_several_blocks_of_rows_and_columns(counts, transposed, triton_device):
    assert_right(problem(counts, width=140, outputs=150), "triton", triton_device, torch.float32, transposed)


@thorough
@on_triton
@transposed
def test_triton_in_half_precision_errs_no_more_than_twice_as_much(transposed, triton_device):
    """float16: the interpreter is wrong for bfloat16."""
    dtype = torch.bfloat16 if triton_device == "cuda" else torch.float16
    low = {name: x.to(dtype) if name != "counts" else x for name, x in problem([30, 0, 41], 40, 24).items()}
    assert_right(low, "triton", triton_device, dtype, transposed)


@thorough
@on_triton
@pytest.mark.parametrize(("counts", "known"), [([3, 4], 7), ([0, 0], 0), ([3, 90], 20), ([40, 3], 20)])
def test_triton_reads_no_row_twice_and_none_that_is_not_there_where_counts_do_not_sum_up(counts, known, triton_device):
    """On a GPU nobody looks: rows of no expert are zero, and their gradients too."""
    inputs = problem([8, 12])
    x, weight = (inputs[name].float().to(triton_device).requires_grad_() for name in ("x", "weight"))
    y = grouped.operators.product(x, weight, torch.tensor(counts, device=triton_device), "triton")
    bounded = [min(counts[0], 20), min(counts[1], 20 - min(counts[0], 20))]
    truth = grouped_matmul(x[:known], weight, torch.tensor(bounded, device=triton_device), backend="reference")
    torch.testing.assert_close(y[:known], truth)
    assert not y[known:].any()
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    truths = torch.autograd.grad(truth.sum(), (x, weight), allow_unused=True)
    torch.testing.assert_close((dx, dweight), tuple(truths))


@thorough
@on_triton
def test_two_runs_of_triton_are_equal_bit_for_bit(triton_device):
    first, second = (run(problem([30, 0, 41]), "triton", triton_device, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_expert_never_reach_another(dtype):
    inputs = problem([5, 70, 0, 3])
    x, weight = inputs["x"].to(dtype), inputs["weight"].to(dtype).requires_grad_()
    x[5:75] = torch.inf
    y = grouped_matmul(x, weight, inputs["counts"])
    (dweight,) = torch.autograd.grad(y[:5].sum() + y[75:].sum() + 0 * y[5:75].nan_to_num().sum(), weight)
    assert y[:5].isfinite().all() and y[75:].isfinite().all() and dweight[[0, 2, 3]].isfinite().all()


def test_gradients_of_gradients_are_right():
    inputs = problem([3, 0, 2], 3, 4)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_matmul(x, w, inputs["counts"]), (x, weight))


def test_the_gradient_of_a_matrix_lies_in_memory_as_the_matrix_does():
    inputs = problem([3, 4])
    for weight in (inputs["weight"], inputs["weight"].mT.contiguous().mT):
        weight = weight.detach().requires_grad_()
        (d,) = torch.autograd.grad(grouped_matmul(inputs["x"], weight, inputs["counts"]).sum(), weight)
        assert d.stride() == weight.stride()


def test_a_frozen_matrix_costs_neither_its_gradient_nor_the_rows_kept_for_it():
    inputs = problem([3, 4])
    with FlopCounterMode(display=False) as counter:
        grouped_matmul(inputs["x"].requires_grad_(), inputs["weight"], inputs["counts"]).sum().backward()
    assert counter.get_total_flops() == 2 * grouped_matmul_flops(7, 12, 20)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_counted_without_a_look_at_the_counts(device):
    inputs = {name: x.to(device) for name, x in problem([3, 0, 4]).items()}
    with FlopCounterMode(display=False) as counter:
        y = grouped_matmul(inputs["x"].requires_grad_(), inputs["weight"].requires_grad_(), inputs["counts"])
        y.sum().backward()
    assert counter.get_total_flops() == 3 * grouped_matmul_flops(7, 12, 20)


@thorough
@on_triton
def test_flops_of_the_triton_operators_are_counted(triton_device):
    with FlopCounterMode(display=False) as counter:
        run(problem([3, 0, 4]), "triton", triton_device, torch.float32)
    assert counter.get_total_flops() == 3 * grouped_matmul_flops(7, 12, 20)


def test_under_autocast_it_is_a_product_in_the_dtype_of_autocast():
    inputs = {name: x.float() if name != "counts" else x for name, x in problem([3, 0, 4]).items()}
    with torch.autocast("cpu", torch.bfloat16):
        got = grouped_matmul(**inputs)
    low = {name: x.bfloat16() if name != "counts" else x for name, x in inputs.items()}
    assert torch.equal(got, grouped_matmul(**low))


def test_forward_mode_derivatives_and_transforms_run_on_the_definition():
    inputs = problem([3, 0, 4])
    weight, counts, tangent = inputs["weight"], inputs["counts"], torch.ones_like(inputs["x"])
    y, dy = torch.func.jvp(lambda x: grouped_matmul(x, weight, counts), (inputs["x"],), (tangent,))
    torch.testing.assert_close(dy, grouped_matmul(tangent, weight, counts))
    grad = torch.func.grad(lambda x: grouped_matmul(x, weight, counts).sum())(inputs["x"])
    torch.testing.assert_close(grad, run_grad(inputs))


def run_grad(inputs):
    x = inputs["x"].detach().requires_grad_()
    return torch.autograd.grad(grouped_matmul(x, inputs["weight"], inputs["counts"], backend="reference").sum(), x)[0]


def test_pytorchs_own_grouped_product_is_the_same_where_it_is_taken(monkeypatch):
    """It is on a GPU, in bfloat16; on a CPU any dtype will do to see that it is called rightly."""
    inputs = problem([3, 0, 13], 16, 24)
    truth = run(inputs, "reference")
    monkeypatch.setattr(segments, "_takes_grouped_mm", lambda x, outputs: True)
    low = {name: x.float() if name != "counts" else x for name, x in inputs.items()}
    for transposed in (False, True):
        for name, x in run(low, "torch", transposed=transposed).items():
            torch.testing.assert_close(x.double(), truth[name], rtol=1e-4, atol=1e-4)


def test_torch_compile_goes_through_without_a_break():
    inputs = grouped.OPERATION.leaves(problem([3, 0, 4]), "cpu", torch.float32, gradients=True)
    leaves = (inputs["x"], inputs["weight"])

    def loss(inputs):
        return grouped_matmul(**inputs).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, plain = (torch.autograd.grad(f(inputs), leaves) for f in (compiled, loss))
    torch.testing.assert_close(got, plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 5, 12)}, r"takes x \[N, D\], weight \[E, D, F\] and counts \[E\]; got x \[2, 5, 12\]"),
        ({"x": torch.zeros(5, 11)}, r"got x \[5, 11\]"),
        ({"counts": torch.tensor([5])}, r"counts \[1\]"),
        ({"counts": torch.tensor([2.0, 3.0])}, "counts of grouped_matmul must be int32 or int64.*torch.float32"),
        ({"counts": torch.tensor([2, 2])}, r"sum to the 5 rows of x; they are \[2, 2\]"),
        ({"counts": torch.tensor([-1, 6])}, r"at least 0 and sum to the 5 rows of x; they are \[-1, 6\]"),
        ({"x": torch.zeros(5, 12).bfloat16()}, "x of grouped_matmul is torch.bfloat16 and weight torch.float32"),
        ({"x": torch.zeros(5, 12).long(), "weight": torch.zeros(2, 12, 20).long()}, "one floating-point dtype"),
        ({"backend": "cuda"}, "unknown backend 'cuda' for grouped_matmul: choose from auto, reference, torch, triton"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, words):
    good = {"x": torch.zeros(5, 12), "weight": torch.zeros(2, 12, 20), "counts": torch.tensor([2, 3])}
    with pytest.raises(ValueError, match=words):
        grouped_matmul(**good | change)


@thorough
def test_float64_is_refused_by_triton(triton_device):
    with pytest.raises(ValueError, match="take float32, bfloat16 and float16, not torch.float64"):
        run(problem([3, 4]), "triton", triton_device)


@thorough
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operators_pass_pytorchs_own_checks(backend, triton_device):
    inputs = problem([3, 0, 4])
    x, weight = (inputs[name].float().to(triton_device).requires_grad_() for name in ("x", "weight"))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (x, weight, inputs["counts"].to(triton_device), backend)
    torch.library.opcheck(grouped.operators.product, arguments, test_utils=checks)
