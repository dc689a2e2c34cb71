"""From a budget in FLOPs to tokens, steps and batches."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Allocation:
    """How a run spends its budget: flops = flops_per_token * tokens, tokens = sequences * sequence_length."""

    sequences: int
    steps: int
    sequence_length: int
    flops_per_token: float

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length

    @property
    def flops(self) -> float:
        return self.flops_per_token * self.tokens

    def first_sequence(self, step: int) -> int:
        """Number of the first sequence of a step; steps differ by one sequence at most."""
        return step * self.sequences // self.steps


def allocate(flops: float, flops_per_token: float, sequence_length: int, batch_tokens: int | None = None) -> Allocation:
    """Spend `flops` on whole sequences: the budget is met from below, to within one sequence.

    Where batch_tokens is None the batch grows with the tokens D of the run as 0.58 D^0.571 tokens (Step Law, Li et
    al., arXiv 2503.04715), so that short runs still take enough steps.

    Raises:
        ValueError: when the budget does not pay for one sequence; names the least that does.
    """
    sequences = int(flops / (flops_per_token * sequence_length) * (1 + 1e-12))
    if sequences < 1:
        raise ValueError(
            f"budget.flops={flops:.3g} does not pay for one step: a sequence of {sequence_length} tokens costs this "
            f"model {flops_per_token * sequence_length:.3g} FLOPs. Raise the budget to at least that, or take a "
            "smaller arch.width or data.sequence_length"
        )
    tokens = sequences * sequence_length
    batch_tokens = 0.58 * tokens**0.571 if batch_tokens is None else batch_tokens
    batch = min(sequences, max(1, round(batch_tokens / sequence_length)))
    return Allocation(sequences, -(-sequences // batch), sequence_length, flops_per_token)
