"""Sequences of several lengths, packed one after the other, and how they are cut into chunks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_TOKENS = 8  # of a sequence, that Triton backends decode one by one


def sequence_count(batch: int, cu_seqlens: Tensor | None) -> int:
    """Return the number of sequences, each with a state: rows of the batch, or what lies packed in the one row."""
    return batch if cu_seqlens is None else len(cu_seqlens) - 1


def boundaries(tokens: int, cu_seqlens: Tensor) -> Tensor:
    """Return cu_seqlens. What was not checked on its way to a GPU is bent so that every token is of one sequence:
    kernels never reach out of bounds."""
    inner = cu_seqlens[1:-1].clamp(0, tokens).cummax(0).values
    return F.pad(F.pad(inner, (1, 0)), (0, 1), value=tokens)


def takes_steps(tokens: int, cu_seqlens: Tensor | None, inputs: tuple[Tensor, ...]) -> bool:
    """Return True where a Triton backend goes token by token: for a few, when no gradient is wanted, as decoding
    does."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return tokens <= FEW_TOKENS and cu_seqlens is None and not wanted


def run_each_sequence(
    run: Callable, tokens: list[Tensor | None], states: Tensor, cu_seqlens: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return outputs and states of a backend that knows no packed sequences: it takes each by itself.

    Args:
        run: takes the tokens and the state of sequences of one length, gives outputs and the states after them.
        tokens: tensors [batch, tokens, ...], or None.
        states: [sequences, ...].
        cu_seqlens: [sequences + 1], or None where the sequences are the rows of the batch.
        like: [batch, tokens, ...], what outputs look like.
    """
    if not like.numel():  # no token, or no row
        return like.clone(), states.clone()
    if cu_seqlens is None:
        return run(*tokens, states)
    outputs, finals = [like[:, :0]], []
    for start, end, state in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), states.split(1), strict=True):
        if end > start:
            output, state = run(*(x if x is None else x[:, start:end] for x in tokens), state)
            outputs.append(output)
        finals.append(state)
    return torch.cat(outputs, 1), torch.cat(finals)


def chunk_count(tokens: int, sequences: int, size: int) -> int:
    """Return how many chunks of `size` tokens suffice for sequences of any lengths."""
    return tokens // size + sequences


def slot_count(rows: int, tokens: int, cu_seqlens: Tensor | None, size: int) -> int:
    """Return how many slots of `size` tokens, as kernels/common/slots.py numbers them, sequences have: the rows of a
    batch, or those packed in the one row."""
    return rows * max(1, -(-tokens // size)) if cu_seqlens is None else tokens // size + sequence_count(1, cu_seqlens)
