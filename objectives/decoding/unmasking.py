"""Filling masked positions: in which order, and how many at a time.

The steps of these samplers are passes of the network; a sequence that is full takes no part in them.

Shape letters: B sequences, T tokens, S tokens of a slice, V token ids, N positions picked out of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from objectives.contracts import Request, Sampler, Samples
from objectives.decoding.draws import Draw
from objectives.noise import uniform

ORDERS = ("confidence", "margin", "entropy", "random")


class MaskedDenoiser(Protocol):
    """The model that fills masked positions. mask: the id that stands at them."""

    @property
    def mask(self) -> int: ...

    def __call__(self, tokens_BT: Tensor, where_BT: Tensor, noised_B: Tensor) -> Tensor:
        """Logits [N, V] at the N positions where where_BT is true, from one pass of the network. noised_B: the fraction
        of each sequence's positions to be filled that are masked now."""
        ...


@dataclass(eq=False)
class Canvas:
    """Sequences that are being filled.

    tokens_BT: int64, `mask` at masked positions. masked_BT: True at all positions to be filled, from the start on.
    log_probs_BT, order_BT: see `Samples`. rounds: passes so far. passes, predictions: of all sequences together.
    """

    tokens_BT: Tensor
    masked_BT: Tensor
    log_probs_BT: Tensor
    order_BT: Tensor
    mask: int
    draw: Draw
    generator: Generator
    rounds: int = 0
    passes: int = 0
    predictions: int = 0

    @classmethod
    def of(cls, request: Request, mask: int) -> Canvas:
        tokens_BT, masked_BT = request.canvas(mask)
        log_probs_BT = torch.zeros_like(tokens_BT, dtype=torch.float64)
        order_BT = torch.full_like(tokens_BT, -1)
        return cls(tokens_BT, masked_BT, log_probs_BT, order_BT, mask, request.draw, request.generator)

    def part(self, here: slice) -> Canvas:
        """The tokens of a slice as a canvas of their own."""
        tokens_BS, masked_BS = self.tokens_BT[:, here], self.masked_BT[:, here]
        log_probs_BS, order_BS = self.log_probs_BT[:, here], self.order_BT[:, here]
        return Canvas(tokens_BS, masked_BS, log_probs_BS, order_BS, self.mask, self.draw, self.generator)

    def predict(self, denoiser: MaskedDenoiser, where_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the network once, for the sequences that have anything there: logits [N, V], ids drawn and their
        log-probabilities [N]."""
        self.rounds += 1
        self.passes += int(where_BT.any(1).sum())
        self.predictions += int(where_BT.sum())
        noised_B = (self.tokens_BT == self.mask).sum(1) / self.masked_BT.sum(1).clamp(min=1)
        logits_NV = denoiser(self.tokens_BT, where_BT, noised_B)
        return logits_NV, *self.draw(logits_NV, self.generator)

    def keep(self, keep_BT: Tensor, where_BT: Tensor, drawn_N: Tensor, log_probs_N: Tensor) -> None:
        """Write those of the tokens drawn where where_BT is true that are to be kept."""
        self.tokens_BT = torch.where(keep_BT, self.tokens_BT.masked_scatter(where_BT, drawn_N), self.tokens_BT)
        log_probs_BT = self.log_probs_BT.masked_scatter(where_BT, log_probs_N)
        self.log_probs_BT = torch.where(keep_BT, log_probs_BT, self.log_probs_BT)
        self.order_BT = self.order_BT.masked_fill(keep_BT, self.rounds - 1)

    def samples(self, stop: tuple[int, ...]) -> Samples:
        """Return what has been made of the request, each sequence up to its first stop token."""
        B = len(self.tokens_BT)
        lengths_B = lengths_of(self.tokens_BT, self.masked_BT, stop)
        effort = self.passes / B, self.predictions / B
        return Samples(self.tokens_BT, lengths_B, self.log_probs_BT, self.order_BT, *effort)


def lengths_of(tokens_BT: Tensor, drawn_BT: Tensor, stop: tuple[int, ...]) -> Tensor:
    """Tokens [B] up to the first stop token among those drawn, it included; T where there is none."""
    ended_BT = drawn_BT & torch.isin(tokens_BT, tokens_BT.new_tensor(stop))
    T = tokens_BT.shape[1]
    return torch.where(ended_BT.any(1), ended_BT.byte().argmax(1) + 1, T)


class Unmasking(Sampler):
    """A way to fill masked positions with what a `MaskedDenoiser` says."""

    def __call__(self, denoiser: MaskedDenoiser, request: Request) -> Samples:
        canvas = Canvas.of(request, denoiser.mask)
        self.fill(denoiser, canvas, canvas.masked_BT)
        return canvas.samples(request.stop)

    @abstractmethod
    def fill(self, denoiser: MaskedDenoiser, canvas: Canvas, here_BT: Tensor) -> None:
        """Fill the masked positions of the canvas where here_BT is true."""


def check_steps(steps: int) -> None:
    """
    Raises:
        ValueError: for steps below 1.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")


@dataclass(frozen=True)
class Ancestral(Unmasking):
    """The reverse process in `steps` equal steps of p from 1 to 0: a masked position is filled with probability (p -
    p') / p and then stays. Tokens of one step are drawn independently: that is its only error."""

    steps: int

    def __post_init__(self):
        check_steps(self.steps)

    @property
    def blind(self) -> bool:
        return True

    def fill(self, denoiser: MaskedDenoiser, canvas: Canvas, here_BT: Tensor) -> None:
        left_BT = here_BT
        for left in range(self.steps, 0, -1):
            fill_BT = left_BT & (uniform(here_BT.shape, canvas.generator).to(here_BT.device) * left < 1)
            # A pass in which nothing falls due tells nothing: a denoiser of tokens alone would repeat itself.
            if fill_BT.any():
                _, drawn_N, log_probs_N = canvas.predict(denoiser, fill_BT)
                canvas.keep(fill_BT, fill_BT, drawn_N, log_probs_N)
                left_BT = left_BT & ~fill_BT


@dataclass(frozen=True)
class Ordered(Unmasking):
    """In each of `steps` passes draw a token for every masked position and keep an equal fraction of them, best first;
    the others are masked again (LLaDA's low-confidence remasking, MaskGIT).

    by: "confidence" (the probability of the token drawn), "margin" (of the likeliest over the second), "entropy" (least
        first), or "random"; with as many steps as masked positions the last is the exact distribution of the denoiser,
        one token at a time.
    steps: None for as many as masked positions.
    """

    by: str
    steps: int | None

    def __post_init__(self):
        check_steps(1 if self.steps is None else self.steps)
        if self.by not in ORDERS:
            raise ValueError(f"by={self.by!r} must be one of {', '.join(ORDERS)}")

    @property
    def blind(self) -> bool:
        return self.by == "random"

    def __call__(self, denoiser: MaskedDenoiser, request: Request) -> Samples:
        """
        Raises:
            ValueError: for more steps than tokens to fill.
        """
        most = int(request.canvas(denoiser.mask)[1].sum(1).max())
        if self.steps is not None and self.steps > most:
            raise ValueError(
                f"steps={self.steps} is more than the {most} tokens to fill, and each step fills one or more"
            )
        return super().__call__(denoiser, request)

    def fill(self, denoiser: MaskedDenoiser, canvas: Canvas, here_BT: Tensor) -> None:
        """As in `Unmasking`; a block with fewer masked positions than steps takes as many steps as it has."""
        left_BT, most = here_BT, int(here_BT.sum(1).max())
        for step in range(most if self.steps is None else min(self.steps, most), 0, -1):
            logits_NV, drawn_N, log_probs_N = canvas.predict(denoiser, left_BT)
            rank_BT = _ranks(goodness(logits_NV, drawn_N, self.by, canvas.generator), left_BT)
            keep_BT = left_BT & (rank_BT < -(-left_BT.sum(1, keepdim=True) // step))
            canvas.keep(keep_BT, left_BT, drawn_N, log_probs_N)
            left_BT = left_BT & ~keep_BT


@dataclass(frozen=True)
class Threshold(Unmasking):
    """In each pass keep every token whose probability is at least `threshold`, and always the surest one (Fast-dLLM, Wu
    et al., arXiv 2505.22618)."""

    threshold: float

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold} must be above 0 and at most 1")

    def fill(self, denoiser: MaskedDenoiser, canvas: Canvas, here_BT: Tensor) -> None:
        left_BT = here_BT
        while left_BT.any():
            logits_NV, drawn_N, log_probs_N = canvas.predict(denoiser, left_BT)
            score_N = goodness(logits_NV, drawn_N, "confidence", canvas.generator)
            sure_BT = torch.zeros_like(left_BT).masked_scatter(left_BT, score_N >= self.threshold)
            keep_BT = left_BT & (sure_BT | (_ranks(score_N, left_BT) == 0))
            canvas.keep(keep_BT, left_BT, drawn_N, log_probs_N)
            left_BT = left_BT & ~keep_BT


@dataclass(frozen=True)
class Remask(Unmasking):
    """Ancestral sampling that takes tokens back: going from a fraction p of masked positions to p', one that is filled
    is masked again with probability s = min(eta, p' / (1 - p)), and masked ones are filled so much the faster (ReMDM,
    Wang et al., arXiv 2503.00307, "cap"). With eta = 0 it is ancestral sampling."""

    steps: int
    eta: float

    def __post_init__(self):
        check_steps(self.steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must lie between 0 and 1")

    def fill(self, denoiser: MaskedDenoiser, canvas: Canvas, here_BT: Tensor) -> None:
        left_BT = here_BT
        for left in range(self.steps, 0, -1):
            p, after = left / self.steps, (left - 1) / self.steps
            back = min(self.eta, after / (1 - p)) if p < 1 else 0.0
            fill = (1 - after - (1 - back) * (1 - p)) / p
            u_BT = uniform(here_BT.shape, canvas.generator).to(here_BT.device)
            fill_BT, back_BT = left_BT & (u_BT < fill), here_BT & ~left_BT & (u_BT < back)
            if fill_BT.any():
                _, drawn_N, log_probs_N = canvas.predict(denoiser, fill_BT)
                canvas.keep(fill_BT, fill_BT, drawn_N, log_probs_N)
            canvas.tokens_BT = canvas.tokens_BT.masked_fill(back_BT, canvas.mask)
            left_BT = (left_BT & ~fill_BT) | back_BT


@dataclass(frozen=True)
class LeftToRight(Unmasking):
    """Fills blocks of `size` tokens one after the other, each by another sampler (semi-autoregressive, LLaDA). The
    whole sequence is run in every pass: only block diffusion has blocks that can be cached exactly."""

    size: int
    sampler: Unmasking

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1 token")

    @property
    def blind(self) -> bool:
        return self.sampler.blind

    def fill(self, denoiser: MaskedDenoiser, canvas: Canvas, here_BT: Tensor) -> None:
        block_T = torch.arange(here_BT.shape[1], device=here_BT.device) // self.size
        for block in block_T.unique():
            now_BT = here_BT & (block_T == block)
            if now_BT.any():
                self.sampler.fill(denoiser, canvas, now_BT)


def goodness(logits_NV: Tensor, drawn_N: Tensor, by: str, generator: Generator) -> Tensor:
    """Return how sure each of N predictions is, by one of ORDERS; the network's own probabilities, without temperature.
    Float64."""
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
    raise ValueError(f"by={by!r} must be one of {', '.join(ORDERS)}")


def _ranks(score_N: Tensor, left_BT: Tensor) -> Tensor:
    """The place of each masked position in its sequence, best first, [B, T]; anything elsewhere."""
    score_BT = torch.full(left_BT.shape, -torch.inf, dtype=score_N.dtype, device=score_N.device)
    return score_BT.masked_scatter(left_BT, score_N).argsort(dim=1, descending=True, stable=True).argsort(1)
