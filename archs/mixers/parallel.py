"""Mixers side by side in one block.

Shape letters: B sequences, T tokens, D model width.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from archs.contracts import Mixer
from archs.state import JointState
from archs.visibility import Kind, Visibility


class Parallel(Mixer[JointState]):
    """The mean of what several mixers make of the same input, as in Hymba (Dong et al., arXiv 2411.13676), each with
    its output projection and without Hymba's norms before the mean.

    Args:
        width: model width.
        mixers: functions of the width that build the mixers.

    Raises:
        ValueError: for fewer than two mixers.
    """

    def __init__(self, width: int, *, mixers: Sequence[Callable[[int], Mixer]]):
        super().__init__()
        if len(mixers) < 2:
            raise ValueError(f"{len(mixers)} mixers do not stand side by side: give two or more, or use the one itself")
        self.mixers = cast(Sequence[Mixer], nn.ModuleList(build(width) for build in mixers))

    @property
    def visibilities(self) -> frozenset[Kind]:
        """Those that every one of the mixers can do."""
        return frozenset.intersection(*(mixer.visibilities for mixer in self.mixers))

    def forward(
        self, x_BTD: Tensor, visibility: Visibility, state: JointState | None = None
    ) -> tuple[Tensor, JointState | None]:
        """Mix x; see `Mixer`."""
        before = [None] * len(self.mixers) if state is None else state.parts
        outputs, after = zip(*(m(x_BTD, visibility, s) for m, s in zip(self.mixers, before, strict=True)), strict=True)
        mean_BTD = torch.stack(outputs).sum(0) / len(outputs)
        return mean_BTD, None if state is None else JointState(after)

    def residual_projections(self) -> tuple[nn.Module, ...]:
        return tuple(layer for mixer in self.mixers for layer in mixer.residual_projections())

    def empty_state(self, batch: int) -> JointState:
        return JointState(tuple(mixer.empty_state(batch) for mixer in self.mixers))

    def flops(self, T: int, visibility: Visibility) -> int:
        return sum(mixer.flops(T, visibility) for mixer in self.mixers)
