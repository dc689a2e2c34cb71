"""Words between the processes that share a run; alone, a process is the first and only one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def number() -> int:
    """Returns how many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0 on. The first alone writes and prints."""
    return dist.get_rank() if number() > 1 else 0


@contextmanager
def group(device: torch.device, local_rank: int) -> Iterator[None]:
    """Joins the processes that a launcher has started, each with its device of this kind."""
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(found: T) -> T:
    """Returns what the first process has found, on all of them."""
    if number() == 1:
        return found
    box = [found]
    dist.broadcast_object_list(box)
    return box[0]


def from_all(found: T) -> list[T]:
    """Returns what each process has found, in their order, on all of them."""
    if number() == 1:
        return [found]
    boxes: list[T | None] = [None] * number()
    dist.all_gather_object(boxes, found)
    return boxes  # pyrefly: ignore[bad-return]


def summed(tensor: Tensor) -> Tensor:
    """Returns a tensor summed over the processes."""
    if number() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> Tensor:
    """Returns the largest of each number of a tensor over the processes."""
    if number() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gathered(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor that may be cut between the processes; all of them are to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
