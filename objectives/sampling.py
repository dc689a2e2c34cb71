"""Drawing tokens, and the samplers of masked denoisers: in which order gaps are filled, and how many at a time.

A sampler is called as sampler(denoise, tokens_BT, gaps_BT, mask, draw, generator) -> Samples, where denoise(tokens_BT,
where_BT) runs the network once and gives logits [N, V] at the N positions where where_BT is true, and gaps_BT marks the
positions to fill, which hold `mask`. Its steps are passes of the network; a row that is full takes no part in them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from objectives.noise import uniform

Denoise = Callable[[Tensor, Tensor], Tensor]
ORDERS = ("confidence", "margin", "entropy", "random")
GAP = -1


@dataclass(frozen=True)
class Samples:
    """tokens_BT: [B, T] int64, prompt included. evaluations: passes of the network, predictions: tokens that the head was
    run on; both a sequence, in the mean over the batch."""

    tokens_BT: Tensor
    evaluations: float
    predictions: float


@dataclass(frozen=True)
class Draw:
    """Draws ids from softmax(logits / temperature), cut to the fewest tokens that hold top_p of it (nucleus sampling,
    Holtzman et al., arXiv 1904.09751). Temperature 0 takes the likeliest.

    Probabilities and uniforms are float64: float32 uniforms cut the tail of a Gumbel variable, which lowers the entropy
    of what is drawn (Zheng et al., arXiv 2409.02908).

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
        """The law that ids are drawn from, [..., V] float64."""
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

    def __call__(self, logits: Tensor, generator: Generator) -> Tensor:
        """Logits [..., V] -> ids [...]."""
        return choose(self.probabilities(logits), generator)


def choose(p: Tensor, generator: Generator) -> Tensor:
    """Ids [...] drawn from laws [..., V] in float64, by inversion of the distribution function."""
    cumulative = p.to(generator.device).cumsum(-1)
    at = uniform(p.shape[:-1], generator)[..., None] * cumulative[..., -1:]
    ids = torch.searchsorted(cumulative, at, right=True)[..., 0]
    # Rounding may carry the highest uniform to the very end, where ids of probability zero may stand.
    last = p.shape[-1] - 1 - (p.to(generator.device) > 0).flip(-1).byte().argmax(-1)
    return torch.minimum(ids, last).to(p.device)


def gaps_of(prompt_BT: Tensor, length: int, filler: int) -> tuple[Tensor, Tensor]:
    """A prompt [B, P] brought to `length`: tokens [B, length], with the filler where it has gaps (-1) and behind it, and
    True at these places.

    Raises:
        ValueError: when the prompt is longer than the length, or leaves nothing to fill.
    """
    P = prompt_BT.shape[1]
    tokens_BT = F.pad(prompt_BT, (0, length - P), value=GAP) if P <= length else prompt_BT
    gaps_BT = tokens_BT == GAP
    if P > length or not gaps_BT.any():
        raise ValueError(
            f"the prompt has {P} tokens already and no gaps: ask for a length above that, not {length}, or mark gaps"
        )
    return tokens_BT.masked_fill(gaps_BT, filler), gaps_BT


def check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")


class Tally:
    """Counts the passes and predictions of each row."""

    def __init__(self, rows: int):
        self.rows, self.passes, self.predictions = rows, 0, 0

    def __call__(self, where_BT: Tensor) -> None:
        self.passes += int(where_BT.any(1).sum())
        self.predictions += int(where_BT.sum())

    def samples(self, tokens_BT: Tensor) -> Samples:
        return Samples(tokens_BT, self.passes / self.rows, self.predictions / self.rows)


@dataclass(frozen=True)
class Ancestral:
    """The reverse process in `steps` equal steps of p from 1 to 0: a gap is filled with probability (p - p') / p and then
    stays. Tokens of one step are drawn independently: that is its only error."""

    steps: int

    def __post_init__(self):
        check_steps(self.steps)

    def __call__(
        self, denoise: Denoise, tokens_BT: Tensor, gaps_BT: Tensor, mask: int, draw: Draw, generator: Generator
    ) -> Samples:
        tally, left_BT = Tally(len(tokens_BT)), gaps_BT
        for left in range(self.steps, 0, -1):
            fill_BT = left_BT & (uniform(tokens_BT.shape, generator).to(tokens_BT.device) * left < 1)
            # A pass in which nothing falls due tells nothing: a denoiser of tokens alone would repeat itself.
            if fill_BT.any():
                tally(fill_BT)
                tokens_BT = tokens_BT.masked_scatter(fill_BT, draw(denoise(tokens_BT, fill_BT), generator))
                left_BT = left_BT & ~fill_BT
        return tally.samples(tokens_BT)


