"""Network evaluations of a running call, seen and changed without touching the network.

For the length of a call the denoiser, the blocks in it that a cache watches and the layers that weights are added to
get subclasses of their own classes whose ``__call__`` asks the call that runs in this context. Hooks, compiled forwards
and offloading of the module stay beneath it; another thread that uses the same network meanwhile runs it as it is.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import InputError

STATE_NAMES = ("hidden_states", "sample", "x")
TIME_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")


class Listener(Protocol):
    """What sees the calls of the modules that it names."""

    def listens_to(self, module: nn.Module) -> bool:
        """Whether calls of ``module`` are to be handed over."""

    def evaluate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs, changes or replaces one call."""


LISTENER: ContextVar[Listener | None] = ContextVar("fewstep_listener", default=None)
"The call that runs in this context, so that pipelines that share a network do not see each other."

Addition = Callable[[Tensor, Tensor], Tensor]
"""From the output of a layer and its input to the output with something added."""

Additions = Mapping[nn.Module, tuple[Addition, ...]]
"""What is added to the outputs of some layers, in this order."""

NOTHING: Additions = MappingProxyType({})

_ADDITIONS: ContextVar[Additions] = ContextVar("fewstep_additions", default=NOTHING)
"What the evaluation that runs in this context adds, so that pipelines that share a network have their own weights."

_LOCK = threading.Lock()
_USERS: dict[int, int] = {}
"How many running calls have swapped the class of a module, by its id."

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}
"Of each class of modules, the one that listens."

OWN_CLASS = "_fewstep_own_class"
"Attribute of classes that stand in for others as long as a module's weights are cut over processes: the other."

DENOISERS = ("unet", "transformer", "prior", "denoiser", "decoder_unet")


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that predict noise, by component name.

    Raises:
        InputError: when there is none.
    """
    found = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and (name in DENOISERS or name.startswith(("unet_", "transformer_")))
    }
    if not found:
        raise InputError(f"{type(pipe).__name__} has no denoiser that fewstep knows; looked for {', '.join(DENOISERS)}")
    return found


def _listening(base: type[nn.Module]) -> type[nn.Module]:
    if base in _CLASSES:
        return _CLASSES[base]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        listener = LISTENER.get()
        if listener is None or not listener.listens_to(self):
            return _run_own(base, self, args, kwargs)
        return listener.evaluate(self, args, kwargs)

    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    apart: Any = torch.compiler.disable  # a compiled caller would be compiled anew for each answer of a cache
    body["__call__"] = apart(call)
    _CLASSES[base] = type(base.__name__, (base,), body)
    return _CLASSES[base]


@contextmanager
def listening(modules: Iterable[nn.Module], listener: Listener) -> Iterator[None]:
    """Hands the calls of ``modules`` in this context to ``listener`` until the block ends."""
    modules = tuple(modules)
    with _LOCK:
        for module in modules:
            _USERS[id(module)] = _USERS.get(id(module), 0) + 1
            if _USERS[id(module)] == 1:
                module.__class__ = _listening(type(module))
    token = LISTENER.set(listener)
    try:
        yield
    finally:
        LISTENER.reset(token)
        with _LOCK:
            for module in modules:
                _USERS[id(module)] -= 1
                if not _USERS[id(module)]:
                    del _USERS[id(module)]
                    module.__class__ = type(module).__mro__[1]


def run_network(
    network: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    inside: Listener | None = None,
    additions: Additions = NOTHING,
) -> Any:
    """Runs ``network`` itself, whoever listens to it.

    Args:
        network: the network.
        args: positional arguments.
        kwargs: the others.
        inside: listens to the modules in it meanwhile.
        additions: what its layers add meanwhile.
    """
    token, added = LISTENER.set(inside), _ADDITIONS.set(additions)
    try:
        return network(*args, **kwargs)
    finally:
        _ADDITIONS.reset(added)
        LISTENER.reset(token)


def run_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs ``module`` itself past its listener, who goes on listening to the modules in it."""
    return _run_own(own_class(module), module, args, kwargs)


