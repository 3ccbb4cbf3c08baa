"""Who holds which weights in a distillation: student, teacher, target, fake, discriminator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

from ..samplers.errors import InputError, unknown_name
from .lora import Lora, LoraSetting, adapter_layers, adapter_parameters, add_adapter
from .role_kinds import Adapter, Base, Ema, Extra, FullCopy, Kind, checked_layers, lora_setting
from .shards import cpu_copy, join, own_part, shape_of


@dataclass(frozen=True)
class _Role:
    """A role at work: its network, the adapter that makes the network this role, and the weights that are its own."""

    kind: Kind
    network: nn.Module
    adapter: str | None
    parameters: dict[str, nn.Parameter]

    @property
    def trained(self) -> bool:
        return isinstance(self.kind, FullCopy | Adapter | Extra)

    def learn(self, on: bool = True) -> None:
        """Lets the parameters take gradients if the role is trained, or not."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(on and self.trained)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of this role alone, by name."""
        if self.adapter is not None:
            return dict(self.parameters)
        if isinstance(self.kind, Base):
            return {}
        state = self.network.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class _Use:
    """What a network is used as."""

    name: str
    frozen: bool


class Roles:
    """The networks of a distillation, by role.

    The base is frozen. Roles that are adapters on it share its weights, and ``use`` makes the base one of them for
    the length of a block. A loss reaches the parameters of the roles that were used to make it, whichever role is in
    use when it is backpropagated: switching never clears ``requires_grad`` of a trained role, and with
    ``enable_gradient_checkpointing`` each block is recomputed as the role it ran as.

    Args:
        base: a network without adapters; it is frozen, put in evaluation mode, and gets the adapters.
        kinds: what each role is, by name.

    Raises:
        InputError: for a base that carries adapters, a name that is no identifier, an average of a role that is not
            trained, or layers that cannot be adapted. Nothing has been changed then.
    """

    def __init__(self, base: nn.Module, kinds: Mapping[str, Kind]) -> None:
        layers = checked_layers(base, kinds)
        self._kinds = dict(kinds)
        self._base = base
        base.requires_grad_(False).eval()
        originals = {name: copy.deepcopy(base) for name, kind in kinds.items() if isinstance(kind, FullCopy)}
        self._roles: dict[str, _Role] = {}
        averages_last = sorted(kinds, key=lambda name: isinstance(kinds[name], Ema))
        for name in averages_last:
            kind = kinds[name]
            if name in layers:
                self._roles[name] = self._adapter(name, layers[name])
            elif isinstance(kind, Base):
                self._roles[name] = _Role(kind, base, None, {})
            elif isinstance(kind, Ema):
                self._roles[name] = _own(kind, copy.deepcopy(self._roles[kind.of].network).float())
            elif isinstance(kind, FullCopy):
                self._roles[name] = _own(kind, originals[name].float())
            elif isinstance(kind, Extra):
                self._roles[name] = _own(kind, kind.module)
        self._layers = adapter_layers(base)
        self._moody = {network: _moody_modules(network) for network in self._networks()}
        self._checkpointed = {
            network: tuple(module for module in network.modules() if hasattr(module, "gradient_checkpointing"))
            for network in self._moody
        }
        self._current: dict[nn.Module, _Use | None] = {}
        self._pairing: _Pairing | None = None
        for network in self._networks():
            self._apply(network.eval(), None)
        for name, role in self._roles.items():
            role.learn()
            if isinstance(role.kind, Ema):
                self.update_ema(name, 0.0)

    @property
    def kinds(self) -> dict[str, Kind]:
        """What each role is, by name."""
        return dict(self._kinds)

    def _adapter(self, name: str, layers: tuple[str, ...]) -> _Role:
        kind = self._kinds[name]
        add_adapter(self._base, name, self._setting(name), layers)
        return _Role(kind, self._base, name, adapter_parameters(self._base, name))

    def _setting(self, name: str) -> LoraSetting:
        kind = self._kinds[name]
        setting = lora_setting(self._kinds, kind)
        if setting is None:
            raise InputError(f"role {name!r} is no adapter: it is a {type(kind).__name__}, which has no LoRA")
        return setting

    def _networks(self) -> tuple[nn.Module, ...]:
        return tuple(dict.fromkeys([self._base, *(role.network for role in self._roles.values())]))

    def _role(self, name: str) -> _Role:
        if name not in self._roles:
            raise unknown_name("role", name, self._roles)
        return self._roles[name]

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the roles that have parameters to train."""
        return tuple(name for name in self._kinds if self._roles[name].trained)

    def trainable(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of a trained role by name, in float32 but for those that an ``Extra`` holds otherwise.

        Raises:
            InputError: when the role is unknown or not trained.
        """
        role = self._role(name)
        if not role.trained:
            kind = type(role.kind).__name__
            raise InputError(f"role {name!r} is not trained: it is a {kind}; trained are {', '.join(self.trained)}")
        return role.parameters

    @contextmanager
    def use(self, name: str, *, grad: bool = True, frozen: bool = False) -> Iterator[nn.Module]:
        """Makes a network the named role until the block ends, also when it ends in an exception.

        Blocks may be nested; the inner one's role is in use until it ends. Outside all blocks the base is bare.
        Dropout is on within the block for trained roles and their averages, and off for the base; networks that are
        not diffusers' are in training mode altogether.
        Losses are backpropagated after the block, or within it unless it freezes what they reach.

        Args:
            name: of the role.
            grad: whether operations in the block are recorded; where they are not already, they are not either way.
            frozen: whether the role's parameters take no gradients, and its dropout is off: a loss through it
                reaches only what made its input. Also the way to sample with the role, with ``grad`` off.

        Yields:
            The network.

        Raises:
            InputError: for an unknown role, or checkpointing that ``enable_gradient_checkpointing`` did not set up.
        """
        network = self._role(name).network
        self._refuse_foreign_checkpointing(network)
        with ExitStack() as stack:
            if self._pairing is not None:
                stack.enter_context(self._pairing.draws())
            if not grad:
                stack.enter_context(torch.no_grad())
            stack.enter_context(self._switched(network, _Use(name, frozen)))
            yield network

    @contextmanager
    def _switched(self, network: nn.Module, use: _Use | None) -> Iterator[None]:
        before = self._current.get(network)
        self._apply(network, use)
        try:
            yield
        finally:
            self._apply(network, before)

    def _apply(self, network: nn.Module, use: _Use | None) -> None:
        """Sets adapters, ``requires_grad`` and dropout of a network; ``None`` is how it rests.

        PEFT's own switches would walk through all modules, and clear ``requires_grad`` of the adapters they put away.
        """
        role = None if use is None else self._roles[use.name]
        if network is self._base:
            adapter = None if role is None else role.adapter
            for layer in self._layers:
                layer._active_adapter = [adapter] if adapter is not None else layer._active_adapter
                layer._disable_adapters = adapter is None
        before = self._current.get(network)
        if before is not None and before.frozen:
            self._roles[before.name].learn()
        if use is not None and use.frozen:
            self._roles[use.name].learn(False)
        for module in self._moody[network]:
            module.training = role is not None and use is not None and not use.frozen and role.kind != Base()
        self._current[network] = use

    @contextmanager
    def paired_noise(self) -> Iterator[None]:
        """All ``use`` blocks within draw the dropout of the first one, as consistency training needs it.

        Song et al. (arXiv:2303.01469) run student and target with the same dropout. What is drawn outside of these
        blocks is drawn as if there had been only the first.
        """
        outer, self._pairing = self._pairing, _Pairing(next(self._base.parameters()).device)
        try:
            yield
        finally:
            self._pairing = outer

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in all networks that diffusers can do it for.

        Each checkpointed block is recomputed as the role that it ran as, whichever is in use then.

        Raises:
            InputError: when the base cannot.
        """
        refuse_no_checkpointing(self._base)
        for network in self._networks():
            if getattr(network, "_supports_gradient_checkpointing", False):
                network.enable_gradient_checkpointing(_Checkpoint(self, network))  # type: ignore[operator]

    def _refuse_foreign_checkpointing(self, network: nn.Module) -> None:
        for module in self._checkpointed[network]:
            if module.gradient_checkpointing and not isinstance(module._gradient_checkpointing_func, _Checkpoint):
                raise InputError(
                    f"{type(network).__name__} checkpoints gradients and would recompute its blocks as the wrong role; "
                    "call roles.enable_gradient_checkpointing() instead"
                )

    @torch.no_grad()
    def update_ema(self, name: str, decay: float) -> None:
        """Moves an average: decay times itself plus 1 - decay times the role that it is of. Buffers are copied.

        Args:
            name: of a role that is an ``Ema``.
            decay: in [0, 1]; 0 copies.

        Raises:
            InputError: for another kind of role, or a decay out of its range.
        """
        role = self._role(name)
        if not isinstance(role.kind, Ema):
            raise InputError(f"role {name!r} is no moving average: it is a {type(role.kind).__name__}")
        if not 0 <= decay <= 1:
            raise InputError(f"the decay of a moving average lies in [0, 1]; got {decay:g}")
        source = self._roles[role.kind.of]
        live = [source.parameters[key].float() for key in role.parameters]
        torch._foreach_lerp_(list(role.parameters.values()), live, 1 - decay)
        tensors = source.tensors()
        for key, value in role.tensors().items():
            if key not in role.parameters:
                value.copy_(tensors[key])

    def lora(self, name: str) -> Lora:
        """The weights of a role that is an adapter, or the average of one; they stay tied to the training.

        Raises:
            InputError: when it is not.
        """
        role = self._role(name)
        setting = self._setting(name)
        return Lora(setting, {key: value.detach() for key, value in role.parameters.items()})

    def state(self) -> dict[str, Tensor]:
        """Copies of all weights that are not the base's, on the CPU, named ``ROLE/TENSOR``.

        All processes ask for it where networks are cut over them (`shards.cpu_copy`).
        """
        return {
            f"{name}/{key}": cpu_copy(value)
            for name in self._kinds
            for key, value in self._roles[name].tensors().items()
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts the weights of ``state`` back, in place, so that optimizers keep their parameters.

        Raises:
            InputError: when it holds other roles, tensors or shapes; nothing has been changed then.
        """
        own = {f"{name}/{key}": value for name in self._kinds for key, value in self._roles[name].tensors().items()}
        for key, value in own.items():
            if key not in state:
                raise InputError(f"the checkpoint has no {key}; resume with the roles and layers it was made with")
            if state[key].shape != shape_of(value):
                shapes = f"{tuple(state[key].shape)} in the checkpoint, {tuple(shape_of(value))} here"
                raise InputError(f"{key} is {shapes}; resume with the network and rank it was made with")
        for key in state:
            if key not in own:
                raise InputError(
                    f"the checkpoint has {key}, which no role holds; resume with the roles it was made with"
                )
        for key, value in own.items():
            value.copy_(own_part(state[key], value))

    def join(self, name: str) -> None:
        """Puts the network of a role together again that is cut over the processes: what is exported.

        All processes call it, and the main process has the network then, on the CPU; no role can be used any more.
        An adapter needs no network.
        """
        role = self._role(name)
        if role.adapter is None:
            join(role.network)

    def to(self, device: torch.device | str) -> Roles:
        """Moves all networks."""
        for network in self._networks():
            network.to(device)
        return self


