"""Drawing token ids from what a model says.

Probabilities and uniforms are float64: float32 uniforms cut the tail of a Gumbel variable, which lowers the entropy of
what is drawn (Zheng et al., arXiv 2409.02908).

Shape letters: V token ids.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from objectives.noise import uniform


@dataclass(frozen=True)
class Draw:
    """Draws ids from softmax(logits / temperature), cut to the fewest tokens that hold top_p of it (nucleus sampling,
    Holtzman et al., arXiv 1904.09751). Temperature 0 takes the likeliest.

    Raises:
        ValueError: for a temperature below 0 or a top_p outside (0, 1].
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (take the likeliest token) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (draw from all tokens)")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that ids are drawn from, [..., V] float64."""
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        p = torch.softmax(logits.double() / self.temperature, dim=-1)
        if self.top_p < 1:
            sorted_p, order = p.sort(dim=-1, descending=True)
            # A token stays while those before it hold less than top_p, so the first one always does.
            kept = sorted_p.cumsum(-1) - sorted_p < self.top_p
            p = torch.zeros_like(p).scatter(-1, order, sorted_p * kept)
            p = p / p.sum(-1, keepdim=True)
        return p

    def __call__(self, logits: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Ids [...] drawn from logits [..., V], and their log-probabilities, float64."""
        return choose(self.probabilities(logits), generator)


def choose(p: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Ids [...] drawn from distributions [..., V] in float64, by inversion of the distribution function, and their
    log-probabilities."""
    cumulative = p.to(generator.device).cumsum(-1)
    at = uniform(p.shape[:-1], generator)[..., None] * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, at, right=True)[..., 0]
    # Rounding may carry the highest uniform to the very end, where ids of probability zero may stand.
    last = p.shape[-1] - 1 - (p.to(generator.device) > 0).flip(-1).byte().argmax(-1)
    ids = torch.minimum(ids, last).to(p.device)
    return ids, p.gather(-1, ids[..., None])[..., 0].log()
