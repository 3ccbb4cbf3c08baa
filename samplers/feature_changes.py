"""How much the features of a network change from step to step: what `step_rehash` is calibrated with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .attach import attach
from .cache import CachePart
from .cache_call import CacheHook, Passing
from .errors import InputError
from .mask import FeatureHook
from .part import Run
from .plan import Plan
from .step_rehash import keeps_change, rehashed


def measure_changes(pipe: Any, plan: Plan, arguments: Mapping[str, Any]) -> tuple[float, ...]:
    """Relative change of the features that a step-rehash cache reuses, from each timestep to the next.

    That is the mean of |F_i - F_(i-1)| over the mean of |F_(i-1)|, averaged over the modules; the largest of the
    branches of guidance, where the pipeline evaluates them in turn, and of its networks.

    Args:
        pipe: a pipeline with no plan attached; it is called once, and as it was afterwards.
        plan: how to sample; its caches do not run.
        arguments: of the call, for as many samples as are to be averaged over.

    Returns:
        One number less than the scheduler has timesteps, for `StepRehash`.

    Raises:
        InputError: when a step-rehash cache cannot work on the pipeline, or the call leaves out timesteps.
    """

    def run(watched: Plan) -> int:
        with attach(pipe, watched):
            pipe(**arguments)
            return len(pipe.scheduler.timesteps)

    return changes_in(run, plan)


def changes_in(run: Callable[[Plan], int], plan: Plan) -> tuple[float, ...]:
    """`measure_changes` in calls that somebody else makes.

    Args:
        run: samples by a plan, and returns the number of timesteps.
        plan: how to sample; its caches do not run.

    Returns:
        One number less than there are timesteps.

    Raises:
        InputError: as `measure_changes`.
    """
    watch = _Watch(found={})
    steps = run(plan.model_copy(update={"caches": (watch,)}))
    by_step: list[list[float]] = [[] for _ in range(steps - 1)]
    for (step, *_), changes in watch.found.items():
        by_step[step - 1].append(math.fsum(changes) / len(changes))
    missing = [step + 1 for step, changes in enumerate(by_step) if not changes]
    if missing:
        raise InputError(
            f"the call left step {missing[0]} of {steps} timesteps out; measure a call that starts from noise"
        )
    return tuple(max(changes) for changes in by_step)


class _Watch(CachePart):
    """Runs everything, and compares what each module gives with what it gave in the step before."""

    type: Literal["feature-changes"] = "feature-changes"
    found: Any

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        return rehashed(network)

    def computes(self, steps: int) -> None:
        return None

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        return _Watching(modules, self.found)


class _Watching(FeatureHook):
    """Adds the relative change of each module to ``found``, by step, network and branch."""

    def __init__(self, modules: Mapping[str, nn.Module], found: dict[tuple[int, str, int], list[float]]) -> None:
        super().__init__(modules, frozenset(filter(keeps_change, modules)))
        self.found = found

    def pass_module(self, passing: Passing) -> Any:
        """Runs the module, and compares."""
        evaluation = passing.evaluation
        place = self.place(passing)
        before = self.memory.recall(place, evaluation)
        output = passing.run()
        feature = self.feature(passing, output)
        if before is not None and before[0] == evaluation.index - 1:
            key = (evaluation.index, evaluation.component, evaluation.branch)
            self.found.setdefault(key, []).append(_change(before[1], feature))
        self.memory.keep(place, (evaluation.index, feature), evaluation)
        return output


def _change(before: Any, after: Any) -> float:
    """The mean of |after - before| over the mean of |before|; 1 where all of that was 0."""
    pairs = [
        (old.double(), new.double())
        for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True)
        if isinstance(old, Tensor)
    ]
    size = float(sum(old.abs().sum() for old, _ in pairs))
    moved = float(sum((new - old).abs().sum() for old, new in pairs))
    return moved / size if size else float(moved > 0)
