"""The visibility of tokens: the ones that each may look at.

Shape letters: B sequences, T tokens of queries, S tokens of keys, L tokens of one copy of a sequence, N documents, R
runs of keys that lie side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor


class Kind(Enum):
    """Names what an objective asks for, and a mixer can or cannot do."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    BLOCK_CAUSAL = "block-causal"


@dataclass(frozen=True, eq=False)
class Visibility:
    """The pairs of a query and a key that are seen.

    kind: CAUSAL: a token sees itself and all before it. BIDIRECTIONAL: all of them. BLOCK_CAUSAL is of an input that
        holds a sequence twice, noised and then clean, cut into blocks: a noised token sees the noised tokens of its own
        block and the clean ones of the blocks before; a clean token the clean ones of the blocks up to its own (Arriola
        et al., arXiv 2503.09573, section 3.2). The last block may be shorter.
    block_size: tokens per block, for BLOCK_CAUSAL alone.
    starts_BL: bool, True where a packed document begins: documents do not see each other, their positions and blocks
        begin anew, and no memory is carried from one to the next. None: each sequence is one document.
    """

    kind: Kind
    block_size: int = 0
    starts_BL: Tensor | None = None
    _made: dict[Hashable, Any] | None = field(default=None, repr=False)

    @property
    def copies(self) -> int:
        """Return how many times the sequence stands in the input, side by side, each from position 0."""
        return 2 if self.kind is Kind.BLOCK_CAUSAL else 1

    def for_one_pass(self) -> Visibility:
        """The same, for one pass through a model: what one layer makes of it `once` is there for the others."""
        return replace(self, _made={})

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return make(), which is not called again under this key in the same pass (see `for_one_pass`)."""
        if self._made is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def packed(self, starts_BL: Tensor | None) -> Visibility:
        """The same within documents that begin at these tokens; the first of each sequence begins one in any case."""
        if starts_BL is None:
            return self
        starts_BL = starts_BL.clone()
        starts_BL[:, 0] = True
        return replace(self, starts_BL=starts_BL, _made=None)

    def positions(self, T: int, offset: int = 0, device: torch.device | None = None) -> Tensor:
        """Places of T tokens within their documents, the first of an unpacked input at `offset`: int64 [T] or [B,
        T]."""
        L = T // self.copies
        place = torch.arange(offset, offset + L, device=device)
        if self.starts_BL is not None:
            place = place - torch.where(self.starts_BL, place, 0).cummax(1).values
        return torch.cat([place] * self.copies, dim=-1)

    def documents(self) -> Tensor:
        """Number of the document of each token of one copy, [B, L]; of packed documents alone."""
        return self._starts().cumsum(1)

    def _starts(self) -> Tensor:
        if self.starts_BL is None:
            raise ValueError("only packed documents have starts: see `packed`")
        return self.starts_BL

    def cu_seqlens(self) -> Tensor:
        """Return where the documents begin when all sequences are laid end to end, and the end: [N + 1] int64, as
        kernels take it."""

        def make() -> Tensor:
            starts_BL = self._starts()
            begins_N = starts_BL.flatten().nonzero()[:, 0]
            return torch.cat([begins_N, begins_N.new_tensor([starts_BL.numel()])])

        return self.once("cu_seqlens", make)

    def visible(self, T: int, S: int, window: int | None = None, device: torch.device | None = None) -> Tensor | None:
        """True at the pairs seen, [T, S] or, for packed documents, [B, 1, T, S]; None where all are. The queries are
        the last T of the S tokens. window: tokens that a query sees in each direction that it sees at all, itself
        included."""
        seen = None
        if self.kind is Kind.CAUSAL:
            seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
        if window is not None:
            place_S = torch.arange(S, device=device)
            near_TS = (place_S[S - T :, None] - place_S).abs() < window
            seen = near_TS if seen is None else seen & near_TS
        if self.kind is Kind.BLOCK_CAUSAL:
            seen = self._visible_blocks(T // 2, device)
        if self.starts_BL is not None:
            document_BT = torch.cat([self.documents()] * self.copies, dim=1)
            same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
            seen = same if seen is None else seen & same
        return seen

    def runs(
        self, T: int, window: int | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """The pairs of `visible` where no state is continued, as numbers per query: begins and ends [R, B, T] or [R, 1,
        T] of the runs of keys that it sees, as `kernels.attention` takes them. None where the kind and the window alone
        say it."""
        if self.starts_BL is None and self.kind is not Kind.BLOCK_CAUSAL:
            return None
        L = T // self.copies
        place_L = torch.arange(L, device=device)
        starts_BL = place_L[None] == 0 if self.starts_BL is None else self.starts_BL
        first_BL = torch.where(starts_BL, place_L, 0).cummax(1).values
        # The next document's first token, read from behind.
        next_BL = torch.where(starts_BL, place_L, L).roll(-1, 1).index_fill(1, place_L[-1:], L)
        end_BL = next_BL.flip(1).cummin(1).values.flip(1)
        if self.kind is Kind.BLOCK_CAUSAL:
            block_BL = first_BL + (place_L - first_BL) // self.block_size * self.block_size
            after_BL = torch.minimum(block_BL + self.block_size, end_BL)
            noised = (block_BL, after_BL), (L + first_BL, L + block_BL)
            clean = (block_BL, block_BL), (L + first_BL, L + after_BL)
            begins, ends = (
                torch.stack([torch.cat([n[i], c[i]], dim=1) for n, c in zip(noised, clean, strict=True)])
                for i in (0, 1)
            )
            return begins, ends
        reach = L if window is None else window
        begin_BL = torch.maximum(first_BL, place_L - reach + 1)
        last_BL = place_L + 1 if self.kind is Kind.CAUSAL else place_L + reach
        return begin_BL[None], torch.minimum(end_BL, last_BL)[None]

    def _visible_blocks(self, L: int, device: torch.device | None) -> Tensor:
        block_L = self.positions(2 * L, device=device)[..., :L] // self.block_size
        query, key = block_L[..., :, None], block_L[..., None, :]
        noised = torch.cat([query == key, query > key], dim=-1)
        clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=-1)
        seen = torch.cat([noised, clean], dim=-2)
        return seen if self.starts_BL is None else seen[:, None]

    def pairs(self, T: int, window: int | None = None) -> int:
        """Number of pairs seen in one document of T tokens: what attention has to compute. The T tokens of BLOCK_CAUSAL
        are those of both copies: (T / 2) (T / 2 + block_size) pairs of whole blocks."""
        if self.kind is Kind.BLOCK_CAUSAL:
            size, (blocks, rest) = self.block_size, divmod(T // 2, self.block_size)
            # A token of either copy sees all blocks before its own and, in one of the copies, its own.
            return 2 * (size**2 * blocks * (blocks + 1) // 2 + rest * (blocks * size + rest))
        unseen = max(0, T - window) if window is not None else 0
        causal = T * (T + 1) // 2 - unseen * (unseen + 1) // 2
        return causal if self.kind is Kind.CAUSAL else 2 * causal - T


CAUSAL, BIDIRECTIONAL = Visibility(Kind.CAUSAL), Visibility(Kind.BIDIRECTIONAL)


def block_causal(block_size: int) -> Visibility:
    return Visibility(Kind.BLOCK_CAUSAL, block_size)
