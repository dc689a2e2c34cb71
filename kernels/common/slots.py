"""Triton functions that find the chunks of L tokens of sequences, without a table of them.

Sequences are the rows of a batch, `length` tokens each, or lie packed in one row of `length` tokens between the places
in cu_seqlens. Chunk i of the n-th sequence has a slot of its own: n * (chunks of a sequence) + i, or packed, where the
sequence begins at token b, b // L + n + i. Packed, some slots are empty; every sequence has at least one.
"""

import triton
import triton.language as tl


@triton.jit
def sequence_at(n, cu_seqlens, length, sequences, L: tl.constexpr):
    """Return begin and end of the n-th sequence, and the slot of its first chunk. Places that were not checked are bent
    so that none lies out of bounds."""
    if cu_seqlens is None:
        begin, end, slot = n * length, (n + 1) * length, n * tl.maximum(tl.cdiv(length, L), 1)
    else:
        begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), length).to(tl.int32)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + n + 1), 0), length).to(tl.int32)
        begin, end = tl.where(n == 0, 0, begin), tl.where(n == sequences - 1, length, end)
        slot = begin // L + n
    return begin, end, slot


@triton.jit
def chunk_at(slot, cu_seqlens, length, sequences, L: tl.constexpr):
    """Return the sequence that a slot belongs to, where that begins and ends, and the first token of the slot's chunk;
    an empty one has it at the end or behind."""
    if cu_seqlens is None:
        n = slot // tl.maximum(tl.cdiv(length, L), 1)
    else:
        n = -1  # of the sequences whose first slot is not beyond this one the last
        for first in range(0, sequences, 256):
            i = first + tl.arange(0, 256)
            places = tl.load(cu_seqlens + i, mask=i < sequences, other=0)
            begins = tl.minimum(tl.maximum(places, 0), length).to(tl.int32)
            begins = tl.where(i == 0, 0, begins)
            n += tl.sum(((i < sequences) & (begins // L + i <= slot)).to(tl.int32), 0)
    begin, end, first_slot = sequence_at(n, cu_seqlens, length, sequences, L)
    return n, begin, end, begin + (slot - first_slot) * L
