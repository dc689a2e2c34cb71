"""What stands in for tensor cores in Triton's interpreter does what they do."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is in the test extra on Linux")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the tensor cores themselves")


@triton.jit
def product_kernel(a, b, out, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION).to(out.dtype.element_ty))


@triton.jit
def sum_kernel(a, b, out, PRECISION: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None]
    tl.store(out + at, tl.load(a + at) + tl.load(b + at))


def product(dtype, precision="tf32", out=torch.float32):
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = torch.empty(16, 16, dtype=out)
    product_kernel[(1,)](a, b, found, precision)
    return found, a.double() @ b.double()


def error(*pair):
    found, truth = pair
    return ((found - truth).square().mean() / truth.square().mean()).sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_products_of_half_precision_and_of_fp8_are_exact_but_for_float32_sums(triton_device, dtype):
    assert error(*product(dtype)) < 3e-7


@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-4, 1e-3), ("tf32x3", 0, 1e-6), ("ieee", 0, 3e-7)])
def test_products_of_float32_lose_what_their_precision_leaves_out(triton_device, precision, least, most):
    assert least <= error(*product(torch.float32, precision)) < most


def test_a_result_is_rounded_to_bfloat16_as_pytorch_rounds_it(triton_device):
    exact, _ = product(torch.bfloat16)
    assert torch.equal(product(torch.bfloat16, out=torch.bfloat16)[0], exact.bfloat16())


def test_other_arithmetic_on_bfloat16_is_refused(triton_device):
    a = torch.ones(16, 16, dtype=torch.bfloat16)
    with pytest.raises(triton.runtime.interpreter.InterpreterError, match="on bfloat16.*cast to float32 first"):
        sum_kernel[(1,)](a, a, a.clone(), "tf32")
