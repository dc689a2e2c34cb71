"""Next-token prediction: the exact likelihood by the chain rule."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from archs.language_model import LanguageModel
from archs.visibility import CAUSAL
from objectives.likelihood import Likelihood, Samples, answer_nats, mean_nats


class NextToken:
    """-log p(x) = sum_t -log p(x_t | x_<t), every window scored from its first token on.

    Args:
        vocab_size: number of token ids of the data.
        eot: id of the end-of-text token, which also stands in front of every window.
    """

    visibility = CAUSAL
    predicted = 1.0  # share of positions at which the head runs

    def __init__(self, vocab_size: int, eot: int):
        self.vocab_size = self.model_vocab_size = vocab_size
        self.eot = eot

    def answer_logits(self, model: LanguageModel, tokens_BT: Tensor, answers_BT: Tensor) -> Tensor:
        """Logits [N, vocab_size] of the N tokens where answers_BT is true, each from the tokens before it."""
        return model.logits(self._hidden(model, tokens_BT)[answers_BT])

    def _hidden(self, model: LanguageModel, tokens_BT: Tensor) -> Tensor:
        return model.hidden(F.pad(tokens_BT[:, :-1], (1, 0), value=self.eot), CAUSAL)

    def _nats(self, model: LanguageModel, tokens_BT: Tensor, answers_BT: Tensor | None) -> Tensor:
        if answers_BT is not None:
            return answer_nats(self.answer_logits(model, tokens_BT, answers_BT), tokens_BT, answers_BT)
        logits_BTV = model.logits(self._hidden(model, tokens_BT))
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten(), reduction="none").view_as(tokens_BT)

    def loss(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Tensor:
        """Mean nats a token, or an answer where these are marked, a scalar with gradients. The generator is not used."""
        return mean_nats(self._nats(model, tokens_BT, answers_BT), answers_BT)

    @torch.no_grad()
    def bound(
        self, model: LanguageModel, tokens_BT: Tensor, generator: Generator, answers_BT: Tensor | None = None
    ) -> Likelihood:
        """Exact -log p of each sequence, or of its answers given what stands before each. The generator is not used."""
        return Likelihood(self._nats(model, tokens_BT, answers_BT).double().sum(1), variance=0.0, exact=True)

    @torch.no_grad()
    def sample(
        self,
        model: LanguageModel,
        prompt_BT: Tensor,
        length: int,
        generator: Generator,
        temperature: float = 1.0,
        steps: int | None = None,
    ) -> Samples:
        """Continue prompt [B, P] (P may be 0) to `length` tokens, one at a time from the cached state.

        Raises:
            ValueError: when `steps` is given and is not the number of new tokens, or the prompt is too long.
        """
        B, P = prompt_BT.shape
        if P >= length:
            raise ValueError(f"the prompt has {P} tokens already: ask for a length above that, not {length}")
        if steps not in (None, length - P):
            raise ValueError(f"next_token makes one token a step: steps={steps} must be {length - P} or left out")
        tokens = F.pad(prompt_BT, (1, 0), value=self.eot)
        logits_BTV, states = model.prefill(tokens)
        logits_BV, new = logits_BTV[:, -1], []
        for position in range(P, length):
            new.append(draw(logits_BV, temperature, generator))
            if position + 1 < length:
                logits_BV, states = model.step(new[-1], states)
        return Samples(torch.cat([prompt_BT, torch.stack(new, 1)], dim=1), evaluations=length - P)


def draw(logits: Tensor, temperature: float, generator: Generator) -> Tensor:
    """Token ids [...] drawn from softmax(logits / temperature) of logits [..., V], in float64: float32 uniforms
    truncate the tail of a Gumbel and so lower the entropy of what is drawn. Temperature 0 takes the largest."""
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must be 0 (take the likeliest token) or above")
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, dim=-1).to(generator.device)
    ids = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
    return ids.view(logits.shape[:-1]).to(logits.device)