@dataclass(frozen=True)
class Ordered:
    """In each of `steps` passes draw a token for every gap and keep an equal share of them, best first; the others are
    gaps again (LLaDA's low-confidence remasking, MaskGIT).

    by: "confidence" (the probability of the token drawn), "margin" (of the likeliest over the second), "entropy" (least
        first), or "random"; with as many steps as gaps the last is the exact law of the denoiser, one token at a time.
    """

    by: str
    steps: int

    def __post_init__(self):
        check_steps(self.steps)
        if self.by not in ORDERS:
            raise ValueError(f"by={self.by!r} must be one of {', '.join(ORDERS)}")

    def __call__(
        self, denoise: Denoise, tokens_BT: Tensor, gaps_BT: Tensor, mask: int, draw: Draw, generator: Generator
    ) -> Samples:
        tally, left_BT = Tally(len(tokens_BT)), gaps_BT
        most = int(gaps_BT.sum(1).max())
        if self.steps > most:
            raise ValueError(
                f"steps={self.steps} is more than the {most} tokens to fill, and each step fills one or more"
            )
        for step in range(self.steps, 0, -1):
            tally(left_BT)
            logits_NV = denoise(tokens_BT, left_BT)
            drawn_N = draw(logits_NV, generator)
            score_N = goodness(logits_NV, drawn_N, self.by, generator)
            rank_BT = _ranks(score_N, left_BT)
            take_B1 = -(-left_BT.sum(1, keepdim=True) // step)
            keep_BT = left_BT & (rank_BT < take_B1)
            tokens_BT = torch.where(keep_BT, tokens_BT.masked_scatter(left_BT, drawn_N), tokens_BT)
            left_BT = left_BT & ~keep_BT
        return tally.samples(tokens_BT)


@dataclass(frozen=True)
class Threshold:
    """In each pass keep every token whose probability is at least `threshold`, and always the surest one (Fast-dLLM, Wu
    et al., arXiv 2505.22618)."""

    threshold: float

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0 and at most 1")

    def __call__(
        self, denoise: Denoise, tokens_BT: Tensor, gaps_BT: Tensor, mask: int, draw: Draw, generator: Generator
    ) -> Samples:
        tally, left_BT = Tally(len(tokens_BT)), gaps_BT
        while left_BT.any():
            tally(left_BT)
            logits_NV = denoise(tokens_BT, left_BT)
            drawn_N = draw(logits_NV, generator)
            score_N = goodness(logits_NV, drawn_N, "confidence", generator)
            sure_BT = torch.zeros_like(left_BT).masked_scatter(left_BT, score_N >= self.threshold)
            keep_BT = left_BT & (sure_BT | (_ranks(score_N, left_BT) == 0))
            tokens_BT = torch.where(keep_BT, tokens_BT.masked_scatter(left_BT, drawn_N), tokens_BT)
            left_BT = left_BT & ~keep_BT
        return tally.samples(tokens_BT)


@dataclass(frozen=True)
class Remask:
    """Ancestral sampling that takes tokens back: going from a share p of gaps to p', one that is filled becomes a gap
    again with probability s = min(eta, p' / (1 - p)), and gaps are filled so much the faster (ReMDM, Wang et al., arXiv
    2503.00307, "cap"). With eta = 0 it is ancestral sampling."""

    steps: int
    eta: float

    def __post_init__(self):
        check_steps(self.steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 and 1")

    def __call__(
        self, denoise: Denoise, tokens_BT: Tensor, gaps_BT: Tensor, mask: int, draw: Draw, generator: Generator
    ) -> Samples:
        tally, left_BT = Tally(len(tokens_BT)), gaps_BT
        for left in range(self.steps, 0, -1):
            p, after = left / self.steps, (left - 1) / self.steps
            back = min(self.eta, after / (1 - p)) if p < 1 else 0.0
            fill = (1 - after - (1 - back) * (1 - p)) / p
            u_BT = uniform(tokens_BT.shape, generator).to(tokens_BT.device)
            fill_BT, back_BT = left_BT & (u_BT < fill), gaps_BT & ~left_BT & (u_BT < back)
            if fill_BT.any():
                tally(fill_BT)
                tokens_BT = tokens_BT.masked_scatter(fill_BT, draw(denoise(tokens_BT, fill_BT), generator))
            tokens_BT = tokens_BT.masked_fill(back_BT, mask)
            left_BT = (left_BT & ~fill_BT) | back_BT
        return tally.samples(tokens_BT)


@dataclass(frozen=True)
class LeftToRight:
    """Fills blocks of `size` tokens one after the other, each by another sampler (semi-autoregressive, LLaDA). The whole
    sequence is run in every pass: only BlockDiffusion has blocks that can be cached exactly."""

    size: int
    sampler: "Sampler"

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 token")

    def __call__(
        self, denoise: Denoise, tokens_BT: Tensor, gaps_BT: Tensor, mask: int, draw: Draw, generator: Generator
    ) -> Samples:
        block_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) // self.size
        evaluations = predictions = 0.0
        for block in block_T.unique():
            here_BT = gaps_BT & (block_T == block)
            if here_BT.any():
                part = self.sampler(denoise, tokens_BT, here_BT, mask, draw, generator)
                tokens_BT, evaluations = part.tokens_BT, evaluations + part.evaluations
                predictions += part.predictions
        return Samples(tokens_BT, evaluations, predictions)


Sampler = Ancestral | Ordered | Threshold | Remask | LeftToRight


def goodness(logits_NV: Tensor, drawn_N: Tensor, by: str, generator: Generator) -> Tensor:
    """How sure each of N predictions is, by one of ORDERS; the network's own probabilities, without temperature. Float64."""
    if by == "random":
        return uniform(drawn_N.shape, generator).to(drawn_N.device)
    p_NV = torch.softmax(logits_NV.double(), dim=-1)
    match by:
        case "confidence":
            return p_NV.gather(-1, drawn_N[:, None])[:, 0]
        case "margin":
            first, second = p_NV.topk(2, dim=-1).values.unbind(-1)
            return first - second
        case "entropy":
            return torch.special.xlogy(p_NV, p_NV).sum(-1)


def _ranks(score_N: Tensor, left_BT: Tensor) -> Tensor:
    """The place of each gap in its row, best first, [B, T]; anything elsewhere."""
    score_BT = torch.full(left_BT.shape, -torch.inf, dtype=score_N.dtype, device=score_N.device)
    return score_BT.masked_scatter(left_BT, score_N).argsort(dim=1, descending=True, stable=True).argsort(1)
