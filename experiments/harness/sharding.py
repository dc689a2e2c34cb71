"""A model that is cut between processes: FSDP2, block by block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from archs.language_model import LanguageModel
from experiments.harness import processes

# What objectives call of a model, beside its blocks, begins here; embedding, norm and head are the outermost group,
# which stays whole from the first of these calls until its gradients are taken.
ENTRANCES = "hidden", "extend"


def shard(model: LanguageModel, mesh: DeviceMesh, weights: Mapping[str, Tensor]) -> None:
    """Cut a model that is on the meta device between the processes of a mesh, and give it its weights.

    weights: those of the whole model, by name, on the first process; {} on the others, which are sent their parts.
    """
    for block in (*model.blocks, *model.ahead):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for name in ENTRANCES:
        register_fsdp_forward_method(model, name)
    model.to_empty(device=mesh.device_type)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(weights), options=options)


@contextmanager
def whole(*models: LanguageModel) -> Iterator[None]:
    """Lets every process run models by itself, without gradients: those that are cut have all their weights on each
    device meanwhile, so that none waits for the others' passes, and weights are sent once and not token by token."""
    parts = [module for model in models for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(not isinstance(part, LanguageModel), recurse=False)  # as `shard` has it


def leave_to_all(checkpoint: dict, states: list[dict]) -> list[dict]:
    """Has every process write its part of the tensors of these states, where the first writes what Lightning has of a
    checkpoint besides weights and optimisers; returns the states without them.

    states: dictionaries of tensors, in dictionaries, beside other things.
    """
    checkpoint["optimizer_states"] += [
        {name: child for name, child in state.items() if isinstance(child, dict)} for state in states
    ]
    return [{name: child for name, child in state.items() if not isinstance(child, dict)} for state in states]


def read_by_all(folder: Path, states: list[dict], like: Callable[[], dict]) -> list[dict]:
    """Returns the states that `leave_to_all` has taken apart, whole again, cut as the processes are now.

    like: makes dictionaries of tensors as they were in each, whose numbers are overwritten.
    """
    found = []
    for number, state in enumerate(states, start=1):  # 0 is the optimiser's
        tensors = like()
        dcp.load({f"optimizer_{number}": tensors}, checkpoint_id=folder)
        found.append(state | tensors)
    return found


def join(model: LanguageModel) -> None:
    """Give the first process the whole of a model that was cut, on its CPU, tensor by tensor; the others keep its
    shapes. It cannot be run by them together any more."""
    joined: dict[nn.Parameter, nn.Parameter] = {}  # a tied head is one with the embedding
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in joined:
                tensor = processes.gathered(parameter.detach())
                joined[parameter] = nn.Parameter(tensor.to("meta" if processes.rank() else "cpu"))
            setattr(module, name, joined[parameter])
