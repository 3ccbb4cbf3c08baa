"""diffusers' cache hooks, run around the modules of a network without being installed on it.

Diffusers installs its caches on the network itself: what an aborted call leaves there meets the next one, and every
thread that uses the network runs through them. Here its ``apply_*`` functions are handed an outline of the network
instead, objects of the same classes under the same names, and the hooks that they register there are run where the
running call hears the modules of the network itself. A call makes its own hooks, and what they keep dies with it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, StateManager
from diffusers.hooks.mag_cache import MagCacheState
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .cache_call import CacheHook, Passing
from .errors import InputError
from .network import Evaluation, batch_rows, own_class

Hooks = Mapping[str, tuple[Any, ...]]
"""Of each module that is hooked, by its name in the network, diffusers' hooks from the inmost to the outermost."""


@dataclass
class Clock:
    """What diffusers' ``current_timestep_callback`` reads: the time of the evaluation, in the scheduler's units."""

    time: float = math.nan

    def read(self) -> float:
        """The time now."""
        return self.time


def outline(network: nn.Module) -> nn.Module:
    """A tree of modules with the classes, names and attributes of a network's, to register hooks on."""
    return _outline(network, {})


def _outline(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    cls = own_class(module)
    copy: nn.Module = cls.__new__(cls)
    known[id(module)] = copy
    copy.__dict__.update({name: value for name, value in vars(module).items() if name not in ("forward", REGISTRY)})
    copy.__dict__["_modules"] = {name: child and _outline(child, known) for name, child in module._modules.items()}
    return copy


REGISTRY = "_diffusers_hook"
"Attribute of a module that holds diffusers' registry of its hooks."


def hooks_of(network: nn.Module) -> Hooks:
    """The hooks that are registered on the modules of a network that are called; lists of modules are not."""
    modules = [item for item in network.named_modules() if not isinstance(item[1], nn.ModuleList | nn.ModuleDict)]
    registries = {name: vars(module).get(REGISTRY) for name, module in modules}
    return {
        name: tuple(registry.hooks.values()) for name, registry in registries.items() if registry and registry.hooks
    }


@dataclass
class _Lane:
    """What is known of one branch of guidance: where it is, which rows it has, and the state of its hooks."""

    index: int
    rows: int
    kept: tuple[int, ...] | None
    active: bool = True
    states: dict[int, Any] = field(default_factory=dict)

    def leads_to(self, evaluation: Evaluation) -> bool:
        """Whether the evaluation follows the last one: of the same rows, with no step between."""
        return self.rows == evaluation.rows and self.kept == evaluation.kept and evaluation.index == self.index + 1


class Hosted:
    """The hooks of one network during one call, with a state for each branch of guidance."""

    def __init__(self, hooks: Hooks, clock: Clock) -> None:
        self.hooks = hooks
        self.clock = clock
        self.lanes: dict[int, _Lane] = {}
        every = [hook for several in hooks.values() for hook in several]
        attributes = [value for hook in every for value in vars(hook).values()]
        self._managers = list({id(item): item for item in attributes if isinstance(item, StateManager)}.values())
        self._with_state = [hook for hook in every if hasattr(hook, "state")]

    def enter(self, evaluation: Evaluation, steps: int, sigma: float | None) -> bool:
        """Gives the hooks the state of the evaluation's branch, and says where the call is.

        A branch starts anew where other rows come, or steps were left out: what is kept does not fit them.

        Returns:
            Whether it starts anew.

        Raises:
            InputError: when the branch was evaluated in this step already.
        """
        lane = self.lanes.get(evaluation.branch)
        if lane is not None and lane.index == evaluation.index:
            raise InputError(
                f"diffusers' caches count on one evaluation of a branch in a step; step {evaluation.index} has two: a "
                "pipeline of the same network that is called within this call needs a plan of its own (an empty one "
                "does), and a pipeline that evaluates several views or perturbations needs another cache"
            )
        fresh = lane is None or not lane.leads_to(evaluation)
        name = str(evaluation.branch)
        if lane is None or fresh:
            for manager in self._managers:
                manager._state_cache.pop(name, None)
            lane = self.lanes[evaluation.branch] = _Lane(evaluation.index, evaluation.rows, evaluation.kept)
        lane.index = evaluation.index
        self.clock.time = math.inf if fresh else evaluation.time  # no range of times to skip in has infinity in it
        context = CacheContext(name, evaluation.index, steps, evaluation.time, sigma)
        for manager in self._managers:
            manager.set_context(context)
            if manager._state_cls is MagCacheState:  # it counts its evaluations, and takes the count for the step
                manager.get_state().step_index = evaluation.index
        for hook in self._with_state:
            hook.state = lane.states.setdefault(id(hook), type(hook.state)())
        return fresh

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the hooks keep."""
        states = [state for lane in self.lanes.values() for state in lane.states.values()]
        states += [state for manager in self._managers for state in manager._state_cache.values()]
        for leaf in tree_leaves([vars(state) for state in states]):
            if isinstance(leaf, Tensor):
                yield leaf


class HostHook(CacheHook):
    """Runs diffusers' hooks during one call.

    Args:
        name: diffusers' configuration, for error messages.
        modules: what is hooked, by component, a dot, and name.
        networks: those of the pipeline that the hooks are for, by component.
        scheduler: the one that the call steps.
        install: from a network, a clock and the number of timesteps to its hooks.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        networks: Mapping[str, nn.Module],
        scheduler: Any,
        install: Callable[[nn.Module, Clock, int], Hooks],
    ) -> None:
        super().__init__(modules)
        self.name, self.networks, self.scheduler, self.install = name, networks, scheduler, install
        self._hosted: dict[str, Hosted] = {}
        self._running: Hosted | None = None

    def begins(self, evaluation: Evaluation, hosted: Hosted) -> bool:
        """Whether the host's cache works on the rows of a branch that starts anew.

        Raises:
            InputError: when it cannot work on what the pipeline evaluates.
        """
        return True

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Enters the context of the branch, and runs the hooks of the network as a whole."""
        if self.networks.get(evaluation.component) is not evaluation.network:
            return proceed(evaluation)
        steps = len(self.scheduler.timesteps)
        if evaluation.component not in self._hosted:
            clock = Clock()
            self._hosted[evaluation.component] = Hosted(self.install(evaluation.network, clock, steps), clock)
        hosted = self._hosted[evaluation.component]
        if hosted.enter(evaluation, steps, _sigma(self.scheduler, evaluation.index)):
            hosted.lanes[evaluation.branch].active = self.begins(evaluation, hosted)
        if not hosted.lanes[evaluation.branch].active:
            return proceed(evaluation)

        def below(*_: Any, **inputs: Any) -> Any:
            return proceed(_of_rows(evaluation.with_inputs(**inputs), evaluation))

        self._running = hosted
        try:
            return self._through(hosted, "", evaluation.network, below, (), evaluation.inputs)
        finally:
            self._running = None

    def pass_module(self, passing: Passing) -> Any:
        """Runs the hooks of one module, with copies of what they could write into and the caller holds."""
        if self._running is None:
            return passing.run()

        def below(*args: Any, **kwargs: Any) -> Any:
            return passing.run_with(args, kwargs, passing.evaluation.rows)

        name = passing.name.removeprefix(f"{passing.evaluation.component}.")
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in passing.kwargs.items()}
        return self._through(self._running, name, passing.module, below, passing.args, kwargs)

    def held_bytes(self) -> int:
        """Bytes that the hooks keep now; a storage that several tensors share counts once."""
        storages = [tensor.untyped_storage() for hosted in self._hosted.values() for tensor in hosted.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _through(
        self,
        hosted: Hosted,
        name: str,
        module: nn.Module,
        below: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a module through its hooks; an error of theirs, not of the module, says whose it is."""
        errors: list[Exception] = []

        def noticed(*args: Any, **kwargs: Any) -> Any:
            try:
                return below(*args, **kwargs)
            except Exception as error:
                errors.append(error)
                raise

        run: Callable[..., Any] = noticed
        for hook in hosted.hooks.get(name, ()):
            run = functools.partial(_run_hook, hook, module, run)
        try:
            return run(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if any(error is known for known in errors):
                raise
            first = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"diffusers' {self.name} fails at {name or 'the whole'}, a {type(module).__name__}, with "
                f"{type(error).__name__}: {first}; use another cache"
            ) from error


def _run_hook(hook: Any, module: nn.Module, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One of diffusers' hooks around a call of a module, as its registry runs it."""
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    if hasattr(hook, "new_forward"):
        hook.fn_ref.original_forward = below
        output = hook.new_forward(module, *args, **kwargs)
    else:
        output = below(*args, **kwargs)
    return hook.post_forward(module, output)


def _of_rows(changed: Evaluation, whole: Evaluation) -> Evaluation:
    """``changed``, which has the last rows of ``whole``, with the note which ones these are."""
    rows = batch_rows(changed.inputs)
    if rows == whole.rows:
        return changed
    kept = whole.kept if whole.kept is not None else tuple(range(whole.rows))
    return replace(changed, kept=kept[-rows:])


def _sigma(scheduler: Any, index: int) -> float | None:
    """The scheduler's noise level where the evaluation is; None for a scheduler that has no list of them."""
    sigmas = getattr(scheduler, "sigmas", None)
    return float(sigmas[index]) if sigmas is not None and index < len(sigmas) else None
