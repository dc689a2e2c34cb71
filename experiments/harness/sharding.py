"""A model that is cut between processes: FSDP2, block by block."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from archs.language_model import LanguageModel

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
