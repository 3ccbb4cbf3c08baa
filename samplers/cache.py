"""The caches: what is not computed again, step by step. What they do during a call is in `cache_call`."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self

from torch import nn

from .cache_call import CacheHook
from .errors import InputError
from .explicit import grid_adapter
from .network import denoisers
from .part import Part, Run
from .registry import Registry
from .wrapped import wrap_scheduler

CACHES: Registry[type[Part]] = Registry("cache type")


class CachePart(Part):
    """A cache: frozen data that says which modules of a network it may leave out, and when."""

    @abstractmethod
    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """Names of the modules of a network whose calls this cache decides about.

        Raises:
            InputError: when it cannot work on this network, and why.
        """

    @abstractmethod
    def computes(self, steps: int) -> tuple[bool, ...] | None:
        """Of each of the scheduler's timesteps, whether everything is computed; None where the data decide.

        Args:
            steps: how many timesteps there are.

        Raises:
            InputError: when the cache was made for another number.
        """

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> Self:
        """A setting of this cache that works on a pipeline, to begin with.

        Args:
            pipe: the pipeline.
            steps: number of timesteps.

        Raises:
            InputError: when it works on none of the pipeline's networks, or has no setting that needs no knowledge.
        """
        raise InputError("it has no setting that needs no knowledge of the network")

    @abstractmethod
    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """What the cache does in one call.

        Args:
            modules: what it reaches in the pipeline's networks: component, a dot, and the name in the network.
            run: what the attached pipeline does.
        """

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Finds the modules and adds the hook.

        Raises:
            InputError: when the cache works on no network of the pipeline, was made for another number of steps, or
                another cache has the same modules.
        """
        modules = self.modules(run.pipe)
        steps = count_timesteps(run)
        if steps is not None and all(self.computes(steps) or (False,)):
            run.warnings.append(f"the {self.type} cache computes all of {steps} steps: it saves nothing")
        run.claim(self.type, modules)
        run.caches.append(lambda: self.make(modules, run))

    def modules(self, pipe: Any) -> dict[str, nn.Module]:
        """The modules of a pipeline's networks that this cache decides about, by component, a dot, and name.

        Raises:
            InputError: when there are none in any network.
        """
        found: dict[str, nn.Module] = {}
        reasons = []
        for component, network in denoisers(pipe).items():
            try:
                names = self.reach(network)
            except InputError as error:
                reasons.append(str(error))
                continue
            found |= {f"{component}.{name}": network.get_submodule(name) for name in names}
        if not found:
            raise InputError(f"the {self.type} cache cannot work on {type(pipe).__name__}: {'; '.join(reasons)}")
        return found


def count_timesteps(run: Run) -> int | None:
    """How many timesteps the scheduler of a run will have: more than steps, where it evaluates twice in one.

    None where the plan has no grid, or the scheduler needs to know the resolution first.
    """
    steps = run.call_arguments.get("num_inference_steps")
    if steps is None:
        return None
    scheduler = copy.deepcopy(run.scheduler)
    if run.timesteps is not None:
        wrap_scheduler(scheduler, grid_adapter(scheduler, run.timesteps))
    try:
        scheduler.set_timesteps(steps)
    except (TypeError, ValueError):  # a shift by resolution is set by the pipeline's call
        return steps if scheduler.order == 1 else None
    return len(scheduler.timesteps)
