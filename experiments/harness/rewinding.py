"""Spikes of the loss, and the earlier states that a run goes back to because of them (`+trainer.rewind_spikes=...`)."""

from collections import deque
from statistics import median
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

REMEMBERED = 128  # losses
LEAST = 32  # of them, before which none is a spike
LASTING = 4  # steps in a row that are to have one
EVERY = 50  # steps a state is kept
MOST = 3  # times that one state is gone back to, after which the loss has risen for good
TO_DEVIATION = 1.4826  # of a normal distribution, from the median distance from its median


class Rewinding:
    """Tells losses that stay far above those before them, and then puts weights and optimiser back to what they were
    some 50 to 100 steps before.

    Steps are not taken back: the schedule goes on, and so do the data, so that the batches from the state's step to the
    spike are left out, and a run costs what was planned, the steps that it has lost among them. So did PaLM (arXiv
    2204.02311, section 5.1), which went back some 100 steps and left out 200 to 500 batches, by hand. A spike is one as
    OLMo's trainer tells one, by standard deviations from the last 128 losses (6 there), but from their median, which a
    spike does not move, and only where 4 steps in a row have one: a single bad batch is left to `skip_spikes`.

    A run of them ends by itself: after one state was gone back to three times, or where there is none yet, losses and
    states begin anew. A loss that is not finite ends the run, as it does without this.

    Two states lie in the memory of the host and in every checkpoint: 24 bytes per parameter under AdamW, on each
    process those of its part where the model is cut.

    Attributes:
        undone: first and last of the steps that were undone, each time; they may lie over those of a time before.
    """

    def __init__(self, deviations: float):
        self.deviations, self.undone, self.in_a_row = deviations, [], 0
        self.losses: deque[float] = deque(maxlen=REMEMBERED)
        self.states: list[dict[str, Any]] = []  # the older one first

    def after(self, step: int, loss: float, model: nn.Module, optimizer: Optimizer) -> None:
        """Take note of a step and its loss, and keep what it led to or go back."""
        if self._high(loss):
            self.in_a_row += 1
            if self.in_a_row == LASTING:
                self._go_back(step, model, optimizer)
            return
        self.in_a_row = 0
        self.losses.append(loss)
        if (step + 1) % EVERY == 0:
            self.states = [*self.states[-1:], state_of(model, optimizer) | {"steps": step + 1}]

    def _high(self, loss: float) -> bool:
        if len(self.losses) < LEAST:
            return False
        middle = median(self.losses)
        deviation = TO_DEVIATION * median(abs(other - middle) for other in self.losses)
        return not loss <= middle + self.deviations * deviation

    def _go_back(self, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        self.in_a_row = 0
        if not self.states or [first for first, _ in self.undone].count(self.states[0]["steps"]) == MOST:
            self.losses.clear()
            self.states = []
            return
        self.states = self.states[:1]
        model.load_state_dict(self.states[0]["weights"])
        # The rates are those of the schedule, which goes on. A copy, since the optimiser takes tensors as they are.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": copied(self.states[0]["moments"]), "param_groups": groups})
        self.undone.append([self.states[0]["steps"], step])

    def state(self) -> dict:
        """Return what a checkpoint keeps."""
        return {**vars(self), "losses": list(self.losses)}

    def load(self, state: dict) -> None:
        """Take up what a checkpoint has kept."""
        vars(self).update(state | {"losses": deque(state["losses"], maxlen=REMEMBERED)})


def state_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return copies of what a run goes back to, in the memory of the host."""
    return copied({"weights": model.state_dict(), "moments": optimizer.state_dict()["state"]})


def copied(node: Any) -> Any:
    """Return a copy, in the memory of the host, of the tensors in a dictionary of dictionaries."""
    if isinstance(node, dict):
        return {name: copied(child) for name, child in node.items()}
    return node.detach().to("cpu", copy=True) if isinstance(node, Tensor) else node
