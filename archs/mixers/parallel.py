"""Mixers side by side in one block."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from archs.state import States
from archs.visibility import Visibility


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
        self, x_BTD: Tensor, visibility: Visibility, state: States | None = None
    ) -> tuple[Tensor, States | None]:
        """Mix x [B, T, width]. With a state, x continues the tokens in it, which must be causal."""
        before = [None] * len(self.mixers) if state is None else state.states
        outputs, after = zip(*(m(x_BTD, visibility, s) for m, s in zip(self.mixers, before, strict=True)), strict=True)
        return sum(outputs) / len(outputs), None if state is None else States(list(after))

    def empty_state(self, batch: int) -> States:
        return States([mixer.empty_state(batch) for mixer in self.mixers])

    def flops(self, T: int, visibility: Visibility) -> int:
        """Forward FLOPs of one sequence."""
        return sum(mixer.flops(T, visibility) for mixer in self.mixers)
