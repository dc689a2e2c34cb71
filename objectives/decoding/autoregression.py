"""One token after the other, from cached states.

Shape letters: P prompts, B sequences (copies of the prompts side by side), T tokens, V token ids.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from archs.contracts import State
from objectives.contracts import MASKED, Request, Sampler, Samples
from objectives.decoding.unmasking import lengths_of


class NextTokenDenoiser(Protocol):
    """The model that is asked. start: the id that stands in front of every sequence."""

    @property
    def start(self) -> int: ...

    def empty_states(self, batch: int) -> list[State]:
        """The states before the first token."""
        ...

    def extend(self, tokens_BT: Tensor, states: list[State]) -> tuple[Tensor, list[State]]:
        """Logits [B, V] of the token behind these, and the states after them."""
        ...


@dataclass(frozen=True)
class Autoregression(Sampler):
    """Continues prompts of any lengths, several times each from one pass over the prompt.

    The prompts are run together as far as the shortest goes. From there on all sequences advance token by token, those
    whose prompt goes on with its tokens and the others with what is drawn, until each has drawn a stop token or is
    full: so no sequence is padded, and every kind of state can be decoded.
    """

    @property
    def blind(self) -> bool:
        return True

    def __call__(self, denoiser: NextTokenDenoiser, request: Request) -> Samples:
        """
        Raises:
            ValueError: for a prompt with masked positions, or one that is as long as the sequences asked for.
        """
        for prompt_T in request.prompts:
            if (prompt_T == MASKED).any():
                raise ValueError(
                    "next-token prediction can only continue, not fill masked positions: choose a diffusion objective"
                )
        shared = min(len(prompt_T) for prompt_T in request.prompts)
        tokens_BT, drawn_BT = request.canvas(denoiser.start)
        B, T = tokens_BT.shape
        prompt_PT = F.pad(tokens_BT[:: request.copies, :shared], (1, 0), value=denoiser.start)
        logits, states = denoiser.extend(prompt_PT, denoiser.empty_states(len(prompt_PT)))
        if request.copies > 1:
            logits = logits.repeat_interleave(request.copies, dim=0)
            states = [state.repeat(request.copies) for state in states]
        device = tokens_BT.device
        log_probs_BT = torch.zeros(B, T, dtype=torch.float64, device=device)
        stop = tokens_BT.new_tensor(request.stop)
        running_B, passes = torch.ones(B, dtype=torch.bool, device=device), 0
        for t in range(shared, T):
            passes += 1
            ids_B, log_probs_B = request.draw(logits, request.generator)
            tokens_BT[:, t] = torch.where(drawn_BT[:, t], ids_B, tokens_BT[:, t])
            log_probs_BT[:, t] = torch.where(drawn_BT[:, t], log_probs_B, 0.0)
            running_B &= ~(drawn_BT[:, t] & torch.isin(tokens_BT[:, t], stop))
            if t + 1 == T or not running_B.any():
                break
            logits, states = denoiser.extend(tokens_BT[:, t : t + 1], states)
        lengths_B = lengths_of(tokens_BT, drawn_BT, request.stop)
        before_end_BT = torch.arange(T, device=device) < lengths_B[:, None]
        drawn_BT &= before_end_BT
        order_BT = torch.arange(-shared, T - shared, device=device).where(drawn_BT, -1)
        log_probs_BT = log_probs_BT.where(before_end_BT, 0.0)
        return Samples(tokens_BT, lengths_B, log_probs_BT, order_BT, float(passes), drawn_BT.sum().item() / B)
