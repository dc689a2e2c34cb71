"""Experts of a model dealt out to processes, beside which all else is copied (DDP): `trainer.experts`."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from archs.channels.exchange import Exchange
from archs.channels.experts import ExpertLinear
from archs.channels.moe import MoE
from experiments.harness import processes


class DealtExperts:
    """The experts of a model, each on one of `over` consecutive processes, and on as many more as there are such sets.

    The model is cut in place when this is made, and whole again after `join`. In between, weights, gradients and the
    optimiser's state of an expert are where the expert is; a checkpoint has those of all.
    """

    def __init__(self, model: nn.Module, over: int, device: torch.device):
        self.model, self.over = model, over
        mesh = init_device_mesh(device.type, (processes.number() // over, over), mesh_dim_names=("copies", "experts"))
        self.group, self.copies = mesh.get_group("experts"), mesh.get_group("copies")
        self.rank, exchange = self.group.rank(), Exchange(self.group)
        for module in model.modules():
            if isinstance(module, MoE):
                module.exchange = exchange
        for layer, name, tensor in self._tensors():
            setattr(layer, name, nn.Parameter(self.own(tensor.detach()).clone(), tensor.requires_grad))

    def _tensors(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """The tensors that are dealt out, each with the layer and the name that it has there."""
        for layer in [module for module in self.model.modules() if isinstance(module, ExpertLinear)]:
            yield from ((layer, name, tensor) for name, tensor in [*layer.named_parameters(recurse=False)])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are dealt out."""
        return [tensor for _, _, tensor in self._tensors()]

    def own(self, tensor: Tensor) -> Tensor:
        """What stands here of a tensor of all experts."""
        return tensor.chunk(self.over)[self.rank]

    def whole(self, tensor: Tensor) -> Tensor:
        """The tensor of all experts, on the CPU."""
        boxes = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.over)]
        dist.all_gather(boxes, tensor.contiguous(), group=self.group)
        return torch.cat([box.cpu() for box in boxes])

    def leave_to_us(self, module: nn.Module) -> None:
        """Have DDP, which is to wrap this module, leave alone what is dealt out."""
        ours = {id(tensor) for tensor in self.parameters}
        names = [name for name, parameter in module.named_parameters() if id(parameter) in ours]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)

    def take_mean(self) -> None:
        """Make of gradients what DDP makes of all others, the mean over processes: here they are sums already over
        those that sent tokens."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.copies)
                parameter.grad /= processes.number()

    def clip(self, parameters: Iterable[nn.Parameter], most: float) -> Tensor:
        """Cut the gradients of all parameters down to a norm and return the one that they had, as `clip_grad_norm_`."""
        ours = {id(tensor) for tensor in self.parameters}
        learning = [parameter for parameter in parameters if parameter.grad is not None]
        here, everywhere = (
            get_total_norm([p.grad for p in learning if (id(p) in ours) == dealt and p.grad is not None])
            for dealt in (True, False)
        )
        squared = here.to(everywhere.device).square()
        dist.all_reduce(squared, group=self.group)
        norm = (squared + everywhere.square()).sqrt()
        clip_grads_with_norm_(learning, most, norm)
        return norm

    def join(self) -> None:
        """Make the model whole again, on the CPU what was dealt out, with no exchange."""
        for layer, name, tensor in self._tensors():
            setattr(layer, name, nn.Parameter(self.whole(tensor.detach()), tensor.requires_grad))
        for module in self.model.modules():
            if isinstance(module, MoE):
                module.exchange = None

    def gather(self, checkpoint: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put all experts into a checkpoint of this process; all processes are to do so."""
        self._change(checkpoint, module, optimizer, self.whole)

    def deal(self, checkpoint: dict[str, Any], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Leave in a checkpoint of all experts those of this process."""
        self._change(checkpoint, module, optimizer, lambda tensor: self.own(tensor).clone())

    def _change(
        self,
        checkpoint: dict[str, Any],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        change: Callable[[Tensor], Tensor],
    ) -> None:
        ours = {id(tensor) for tensor in self.parameters}
        weights = checkpoint["state_dict"]
        for name, parameter in module.named_parameters():
            if id(parameter) in ours:
                weights[name] = change(weights[name])
        states = checkpoint["optimizer_states"][0]["state"]
        for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if id(parameter) in ours and i in states:  # a new dictionary, for the optimiser's own has to stay
                states[i] = {name: change(x) if torch.is_tensor(x) and x.dim() else x for name, x in states[i].items()}
