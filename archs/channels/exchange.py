"""Experts that are dealt out to processes: tokens are sent to the processes of their experts, and back.

Shape letters: D model width, E experts in all, R processes, L = E / R experts of each, P pairs of a token and an expert
here, sorted by expert, N rows that came for the experts of this process.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from archs.channels.pairs import Pairs


class Exchange:
    """The way of rows to the processes of a group, of which process r has the experts r L to (r + 1) L - 1 (expert
    parallelism: Lepikhin et al., GShard, arXiv 2006.16668). All processes of the group are to come here together, with
    any number of rows each."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of a model exchange in the same group

    @torch.compiler.disable
    def __call__(self, experts: Callable[[Tensor, Tensor], Tensor], x_PD: Tensor, load_E: Tensor) -> Tensor:
        """Return what the experts of all processes make of rows x [P, D], of which the first load[0] are for the first
        expert, the next load[1] for the second and so on, in the order of x.

        experts: (rows [N, D] sorted by expert, loads [L]) -> [N, D], of the experts of this process.
        """
        sent_RL = load_E.view(self.group.size(), -1)
        came_RL = torch.empty_like(sent_RL)
        dist.all_to_all_single(came_RL, sent_RL.contiguous(), group=self.group)
        sent, came = (counts_RL.sum(1).tolist() for counts_RL in (sent_RL, came_RL))
        rows_ND = all_to_all_single_autograd(x_PD, came, sent, self.group)
        expert_RL = torch.arange(came_RL.shape[1], device=x_PD.device).expand_as(came_RL)
        expert_N1 = expert_RL.flatten().repeat_interleave(came_RL.flatten(), output_size=sum(came))[:, None]
        by_expert = Pairs.of(expert_N1)
        y_ND = experts(by_expert.spread(rows_ND), came_RL.sum(0))
        y_ND = by_expert.collect(y_ND, y_ND.new_ones(len(y_ND), 1))
        return all_to_all_single_autograd(y_ND, sent, came, self.group)
