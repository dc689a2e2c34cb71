"""Spikes of the gradient, and steps that are left out because of them (`+trainer.skip_spikes=...`)."""

from collections import deque
from statistics import median

REMEMBERED = 128  # norms
LEAST = 32  # of them, before which none is a spike
MOST_IN_A_ROW = 16  # after which the norm has risen for good


class Spikes:
    """Tells norms that are so many times the median of those before them, and remembers the steps that had one.

    A run of spikes ends by itself: after 16 of them the norms begin anew. (PaLM, arXiv 2204.02311, section 5.1, goes
    back and leaves out the batches around a spike; OLMo 2, 2501.00656, its step alone, by its distance from the mean.)

    Attributes:
        steps: those that were left out.
    """

    def __init__(self, factor: float):
        self.factor, self.steps, self.in_a_row = factor, [], 0
        self.norms: deque[float] = deque(maxlen=REMEMBERED)

    def at(self, step: int, norm: float) -> bool:
        """Return whether the norm of this step's gradient is a spike."""
        if len(self.norms) >= LEAST and not norm <= self.factor * median(self.norms):
            self.in_a_row += 1
            self.steps.append(step)
            if self.in_a_row == MOST_IN_A_ROW:
                self.norms.clear()
            return True
        self.in_a_row = 0
        self.norms.append(norm)
        return False

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {"norms": list(self.norms), "steps": self.steps, "in_a_row": self.in_a_row}

    def load(self, state: dict) -> None:
        """Take up what a checkpoint has kept."""
        self.norms.extend(state["norms"])
        self.steps, self.in_a_row = state["steps"], state["in_a_row"]
