"""The contracts of this floor: a mixer or a channel, which a contributor writes, and the state that a mixer keeps.

A model is a list of blocks, x + mixer(norm(x)) and then x + channel(norm(x)), which a config puts together. A new mixer
or channel is one class in one file and one name in a config: the tests in tests/contracts then find it and hold it to
all that is said here.

Shape letters: B sequences, T tokens, D model width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Self, TypeVar

from torch import Tensor, nn

from archs.visibility import Kind, Visibility


class State(ABC):
    """The memory that one mixer keeps of the tokens that it has seen, for as many sequences as there are.

    To go on from a state makes a new one. The one before may be gone back to, which gives up all that came after it:
    the two may share memory.
    """

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens seen so far, which is the position of the next one."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that have to be kept for all sequences."""

    @abstractmethod
    def repeat(self, copies: int) -> Self:
        """A state of each sequence so many times, copies side by side, in memory of its own."""


OwnState = TypeVar("OwnState", bound=State)


class Part(nn.Module, ABC):
    """The duties that mixers and channels share. Parts may contain parts; the model asks each of them."""

    @abstractmethod
    def residual_projections(self) -> Sequence[nn.Module]:
        """The linear layers whose outputs are added to the residual stream: deep models start them smaller."""

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Losses of the part's own in the last training forward, by name, with their coefficients: scalars."""
        return {}

    def telemetry(self) -> dict[str, float]:
        """Figures of the last training forward that are worth watching, by name; none before it."""
        return {}

    def after_step(self) -> None:
        """Do what is to be done once after each optimiser step."""


class Mixer(Part, Generic[OwnState]):
    """Moves information between tokens, and keeps a state of its own kind."""

    @property
    @abstractmethod
    def visibilities(self) -> frozenset[Kind]:
        """The kinds of visibility that it can do."""

    @abstractmethod
    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: OwnState | None = None
    ) -> tuple[Tensor, OwnState | None]:
        """Mix x, of the dtype and shape in which it is returned.

        One path serves training, a prompt and decoding. With a state, x continues the tokens in it, and the state after
        them is returned; without, None is. A token sees what `visibility` says, across packed documents nothing. What
        stands in the state is seen by all of x; packed documents start from nothing and take no state.
        """

    @abstractmethod
    def empty_state(self, batch: int) -> OwnState:
        """The state before the first token, for decoding `batch` sequences."""

    @abstractmethod
    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence of T tokens that is one document: matrix products (2mnk), convolutions and
        triangular solves; what need not be computed, such as unseen pairs, is not counted."""


class Channel(Part):
    """Works on each token by itself."""

    @abstractmethod
    def forward(self, x_BTD: Tensor) -> Tensor:
        """x -> the same shape and dtype."""

    @abstractmethod
    def flops(self, T: int) -> int:
        """Forward FLOPs of one sequence of T tokens."""

    @property
    def inactive_params(self) -> int:
        """Parameters that a token does not go through."""
        return 0
