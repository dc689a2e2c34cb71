"""The hidden Markov language in place of a LanguageModel: what a perfectly trained network would answer."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from archs.visibility import CAUSAL, Visibility
from experiments.data.hidden_markov import HiddenMarkovLanguage


class Cache:
    """The tokens before, which are all that is to be remembered."""

    def __init__(self, batch: int):
        self.tokens_BT = torch.zeros(batch, 0, dtype=torch.long)

    def rewind(self, tokens: int) -> None:
        self.tokens_BT = self.tokens_BT[:, : self.tokens_BT.shape[1] - tokens]


class OptimalModel:
    """Answers as a LanguageModel does, with the exact log-probabilities of the language: float64, on the CPU.

    Args:
        language: whose symbols are the ids from 0 on; the next id is the mask, or what stands in front.
        columns: logits beyond those of the symbols, all 0, which objectives are to leave out.
        uniform_noise: whether bidirectional tokens are noised towards the uniform law, by the time given, and not masked.
    """

    def __init__(self, language: HiddenMarkovLanguage, columns: int = 0, uniform_noise: bool = False):
        self.language, self.columns, self.uniform_noise = language, columns, uniform_noise
        self.blocks, self.mixer, self.empty_state = [self], self, Cache

    def hidden(self, tokens_BT: Tensor, visibility, states: list | None = None, time: Tensor | None = None) -> Tensor:
        """Log-probabilities [B, T, symbols] of the token asked for at each position."""
        V = self.language.symbols
        if states is not None:
            start = states[0].tokens_BT.shape[1]
            states[0].tokens_BT = torch.cat([states[0].tokens_BT, tokens_BT], 1)
            return self._denoised(states[0].tokens_BT)[:, start:]
        if visibility is CAUSAL:  # inputs are shifted by the start; the last symbol is not needed to predict
            return self.language.conditionals(pad(tokens_BT[:, 1:], (0, 1)))
        if visibility.kind is Visibility.BLOCK_CAUSAL:
            noised_BT, clean_BT = tokens_BT.chunk(2, dim=1)
            out = []
            for start in range(0, noised_BT.shape[1], visibility.size):
                seen_BT = torch.cat([clean_BT[:, :start], noised_BT[:, start : start + visibility.size]], 1)
                out.append(self._denoised(seen_BT)[:, start:])
            return torch.cat([*out, torch.zeros(*clean_BT.shape, V).double()], 1)
        if self.uniform_noise:
            p_B11 = time[:, :, None].double()
            return self.language.leave_one_out((1 - p_B11) * one_hot(tokens_BT, V) + p_B11 / V).log()
        return self._denoised(tokens_BT)

    def _denoised(self, tokens_BT: Tensor) -> Tensor:
        return self.language.posterior(tokens_BT, tokens_BT == self.language.symbols).log()

    def logits(self, hidden: Tensor) -> Tensor:
        return pad(hidden, (0, self.columns))

    def prefill(self, tokens_BT: Tensor, states: list | None = None) -> tuple[Tensor, list]:
        """As LanguageModel's; the first token is the start."""
        cache = Cache(len(tokens_BT)) if states is None else states[0]
        cache.tokens_BT = torch.cat([cache.tokens_BT, tokens_BT], 1)
        logits_BTV = self.logits(self.hidden(cache.tokens_BT, CAUSAL))
        return logits_BTV[:, -tokens_BT.shape[1] :], [cache]

    def step(self, tokens_B: Tensor, states: list) -> tuple[Tensor, list]:
        logits_BTV, states = self.prefill(tokens_B[:, None], states)
        return logits_BTV[:, -1], states
