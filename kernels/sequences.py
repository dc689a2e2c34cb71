"""Sequences of several lengths, packed one after the other, and how they are cut into chunks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FEW = 8  # tokens of a sequence that are decoded one by one


class Chunks(NamedTuple):
    """begins, ends: [chunks] int32, the tokens of each chunk: from its begin to at most the end of its sequence.
    sequences: [chunks] int32, the sequence of each. firsts: [sequences + 1] int32, the first chunk of each sequence. There
    may be more chunks than needed: those are empty."""

    begins: Tensor
    ends: Tensor
    sequences: Tensor
    firsts: Tensor


def check_packed(batch: int, tokens: int, cu_seqlens: Tensor) -> None:
    """
    Raises:
        ValueError: for a batch of more than one, or boundaries that are not one-dimensional integers.
    """
    if batch != 1:
        raise ValueError(f"with cu_seqlens the sequences lie packed in a batch of 1, not of {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be [sequences + 1] of int32 or int64, the first 0 and the last the {tokens} tokens; got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )


def takes_steps(tokens: int, cu_seqlens: Tensor | None, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a Triton backend goes token by token: for a few, when no gradient is wanted, as decoding does."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return tokens <= FEW and cu_seqlens is None and not wanted


def one_by_one(
    run: Callable, tokens: list[Tensor | None], states: Tensor, cu_seqlens: Tensor, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Packed sequences, each by itself.

    Args:
        run: takes the tokens of one and its state, gives outputs and the state after it.
        tokens: tensors [1, tokens, ...], or None.
        states: [sequences, ...].
        like: [1, tokens, ...], what outputs look like.
    """
    outputs, finals = [like[:, :0]], []
    for start, end, state in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), states.split(1), strict=True):
        if end > start:
            output, state = run(*(x if x is None else x[:, start:end] for x in tokens), state)
            outputs.append(output)
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)


def chunks_of(cu_seqlens: Tensor, tokens: int, size: int) -> Chunks:
    """The chunks of `size` tokens of packed sequences, on the device of cu_seqlens and without waiting for it."""
    lengths = cu_seqlens.diff()
    firsts = torch.cat([lengths.new_zeros(1), ((lengths + size - 1) // size).cumsum(0)])
    most = tokens // size + len(lengths)
    chunk = torch.arange(most, device=cu_seqlens.device)
    sequence = torch.searchsorted(firsts, chunk, right=True) - 1
    real = sequence < len(lengths)
    sequence = sequence.clamp(max=len(lengths) - 1)
    begins = torch.where(real, cu_seqlens[sequence] + (chunk - firsts[sequence]) * size, 0)
    ends = torch.where(real, cu_seqlens[sequence + 1], 0)
    return Chunks(begins.int(), ends.int(), sequence.int(), firsts.int())
