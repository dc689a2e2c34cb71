"""An operation as the choice of a backend, trials, tests and benchmarks see it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Operation:
    """A public function with what its trials need.

    Attributes:
        run: the public function; takes a `backend` and gives outputs, alone or in front of states.
        random_problem: tokens and sizes -> inputs of `run` by name, in float64 or of integers, on the CPU.
        kept: inputs that models keep in float32 where the others are in half precision.
        differentiable: whether there are gradients.
    """

    run: Callable[..., Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor, Tensor]]
    random_problem: Callable[..., dict[str, Tensor]]
    kept: frozenset[str]
    differentiable: bool = True

    @property
    def name(self) -> str:
        return self.run.__name__

    def on_backend(self, backend: str) -> Callable[..., Tensor]:
        """Return the outputs as a function of the inputs by name."""

        def outputs(**inputs: Tensor) -> Tensor:
            found = self.run(**inputs, backend=backend)
            return found if isinstance(found, Tensor) else found[0]

        return outputs

    def leaves(self, inputs: dict[str, Tensor], device: str, dtype: torch.dtype, gradients: bool) -> dict[str, Tensor]:
        """Return copies of the inputs on a device, in `dtype` or as models keep them, that ask for gradients or not;
        integers and fp8 stay as they are, without."""
        exact = torch.promote_types(dtype, torch.float32)
        moved = {}
        for name, x in inputs.items():
            cast = x.is_floating_point() and x.itemsize > 1
            wanted = (exact if name in self.kept else dtype) if cast else x.dtype
            moved[name] = x.to(device, wanted).detach().requires_grad_(gradients and cast)
        return moved
