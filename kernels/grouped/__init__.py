"""The grouped product of a mixture of experts: rows sorted by expert, each through its expert's matrix.

Shape letters: N rows, D numbers of a row, E experts, F numbers of a row of the output.
"""

import torch
from torch import Tensor

from kernels.common.arguments import is_transformed
from kernels.common.dispatch import choose_backend, refuse_transforms
from kernels.common.operation import Operation
from kernels.grouped.operators import product
from kernels.grouped.problems import random_problem
from kernels.grouped.reference import grouped_matmul_reference
from kernels.grouped.segments import grouped_matmul_flops

__all__ = ["OPERATION", "grouped_matmul", "grouped_matmul_flops"]


def grouped_matmul(x: Tensor, weight: Tensor, counts: Tensor, *, backend: str = "auto") -> Tensor:
    """Return y [N, F], of which the first counts[0] rows are those of x times weight[0], the next counts[1] those times
    weight[1], and so on; with gradients for x and weight. Any load will do, also none.

    Nothing is filled up in memory, on a GPU nothing waits for the counts to come to the host ("triton"; "torch" where
    PyTorch's own `grouped_mm` serves: bfloat16, rows of whole 16 bytes), and sums are taken in one order, so two runs
    are equal bit for bit. Under autocast x and weight are brought to its dtype, as for any product of matrices.
    Transforms of torch.func and forward-mode derivatives run on the definition.

    Args:
        x: [N, D], rows sorted by expert.
        weight: [E, D, F]; contiguous, or so with its last two dimensions swapped (`linear.weight.mT`): either is read
            as it lies in memory, and its gradient laid out alike.
        counts: [E] int32 or int64, at least 0, of sum N, on the device of x. On a GPU the sum is not looked at: rows
            beyond it are zero, and what is beyond N is left out ("triton").
        backend: "auto" (see `choose_backend`), "torch" (a product per expert), "triton" (float32, bfloat16 and float16)
            or "reference".

    Raises:
        ValueError: for shapes that do not fit together, mixed dtypes or dtypes that are not of floating-point numbers,
            counts that are no integers or (on a CPU) do not sum to N, or a backend that does not exist or that cannot
            run here.
    """
    if x.dim() != 2 or weight.dim() != 3 or counts.shape != weight.shape[:1] or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "grouped_matmul takes x [N, D], weight [E, D, F] and counts [E]; got "
            f"x {list(x.shape)}, weight {list(weight.shape)}, counts {list(counts.shape)}"
        )
    device = "cpu" if x.is_meta else x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x, weight = (y.to(torch.get_autocast_dtype(device)) for y in (x, weight))
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(
            f"x of grouped_matmul is {x.dtype} and weight {weight.dtype}: both must be of one floating-point dtype"
        )
    if counts.dtype not in (torch.int32, torch.int64) or counts.device != x.device or weight.device != x.device:
        raise ValueError(
            f"counts of grouped_matmul must be int32 or int64, x, weight and counts on one device; counts are "
            f"{counts.dtype} on {counts.device}, x is on {x.device}, weight on {weight.device}"
        )
    if x.device.type == "cpu" and type(counts) is Tensor and not torch.compiler.is_compiling():
        _check_counts(counts, len(x))
    sizes = {"experts": 4, "width": x.shape[1], "outputs": weight.shape[2]}
    chosen = choose_backend(OPERATION, backend, ["reference", "torch", "triton"], "torch", x, **sizes)
    if chosen == "reference" or is_transformed(x, weight):
        refuse_transforms("grouped_matmul", backend, x, weight)
        return grouped_matmul_reference(x, weight, counts)
    return product(x, weight, counts, chosen)


def _check_counts(counts: Tensor, rows: int) -> None:
    numbers = counts.tolist()
    if sum(numbers) != rows or min(numbers, default=0) < 0:
        raise ValueError(f"counts must be at least 0 and sum to the {rows} rows of x; they are {numbers}")


OPERATION = Operation(grouped_matmul, random_problem, frozenset())