def _run_own(base: type[nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of a module of class ``base``, with what is added to its output, in the output's dtype."""
    output = base.__call__(module, *args, **kwargs)
    additions = _ADDITIONS.get().get(module)
    if additions is None:
        return output
    x, dtype = args[0] if args else next(iter(kwargs.values())), output.dtype
    for addition in additions:
        output = addition(output, x)
    return output.to(dtype)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whether it is listened to or cut, or neither."""
    swapped = type(module)
    base: type[nn.Module] = swapped.__mro__[1]
    heard = base if _CLASSES.get(base) is swapped else swapped
    own: type[nn.Module] = getattr(heard, OWN_CLASS, heard)
    return own


@dataclass(frozen=True)
class Evaluation:
    """One forward pass that a pipeline asks for.

    Attributes:
        component: the pipeline's name of the network, or the plan's of one that runs in its place.
        network: the network to run.
        inputs: arguments of its forward, by name.
        index: position of the step in the scheduler's timesteps.
        ordinal: 0 for the first evaluation of the step, 1 for the second.
        time: the step's timestep, in the scheduler's units.
        branch: which of the pipeline's branches of guidance this is, where it evaluates them in turn; 0 where it
            stacks them, or has one.
        kept: which rows of the pipeline's batch these are; None for all of them.
    """

    component: str
    network: nn.Module
    inputs: dict[str, Any]
    index: int
    ordinal: int
    time: float
    branch: int = 0
    kept: tuple[int, ...] | None = None

    @property
    def state_name(self) -> str:
        """Name of the argument that holds the noisy samples."""
        return _named(self.inputs, STATE_NAMES, self.network, "noisy samples")

    @property
    def time_name(self) -> str:
        """Name of the argument that holds the time."""
        return _named(self.inputs, TIME_NAMES, self.network, "time")

    @property
    def x(self) -> Tensor:
        """What the network is shown, (rows, ...): branches of guidance that are stacked count their rows each.

        Raises:
            InputError: when the network takes no tensor.
        """
        x = self.inputs[self.state_name]
        if not isinstance(x, Tensor):
            raise InputError(
                f"{type(self.network).__name__} takes its samples as {type(x).__name__}; this part needs a tensor"
            )
        return x

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return batch_rows(self.inputs)

    def with_inputs(self, **inputs: Any) -> Evaluation:
        """The same evaluation with some inputs replaced."""
        return replace(self, inputs=self.inputs | inputs)

    def at_times(self, times: Tensor) -> Evaluation:
        """The same evaluation, told other times.

        Args:
            times: (rows,) in the scheduler's units, fractions allowed.

        Raises:
            InputError: when the pipeline tells this network the time in a way that is not known.
        """
        if bool((times == self.time).all()):
            return self
        told = torch.as_tensor(self.inputs[self.time_name])
        if told.ndim > 1:
            raise InputError(
                f"{type(self.network).__name__} is told {tuple(told.shape)} times; this part needs one a row"
            )
        dtype = told.dtype if told.is_floating_point() else torch.float32
        unit = time_unit(self.time, float(told.reshape(-1)[0]), type(self.network).__name__)
        value = unit(times).to(self.x.device, dtype)
        return self.with_inputs(**{self.time_name: value})


def time_unit(time: float, told: float, network: str) -> Callable[[Tensor], Tensor]:
    """How a pipeline turns the scheduler's time into the number that it tells the network.

    As it is, divided by 1000 (Flux), or 1 minus that (Lumina, Z-Image).

    Raises:
        InputError: when ``told`` is none of them.
    """
    units: tuple[Callable[[Any], Any], ...] = (lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000)
    unit = min(units, key=lambda unit: abs(unit(time) - told))
    if abs(unit(time) - told) > 1e-2 * max(abs(told), 1e-2):
        raise InputError(f"{network} is told {told:g} at timestep {time:g}; fewstep does not know this unit of time")
    return unit


def named_inputs(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward pass by name, in the order of the signature."""
    inner: Any = getattr(network, "_orig_mod", network)
    cls: Any = type(inner)
    bound = _forward_signature(cls).bind(inner, *args, **kwargs)
    inputs = dict(bound.arguments)
    inputs.pop(next(iter(inputs)))
    inputs.update(inputs.pop("kwargs", {}))
    return inputs


@functools.lru_cache(maxsize=64)
def _forward_signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def _named(inputs: dict[str, Any], names: tuple[str, ...], network: nn.Module, what: str) -> str:
    for name in names:
        if name in inputs:
            return name
    raise InputError(f"{type(network).__name__} has no input for the {what} that fewstep knows; looked for {names}")


def batch_rows(inputs: dict[str, Any]) -> int:
    """Rows of the batch that a denoiser was called with: of its noisy samples, or else of its first argument."""
    first = next((inputs[name] for name in STATE_NAMES if name in inputs), None)
    if first is None:
        first = next(iter(inputs.values()), None)
    if isinstance(first, Tensor):
        return first.shape[0] if first.ndim else 1
    return len(first) if isinstance(first, list | tuple) else 1


def output_tensor(output: Any) -> Tensor:
    """The prediction in what a denoiser returned: a tensor, a tuple, or an output object with ``sample``.

    Raises:
        InputError: when it is none of them.
    """
    first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if not isinstance(first, Tensor):
        raise InputError(f"a denoiser returned {type(first).__name__}; this part needs a tensor")
    return first


def output_rows(output: Any) -> Tensor:
    """As `output_tensor`, and the rows stacked where a denoiser returns a list of them (Z-Image).

    Raises:
        InputError: when there is no tensor in the output.
    """
    first = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    if isinstance(first, list) and all(isinstance(row, Tensor) for row in first):
        return torch.stack(first)
    return output_tensor(output)


def with_output_tensor(output: Any, tensor: Tensor) -> Any:
    """``output`` with its prediction replaced."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    return type(output)(**(dict(output) | {"sample": tensor}))
