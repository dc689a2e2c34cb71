"""From a budget in FLOPs to tokens, steps and batches."""

from bisect import bisect_right
from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """How a run spends its budget: flops = flops_per_token * tokens + flops_per_step * steps, tokens = sequences *
    sequence_length. What a step costs besides its tokens is the optimiser's."""

    sequences: int
    steps: int
    sequence_length: int
    flops_per_token: float
    flops_per_step: float = 0.0

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens + self.flops_per_step * self.steps

    def first_sequence(self, step: int) -> int:
        """Number of the first sequence of a step; steps differ by one sequence at most."""
        return step * self.sequences // self.steps


def allocate(
    flops: float,
    flops_per_token: float,
    sequence_length: int,
    batch_tokens: int | None = None,
    flops_per_step: float = 0.0,
) -> Allocation:
    """Spend `flops` on whole sequences: the budget is met from below, to within one sequence (and, where steps cost
    something themselves, one step).

    Where batch_tokens is None the batch grows with the tokens D of the run as 0.58 D^0.571 tokens (Step Law, Li et
    al., arXiv 2503.04715), so that short runs still take enough steps.

    Raises:
        ValueError: when the budget does not pay for one sequence; names the least that does.
    """

    def allocation(sequences: int) -> Allocation:
        tokens = 0.58 * (sequences * sequence_length) ** 0.571 if batch_tokens is None else batch_tokens
        batch = min(sequences, max(1, round(tokens / sequence_length)))
        return Allocation(sequences, -(-sequences // batch), sequence_length, flops_per_token, flops_per_step)

    per_sequence, affordable = flops_per_token * sequence_length, flops * (1 + 1e-12)
    sequences = int(affordable / per_sequence)
    if flops_per_step:  # the largest number whose steps are affordable too
        most = range(1, sequences + 1)
        sequences = bisect_right(most, affordable, key=lambda n: allocation(n).flops)
    if sequences < 1:
        raise ValueError(
            f"budget.flops={flops:.3g} does not pay for one step: a sequence of {sequence_length} tokens costs this "
            f"model {per_sequence + flops_per_step:.3g} FLOPs. Raise the budget to at least that, or take a "
            "smaller arch.width or data.sequence_length"
        )
    return allocation(sequences)
