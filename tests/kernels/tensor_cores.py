"""Tensor cores in Triton's interpreter, which by itself multiplies float32 where they take TF32, cuts bfloat16 off
where they round it, and computes with the bits of bfloat16 as if they were integers.

Under `emulate` a product has the operands that the hardware would see (bfloat16 and fp8 exactly, float32 without the 13
bits that TF32 leaves out, in three such products for "tf32x3") and float32 sums; a cast to bfloat16 rounds to the
nearest, ties to even; and any other arithmetic on bfloat16 is refused, since here it would be wrong without a word.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

TF32_BITS = np.uint32(0xFFFFE000)


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return the bits [uint16] of float32 numbers rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return as float32 what bits [uint16] of bfloat16 stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_e4m3(bits: np.ndarray) -> np.ndarray:
    """Return as float32 what bits [uint8] of fp8 (E4M3) stand for."""
    return torch.from_numpy(bits.view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers without the bits that a tensor core does not read."""
    return (np.ascontiguousarray(x).view(np.uint32) & TF32_BITS).view(np.float32)


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers rounded to the nearest TF32, ties away from zero, as `cvt.rna.tf32` does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + np.uint32(0x1000)) & TF32_BITS).view(np.float32), x)


def multiplied(a: TensorHandle, b: TensorHandle, precision: str) -> np.ndarray:
    """Return the product, with float32 sums, of what the hardware reads of a and b."""
    if a.dtype.scalar == tl.bfloat16:
        return from_bfloat16(a.data) @ from_bfloat16(b.data)
    if a.dtype.scalar == tl.float8e4nv:
        return from_e4m3(a.data) @ from_e4m3(b.data)
    x, y = a.data.astype(np.float32), b.data.astype(np.float32)
    if a.dtype.scalar != tl.float32 or precision == "IEEE":
        return x @ y
    if precision == "TF32":
        return cut_to_tf32(x) @ cut_to_tf32(y)
    assert precision == "TF32x3", precision
    x_high, y_high = rounded_to_tf32(x), rounded_to_tf32(y)
    small = cut_to_tf32(x - x_high) @ y_high + x_high @ cut_to_tf32(y - y_high)
    return np.nan_to_num(small, nan=0.0, posinf=np.inf, neginf=-np.inf) + x_high @ y_high  # of inf, which Triton drops


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels that are interpreted meet tensor cores and bfloat16 as a GPU has them."""
    cast = InterpreterBuilder.cast_impl

    def cast_rounded(self, src, dst_type):
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded_to_bfloat16(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(from_bfloat16(src.data), tl.float32)
        if tl.bfloat16 in pair and pair[0] != pair[1]:
            raise TypeError(f"a cast from {pair[0]} to {pair[1]}: the interpreter has bfloat16 only through float32")
        return cast(self, src, dst_type)

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar.primitive_bitwidth == 8 and a.dtype.scalar != tl.float8e4nv:
            raise TypeError(f"products of {a.dtype.scalar} are not emulated")
        return TensorHandle(multiplied(a, b, input_precision.name) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_fabs"):
        monkeypatch.setattr(InterpreterBuilder, name, refusing_bfloat16(name, vars(InterpreterBuilder)[name]))
    monkeypatch.setattr(ReduceScanOpInterface, "apply", refusing_bfloat16("a sum or scan", ReduceScanOpInterface.apply))


def refusing_bfloat16(name: str, operation):
    """Return the operation of the interpreter; on a tensor of bfloat16 it raises TypeError."""

    def run(self, *operands):
        for x in operands:
            for part in x if isinstance(x, tuple) else (x,):
                if getattr(getattr(part, "dtype", None), "scalar", None) == tl.bfloat16:
                    raise TypeError(f"{name} on bfloat16, which the interpreter gets wrong: cast to float32 first")
        return operation(self, *operands)

    return run
