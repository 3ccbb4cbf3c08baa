"""Layers that steps leave out as an axis (arXiv:2309.10438), spelled layer by layer or as a list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from optuna.trial import BaseTrial

from ...samplers import CachePart, InputError, Plan
from ...samplers.cache import count_timesteps
from ...samplers.layer_skip import LayerSkip
from ...samplers.left_out import Layer
from ..space import AXES
from .steps import prepared, steps_of

SUBLAYERS: tuple[Layer, ...] = ("resnet", "attention", "cross-attention", "mlp")
"""What a plan without a layer skip is searched for: the layers of U-Nets and those within a transformer's blocks."""

_SPREAD = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class _Layers:
    """Layers that each step leaves out, of all networks of a pipeline that have as many.

    Attributes:
        steps: timesteps of the scheduler.
        width: layers of each step.
        targets: their kinds.
        most: share of the layers of all steps together that is left out at most, between 0 and 1; one layer at least.
        name: of the axis.
    """

    steps: int
    width: int
    targets: tuple[Layer, ...] = SUBLAYERS
    most: float = 0.1
    name: str = "layers"

    def __post_init__(self) -> None:
        if not 0 < self.most <= 1:
            raise InputError(f"the {self.name} axis leaves out a share of the layers, 0 < most <= 1; got {self.most}")

    @classmethod
    def of(cls, pipe: Any, base: Plan, *, most: float = 0.1) -> Self:
        """The axis of a plan: of the kinds of layers in its own layer skip, or else of all there are.

        Raises:
            InputError: when the plan has no grid, the pipeline's networks have no layers that can be left out, or
                another cache of the plan decides about them.
        """
        steps_of(cls.name, base)
        run = prepared(pipe, base)
        steps = count_timesteps(run)
        if steps is None:
            raise InputError(
                f"the {cls.name} axis cannot know how many timesteps {type(run.scheduler).__name__} has before the "
                "pipeline is called; choose a solver with one evaluation a step"
            )
        own, others = _split(base)
        every = LayerSkip(rows=("1",) * steps, targets=own.targets if own else SUBLAYERS)
        for cache in (*others, every):
            run.claim(cache.type, cache.modules(pipe))
        return cls(steps, every.width(pipe), every.targets, most)

    @property
    def budget(self) -> int:
        """How many layers are left out at most, of those of all steps together."""
        return max(1, int(self.most * self.steps * self.width + 1e-9))

    def plan(self, plan: Plan, layers: Iterable[int]) -> Plan:
        """The plan that leaves out some layers, and keeps its other caches.

        Args:
            plan: any plan.
            layers: step * width + layer of each; where they are more than may be, those are kept that come first in a
                fixed order, which is spread evenly over steps and layers.
        """
        kept = sorted(set(layers), key=lambda place: place * _SPREAD % 1)[: self.budget]
        marks = ["0" if place in kept else "1" for place in range(self.steps * self.width)]
        rows = tuple("".join(marks[step * self.width : (step + 1) * self.width]) for step in range(self.steps))
        part = (LayerSkip(rows=rows, targets=self.targets),) if kept else ()
        return plan.model_copy(update={"caches": (*_split(plan)[1], *part)})

    def left_out(self, plan: Plan) -> tuple[int, ...]:
        """The layers that a plan leaves out, as `plan` takes them, ascending.

        Raises:
            InputError: when its table is for other layers or steps, or leaves out more than may be.
        """
        part, _ = _split(plan)
        if part is None:
            return ()
        if part.targets != self.targets:
            raise InputError(
                f"the plan leaves out {', '.join(part.targets)} and the {self.name} axis {', '.join(self.targets)}"
            )
        rows = [row * self.width if len(row) == 1 else row for row in part.rows]
        if (len(rows), len(rows[0])) != (self.steps, self.width):
            raise InputError(
                f"the plan's layer skip is for {len(rows)} timesteps of {len(rows[0])} layers and the {self.name} axis "
                f"has {self.steps} of {self.width}"
            )
        found = tuple(place for place, mark in enumerate("".join(rows)) if mark == "0")
        if len(found) > self.budget:
            raise InputError(
                f"the plan leaves out {len(found)} layers and the {self.name} axis {self.budget} at most; raise most"
            )
        return found


@dataclass(frozen=True)
class LayersAxis(_Layers):
    """Whether each step leaves out each layer: a parameter ``layers.{step}.{layer}``, 1 where it does.

    There are many of them and few are 1, which suits evolution. Where more are than may be, a fixed order decides which
    of them count.
    """

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the layers left out that the trial suggests."""
        return self.plan(plan, [place for place, name in enumerate(self.names) if trial.suggest_int(name, 0, 1)])

    def params(self, plan: Plan) -> dict[str, Any]:
        """The parameters of the layers that a plan leaves out.

        Raises:
            InputError: when its table is for other layers or steps, or leaves out more than may be.
        """
        found = self.left_out(plan)
        return {name: int(place in found) for place, name in enumerate(self.names)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, step by step."""
        return tuple(f"{self.name}.{step}.{layer}" for step in range(self.steps) for layer in range(self.width))


@dataclass(frozen=True)
class LayerListAxis(_Layers):
    """The layers that are left out as a list of as many as may be: parameters ``layer-list.{place}``.

    Each is 0 for none, or the number of a layer of a step, counted from 1 and step by step, so that neighbours are near
    each other. Those that coincide count once. Ten times fewer parameters than layers where a tenth is left out, for
    samplers that learn each parameter by itself.
    """

    name: str = "layer-list"

    def suggest(self, trial: BaseTrial, plan: Plan) -> Plan:
        """The plan with the layers left out that the trial suggests."""
        chosen = [trial.suggest_int(name, 0, self.steps * self.width) for name in self.names]
        return self.plan(plan, [number - 1 for number in chosen if number])

    def params(self, plan: Plan) -> dict[str, Any]:
        """The list of the layers that a plan leaves out, none at its end.

        Raises:
            InputError: when its table is for other layers or steps, or leaves out more than may be.
        """
        found = [place + 1 for place in self.left_out(plan)]
        return dict(zip(self.names, found + [0] * (self.budget - len(found)), strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(f"{self.name}.{place}" for place in range(self.budget))


def _split(plan: Plan) -> tuple[LayerSkip | None, tuple[CachePart, ...]]:
    """The layer skip of a plan, and its other caches.

    Raises:
        InputError: when it has more than one.
    """
    own = [part for part in plan.caches if isinstance(part, LayerSkip)]
    if len(own) > 1:
        raise InputError(f"the plan has {len(own)} layer skips; join them in one to search it")
    caches = (part for part in plan.caches if isinstance(part, CachePart))
    return own[0] if own else None, tuple(part for part in caches if not isinstance(part, LayerSkip))


AXES.register("layers")(LayersAxis.of)
AXES.register("layer-list")(LayerListAxis.of)
