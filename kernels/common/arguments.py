"""Checks, defaults and precision of arguments that the public functions share."""

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(operation: str, **expected: tuple[Tensor | None, str]) -> None:
    """Check rank, dtype and device of the tensors of an operation, those that are there.

    They have one dtype, or float32 stands beside one half precision, as weights, gates and states do under autocast.

    Args:
        operation: its name.
        expected: by the name of each argument the tensor and its layout, the letters of its dimensions ("B T C"); where
            there are several layouts, with " or " between.

    Raises:
        ValueError: for a tensor of another rank, of integers or complex numbers, or on another device than the first
            one; or where dtypes are mixed in another way.
    """
    tensors = {name: x for name, (x, _) in expected.items() if x is not None}
    for name, x in tensors.items():
        layouts = _layouts(expected[name][1])
        if x.dim() not in map(len, layouts):
            allowed = " or ".join(f"[{', '.join(letters)}]" for letters in layouts)
            raise ValueError(f"{name} of {operation} must be {allowed}; it has {x.dim()} dimensions: {list(x.shape)}")
        if x.dtype not in FLOATS:
            raise ValueError(
                f"{name} of {operation} is {x.dtype}, it must be float32, bfloat16, float16 or float64: convert it"
            )
    first, *others = tensors
    for name in others:
        if tensors[name].device != tensors[first].device:
            raise ValueError(
                f"{name} of {operation} is on {tensors[name].device} and {first} on {tensors[first].device}: move one"
            )
    found: dict[torch.dtype, str] = {}
    for name, x in tensors.items():
        found.setdefault(x.dtype, name)
    if torch.float64 not in found:
        found.pop(torch.float32, None)
    if len(found) > 1:
        (one, a), (two, b) = list(found.items())[:2]
        raise ValueError(
            f"{a} of {operation} is {one} and {b} {two}: give all one dtype, or float32 beside one half precision"
        )


@cache
def _layouts(layouts: str) -> list[list[str]]:
    """Return the letters of each layout; every decoded token asks for them anew."""
    return [layout.split() for layout in layouts.split(" or ")]


def is_transformed(*tensors: Tensor | None) -> bool:
    """Return True inside torch.func's grad, vmap and jvp, and for tensors with a tangent of forward-mode derivatives.
    There a gradient that is written out is not known, and an operator of our own would give a tangent of zeros."""
    if torch.compiler.is_compiling():
        return False
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check the shape of a tensor, where there is one.

    Raises:
        ValueError: for a tensor of another shape.
    """
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, it must be {tuple(shape)}")


def check_packed(batch: int, tokens: int, cu_seqlens: Tensor | None, like: Tensor | None = None) -> None:
    """Check the boundaries of packed sequences, where there are some: their values too if they lie on a CPU. On a GPU
    that would wait for it in every call: `check_boundaries` does it where it is wanted, once per batch.

    Args:
        batch, tokens: of the tensors that hold the sequences.
        cu_seqlens: [sequences + 1].
        like: a tensor on the device where they are to be, or None for any.

    Raises:
        ValueError: with cu_seqlens for a batch of more than one row, on another device, or boundaries that
            `check_boundaries` refuses.
    """
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"with cu_seqlens the sequences lie packed in a batch of 1, not of {batch}")
    _check_integers(cu_seqlens, tokens)
    if like is not None and cu_seqlens.device != like.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device} and the tokens on {like.device}: move it, once per batch"
        )
    # What torch.compile and its kind look at has no values.
    if cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling():
        check_boundaries(cu_seqlens, tokens)


def check_boundaries(cu_seqlens: Tensor, tokens: int) -> None:
    """Check where packed sequences begin and end, by their values; waits for a GPU that they lie on.

    Args:
        cu_seqlens: [sequences + 1] int32 or int64: 0, where each further sequence begins, and `tokens`.
        tokens: that are packed.

    Raises:
        ValueError: for boundaries that are not one-dimensional integers, or that do not begin with 0, end with
            `tokens` and never fall.
    """
    _check_integers(cu_seqlens, tokens)
    places = cu_seqlens.tolist()
    if places[0] != 0:
        raise ValueError(f"cu_seqlens begins with {places[0]}, it must begin with 0, the first token of the first")
    if places[-1] != tokens:
        raise ValueError(f"cu_seqlens ends with {places[-1]}, it must end with {tokens}, the tokens that are packed")
    for begin, end in pairwise(places):
        if end < begin:
            raise ValueError(
                f"cu_seqlens falls from {begin} to {end}, it must never fall: a sequence ends behind its begin"
            )


def _check_integers(cu_seqlens: Tensor, tokens: int) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be [sequences + 1] of int32 or int64, the first 0 and the last the {tokens} tokens; got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )


def at_least_float32(x: Tensor) -> torch.dtype:
    """Return float32 for half precision, else the dtype of x."""
    return torch.promote_types(x.dtype, torch.float32)


def state_or_zeros(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return the state, or zeros on the device of `like`; in `like`'s dtype, or float32 where that is half
    precision."""
    dtype = at_least_float32(like)
    return like.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype)


def without_autocast(x: Tensor) -> torch.autocast:
    """Return a context in which operations on tensors of x's device keep their dtypes."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)


def check_dimensions(operation: str, x: Tensor, name: str, letters: str) -> None:
    """Check how many dimensions a tensor has, one for each of the letters.

    Raises:
        ValueError: for a tensor of another number.
    """
    if x.dim() != letters.count(",") + 1:
        raise ValueError(f"{operation} takes {name} [{letters}], not {name} {tuple(x.shape)}")


def check_heads(name: str, x: Tensor, tokens: tuple[int, ...], heads: int, size: int) -> None:
    """Check that x is [*tokens, H, size] with H a divisor of `heads`.

    Raises:
        ValueError: for another shape, or heads that do not divide.
    """
    if x.shape[:-2] != tokens or x.shape[-1] != size:
        raise ValueError(f"{name} is {tuple(x.shape)}, it must be {tokens} with heads of {size} dimensions behind")
    if x.shape[-2] == 0 or heads % x.shape[-2]:
        raise ValueError(f"{heads} value heads are not a multiple of {x.shape[-2]} heads of {name}")


def check_floating(operation: str, **tensors: Tensor | None) -> None:
    """Check that all tensors hold floating-point numbers, and all float64 where one does.

    Raises:
        ValueError: for a tensor of another dtype, or float64 beside less.
    """
    dtypes = {name: x.dtype for name, x in tensors.items() if x is not None}
    for name, dtype in dtypes.items():
        if not dtype.is_floating_point:
            raise ValueError(f"{name} is {dtype}: {operation} takes floating-point tensors, convert it")
    if torch.float64 in dtypes.values() and len(set(dtypes.values())) > 1:
        said = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise ValueError(f"{operation} takes float64 for all tensors or for none, convert them; got {said}")
