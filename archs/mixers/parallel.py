"""Mixers side by side in one block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from archs.visibility import Visibility


@dataclass
class ParallelState:
    """The states of the mixers, in their order."""

    states: list

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)


class Parallel(nn.Module):
    """The mean of what several mixers make of the same input, as in Hymba (Dong et al., arXiv 2411.13676), each with its
    output projection and without Hymba's norms before the mean.

    Args:
        width: model width.
        mixers: functions of the width that build the mixers.

    Raises:
        ValueError: for fewer than two mixers.
    """

    def __init__(self, width: int, *, mixers: Sequence[Callable[[int], nn.Module]]):
        super().__init__()
        if len(mixers) < 2:
            raise ValueError(f"{len(mixers)} mixers do not stand side by side: give two or more, or use the one itself")
        self.mixers = nn.ModuleList(build(width) for build in mixers)

    @property
    def visibilities(self) -> frozenset[Visibility]:
        """Those that every one of the mixers can do."""
        return frozenset.intersection(*(mixer.visibilities for mixer in self.mixers))

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: ParallelState | None = None
    ) -> tuple[Tensor, ParallelState | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        before = [None] * len(self.mixers) if state is None else state.states
        outputs, after = zip(*(m(x_BTD, visibility, s) for m, s in zip(self.mixers, before, strict=True)), strict=True)
        return sum(outputs) / len(outputs), None if state is None else ParallelState(list(after))

    def empty_state(self, batch: int) -> ParallelState:
        return ParallelState([mixer.empty_state(batch) for mixer in self.mixers])

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence."""
        return sum(mixer.flops(T, visibility) for mixer in self.mixers)
