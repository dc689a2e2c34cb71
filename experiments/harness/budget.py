"""From a budget in FLOPs to tokens, steps and batches."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """A run's budget as it is spent: flops = flops_per_token * tokens + flops_per_step * steps, tokens = sequences *
    sequence_length. What a step costs besides its tokens is the optimiser's. group: sequences that stay together."""

    sequences: int
    steps: int
    sequence_length: int
    flops_per_token: float
    flops_per_step: float = 0.0
    group: int = 1

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens + self.flops_per_step * self.steps

    def tokens_before(self, step: int) -> int:
        """Tokens of the steps before a step."""
        return self.first_sequence(step) * self.sequence_length

    def flops_before(self, step: int) -> float:
        """FLOPs of the steps before a step."""
        return self.flops_per_token * self.tokens_before(step) + self.flops_per_step * step

    def first_sequence(self, step: int) -> int:
        """Number of the first sequence of a step; steps differ by one group at most."""
        return step * (self.sequences // self.group) // self.steps * self.group


def allocate(
    flops: float,
    flops_per_token: float,
    sequence_length: int,
    batch_tokens: int | None = None,
    flops_per_step: float = 0.0,
    group: int = 1,
) -> Allocation:
    """Spend `flops` on whole groups of sequences: the budget is met from below, to within one of them (and, where steps
    cost something themselves, one step).

    Where batch_tokens is None the batch grows with the tokens D of the run as 0.58 D^0.571 tokens (Step Law, Li et
    al., arXiv 2503.04715), so that short runs still take enough steps.

    Raises:
        ValueError: when the budget does not pay for one sequence; names the least that does.
    """

    size = sequence_length * group

    def allocation(groups: int) -> Allocation:
        tokens = 0.58 * (groups * size) ** 0.571 if batch_tokens is None else batch_tokens
        steps = -(-groups // min(groups, max(1, round(tokens / size))))
        return Allocation(groups * group, steps, sequence_length, flops_per_token, flops_per_step, group)

    per_group, affordable = flops_per_token * size, flops * (1 + 1e-12)
    groups = int(affordable / per_group)
    if flops_per_step:  # the largest number whose steps are affordable too
        most = range(1, groups + 1)
        groups = bisect_right(most, affordable, key=lambda n: allocation(n).flops)
    if groups < 1:
        raise ValueError(
            f"budget.flops={flops:.3g} does not pay for one step: a sequence of {size} tokens costs this "
            f"model {per_group + flops_per_step:.3g} FLOPs. Raise the budget to at least that, or take a "
            "smaller arch.width or data.sequence_length"
        )
    return allocation(groups)
