"""Checks, defaults and precision of arguments that the public functions share."""

import torch
from torch import Tensor


def check_shape(name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check the shape of a tensor, where there is one.

    Raises:
        ValueError: for a tensor of another shape.
    """
    if x is not None and x.shape != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, it must be {tuple(shape)}")


def check_packed(batch: int, tokens: int, cu_seqlens: Tensor | None) -> None:
    """Check the boundaries of packed sequences, where there are some.

    Raises:
        ValueError: with cu_seqlens for a batch of more than one row, or boundaries that are not one-dimensional
            integers.
    """
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(f"with cu_seqlens the sequences lie packed in a batch of 1, not of {batch}")
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