def refuse_no_checkpointing(network: nn.Module) -> None:
    """Refuses a network that diffusers cannot checkpoint the gradients of.

    Raises:
        InputError: naming it.
    """
    if not getattr(network, "_supports_gradient_checkpointing", False):
        raise InputError(f"{type(network).__name__} has no gradient checkpointing; leave gradient_checkpointing off")


class _Checkpoint:
    """Checkpointing for one network of some roles: a block is recomputed as the role that it ran as."""

    def __init__(self, roles: Roles, network: nn.Module) -> None:
        self.roles = roles
        self.network = network

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        use = self.roles._current.get(self.network)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self.roles._switched(self.network, use)

        return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


class _Pairing:
    """The state of the random generators at the first draw, and all later draws from it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.states: tuple[Tensor, ...] | None = None

    def _read(self) -> tuple[Tensor, ...]:
        if self.device.type == "cpu":
            return (torch.get_rng_state(),)
        return (torch.get_rng_state(), torch.get_device_module(self.device).get_rng_state(self.device))

    def _write(self, states: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.get_device_module(self.device).set_rng_state(state, self.device)

    @contextmanager
    def draws(self) -> Iterator[None]:
        if self.states is None:
            self.states = self._read()
            yield
            return
        outside = self._read()
        self._write(self.states)
        try:
            yield
        finally:
            self._write(outside)


def _moody_modules(network: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that ``use`` puts in training mode: dropout, and all of a network that diffusers did not make.

    Networks do more than dropout in training mode: each block of a ``DiTTransformer2DModel`` then drops labels of its
    own choice.
    """
    modules = tuple(network.modules())
    if isinstance(network, ModelMixin):
        return tuple(module for module in modules if isinstance(module, _DropoutNd))
    return modules


def _own(kind: Kind, network: nn.Module) -> _Role:
    return _Role(kind, network, None, dict(network.named_parameters()))
