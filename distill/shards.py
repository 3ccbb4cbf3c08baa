"""Networks that are cut over the processes: each holds its share of every large parameter, whatever role it is of.

With them gradients, moments and averages are cut too, as in the third stage of ZeRO (arXiv:1910.02054). A module that
asks for its parameter gets the whole tensor, gathered there and then, and its gradient comes back reduced: parameters
become properties of their modules, as in SimpleFSDP (arXiv:2411.00284). The loop backpropagates into the parameters of
one role at a time, and roles share networks and forward passes; wrappers of whole networks that count on one forward
and one backward pass in turn do not fit that.

What autograd keeps for the backward pass are gathered weights. Gradient checkpointing drops them, and recomputes a
block from weights that are gathered anew: with it, about one block is whole at a time. A network that is to be cut has
been loaded whole, in the precision of the frozen weights; copies for roles are made of shares.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from ..samplers.errors import InputError
from ..samplers.network import OWN_CLASS, own_class

LEAST = 2**14
"Elements of the smallest parameter that is cut; smaller ones would cost more time than they free memory."


class Sharing:
    """The processes that share networks; all of them call its methods in the same order.

    Args:
        device: of the networks.
        count: of processes.
        index: of this one.
    """

    def __init__(self, device: torch.device, count: int, index: int) -> None:
        self.device, self.count, self.index = device, count, index
        self._made = 0
        self._history = 0

    def number(self) -> int:
        """A number for a share, the same in all processes."""
        self._made += 1
        return self._made

    def part(self, whole: Tensor) -> Tensor:
        """This process's part (k,) of a tensor: one of ``count`` equal ones, with zeros where the tensor has ended."""
        size = -(-whole.numel() // self.count)
        own = whole.detach().reshape(-1)[self.index * size : (self.index + 1) * size]
        part = own.new_zeros(size)
        part[: len(own)] = own
        return part

    def joined(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The tensor of which each process gives its `part`."""
        flat = part.new_empty(self.count * len(part))
        distributed.all_gather_into_tensor(flat, part.detach())
        return flat[: shape.numel()].view(shape)

    def mean_part(self, whole: Tensor) -> Tensor:
        """This process's `part` of the mean of all processes' tensors."""
        size = -(-whole.numel() // self.count)
        flat = nn.functional.pad(whole.reshape(-1), (0, self.count * size - whole.numel()))
        part = flat.new_empty(size)
        distributed.reduce_scatter_tensor(part, flat)
        return part / self.count

    def sum(self, value: Tensor) -> Tensor:
        """The sum of all processes' tensors."""
        total = value.clone()
        distributed.all_reduce(total)
        return total

    def everywhere(self, holds: bool) -> bool:
        """Whether something holds in all processes."""
        return self.sum(torch.tensor(float(holds), device=self.device)).item() == self.count

    def note(self, number: int) -> None:
        """Remembers that a share was asked for."""
        self._history = hash((self._history, number)) & (2**62 - 1)

    def refuse_disorder(self) -> None:
        """Compares which weights the processes have asked for, and in which order.

        Raises:
            InputError: when they differ: what was gathered then was put together from different weights.
        """
        mine = torch.tensor([self._history], device=self.device)
        all_ = mine.new_empty(self.count)
        distributed.all_gather_into_tensor(all_, mine)
        if len(set(all_.tolist())) > 1:
            raise InputError(
                "the processes asked for different weights, so the network decides by its input which it uses; "
                "leave --shard_networks out"
            )


class Share(nn.Parameter):
    """This process's part of a parameter, (k,): what optimisers, averages and checkpoints of the role see.

    Attributes:
        whole: shape of the parameter.
        sharing: who has the other parts.
        number: that it is known by in all processes.
    """

    whole: torch.Size
    sharing: Sharing
    number: int

    def __new__(cls, part: Tensor, whole: torch.Size, sharing: Sharing, requires_grad: bool = True) -> Share:
        """Wraps a `Sharing.part`."""
        share = super().__new__(cls, part, requires_grad)
        share.whole, share.sharing, share.number = whole, sharing, sharing.number()
        return share

    def __deepcopy__(self, memo: dict[int, Any]) -> Share:
        """A share of its own, with a number of its own."""
        if id(self) not in memo:
            memo[id(self)] = Share(self.detach().clone(), self.whole, self.sharing, self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    """The whole of a share; its gradient is this process's part of the mean over the processes."""

    @staticmethod
    def forward(ctx: Any, share: Share) -> Tensor:
        ctx.share = share
        share.sharing.note(share.number)
        return share.sharing.joined(share, share.whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        share: Share = ctx.share
        share.sharing.note(-share.number)
        return share.sharing.mean_part(gradient)


def cut(networks: Iterable[nn.Module], sharing: Sharing) -> None:
    """Cuts the parameters of networks over the processes, which hold the same; what they share stays shared.

    Parameters of less than `LEAST` elements stay whole in all processes.

    Args:
        networks: not copied yet for roles; copies of them hold shares of their own.
        sharing: the processes.

    Raises:
        InputError: for a network that uses some of its weights for some inputs only; nothing has been cut then.
    """
    modules = list(dict.fromkeys(module for network in networks for module in network.modules()))
    for module in modules:
        if isinstance(getattr(module, "experts", None), nn.ModuleList):
            raise InputError(
                f"{own_class(module).__name__} asks experts that its input decides, in each process others; "
                "leave --shard_networks out"
            )
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        large = {name: each for name, each in module._parameters.items() if each is not None and each.numel() >= LEAST}
        for name, whole in large.items():
            places.setdefault(whole, []).append((module, name))
        if large:
            module.__class__ = _gathering(type(module), tuple(large))
    while places:
        whole, users = places.popitem()
        share = Share(sharing.part(whole), whole.shape, sharing, whole.requires_grad)
        for module, name in users:
            module._parameters[name] = share
    if sharing.device.type != "cpu":
        torch.get_device_module(sharing.device).empty_cache()


def join(network: nn.Module) -> None:
    """Puts a network together again, on the CPU of the main process; the others keep their shares."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, Share):
                whole = cpu_copy(parameter)
                if parameter.sharing.index == 0:
                    module._parameters[name] = nn.Parameter(whole, requires_grad=False)
                    module.__class__ = own_class(module)


def cpu_copy(tensor: Tensor, of: Tensor | None = None) -> Tensor:
    """A copy of a tensor on the CPU, whole.

    Args:
        tensor: a parameter or buffer, or with ``of`` something that was made for a parameter, such as moments.
        of: the parameter. Whether it is cut decides whether ``tensor`` is.

    Returns:
        What was cut is on the ``meta`` device but in the main process: all take part, and one has the values.
    """
    of = tensor if of is None else of
    if not isinstance(of, Share) or tensor.shape != of.shape:
        return tensor.detach().to("cpu", copy=True).contiguous()
    if of.sharing.index == 0:
        return of.sharing.joined(tensor, of.whole).to("cpu", copy=True)
    of.sharing.joined(tensor, of.whole)
    return torch.empty(of.whole, dtype=tensor.dtype, device="meta")


def own_part(whole: Tensor, of: Tensor) -> Tensor:
    """What this process holds of a tensor that was made for a parameter: its part, or all of it."""
    return of.sharing.part(whole) if isinstance(of, Share) and whole.shape == of.whole else whole


def shape_of(tensor: Tensor) -> torch.Size:
    """Shape of a parameter over all processes."""
    return tensor.whole if isinstance(tensor, Share) else tensor.shape


def size_of(parameters: Iterable[Tensor]) -> int:
    """Elements of parameters over all processes."""
    return sum(shape_of(parameter).numel() for parameter in parameters)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
"Of each class of modules and some of its parameters, the one that gathers them."


def _gathering(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    if (base, names) not in _CLASSES:
        body: dict[str, Any] = {name: _property(name) for name in names}
        body |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        body[OWN_CLASS] = base
        _CLASSES[base, names] = type(base.__name__, (base,), body)
    return _CLASSES[base, names]


def _property(name: str) -> property:
    def gathered(self: nn.Module) -> Any:
        if name not in self._parameters:
            raise AttributeError(name)
        parameter = self._parameters[name]
        return _Gathered.apply(parameter) if isinstance(parameter, Share) else parameter

    return property(gathered)
