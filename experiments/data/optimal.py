"""The hidden Markov language in place of a LanguageModel: the answers of a perfectly trained network.

Shape letters: B sequences, T tokens, V symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from archs.contracts import State
from archs.visibility import CAUSAL, Kind, Visibility
from experiments.data.hidden_markov import HiddenMarkovLanguage


@dataclass(frozen=True, eq=False)
class Past(State):
    """The tokens before [B, T], which are all that is to be remembered."""

    tokens_BT: Tensor

    @property
    def length(self) -> int:
        return self.tokens_BT.shape[1]

    @property
    def nbytes(self) -> int:
        return self.tokens_BT.nbytes

    def repeat(self, copies: int) -> Self:
        return replace(self, tokens_BT=self.tokens_BT.repeat_interleave(copies, dim=0))


@dataclass(frozen=True)
class OptimalModel:
    """Answers as a `Model` does, with the exact log-probabilities of the language: float64, on the CPU.

    language: whose symbols are the ids from 0 on; the next id is the mask, or what stands in front.
    columns: logits beyond those of the symbols, all 0, which objectives are to leave out.
    uniform_noise: whether bidirectional tokens are noised towards the uniform distribution, by the time given, and not
        masked.
    """

    language: HiddenMarkovLanguage
    columns: int = 0
    uniform_noise: bool = False

    def empty_states(self, batch: int) -> list[State]:
        return [Past(torch.zeros(batch, 0, dtype=torch.long))]

    def hidden(self, tokens_BT: Tensor, visibility: Visibility = CAUSAL, time: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, T, V] of the token asked for at each position; causal inputs begin with the start."""
        V = self.language.symbols
        if visibility.kind is Kind.CAUSAL:  # the last symbol is not needed to predict
            return self.language.conditionals(pad(tokens_BT[:, 1:], (0, 1)))
        if visibility.kind is Kind.BLOCK_CAUSAL:
            noised_BT, clean_BT = tokens_BT.chunk(2, dim=1)
            out = []
            for start in range(0, noised_BT.shape[1], visibility.block_size):
                seen_BT = torch.cat([clean_BT[:, :start], noised_BT[:, start : start + visibility.block_size]], 1)
                out.append(self._denoised(seen_BT)[:, start:])
            return torch.cat([*out, torch.zeros(*clean_BT.shape, V).double()], 1)
        if self.uniform_noise and time is not None:
            p_B11 = time[:, :, None].double()
            return self.language.leave_one_out((1 - p_B11) * one_hot(tokens_BT, V) + p_B11 / V).log()
        return self._denoised(tokens_BT)

    def extend(
        self, tokens_BT: Tensor, states: list[State], visibility: Visibility = CAUSAL, time: Tensor | None = None
    ) -> tuple[Tensor, list[State]]:
        """As `hidden`, of tokens behind those in the states: continued, or of one more block to be denoised."""
        past = cast(Past, states[0])
        seen_BT = torch.cat([past.tokens_BT, tokens_BT], 1)
        causal = visibility.kind is Kind.CAUSAL
        hidden_BTV = self.hidden(seen_BT, visibility) if causal else self._denoised(seen_BT)
        return hidden_BTV[:, past.length :], [Past(seen_BT)]

    def _denoised(self, tokens_BT: Tensor) -> Tensor:
        return self.language.posterior(tokens_BT, tokens_BT == self.language.symbols).log()

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V + columns]."""
        return pad(hidden, (0, self.columns))
