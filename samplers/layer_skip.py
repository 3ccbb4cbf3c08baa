"""Layers that are left out: at each step some are not computed at all, and nothing stands for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from .cache import CACHES
from .cache_call import CacheHook, Passing
from .left_out import Layer, StandIn, stand_ins
from .mask import RowsPart, check_steps, check_targets
from .network import Evaluation, denoisers
from .part import Run


@CACHES.register("layer-skip")
class LayerSkip(RowsPart):
    """Leaves a layer out where the table has a 0, after AutoDiffusion (arXiv:2309.10438).

    A layer that is left out changes nothing: its streams go on as they came. Nothing is kept from step to step, so the
    first step may leave out as many layers as any other, and a step may leave out all of them: what is before and after
    them still runs, and whether the result is any good is for a search to find.

    In transformers a layer is a whole ``block``, or an ``attention``, ``cross-attention`` or ``mlp`` in one, which
    then gives zeros, before any gate. As a rule nothing is added then. Where attention and MLP share one projection
    (the single blocks of Flux and HunyuanVideo) the MLP's part and the bias are still added, and where they are one
    module (Flux 2) it is an ``attention``. A whole block of HunyuanDiT drops what it would take from an earlier one.

    In U-Nets it is a ``resnet`` or an ``attention``, as in the paper. Of a resnet the change of size and of channels
    stays, as does the factor that its output is scaled by. Within a level an attention is one with all that is
    around it: norms, projections, cross-attention and MLP.

    The layers of a network are counted block after block, and within a block kind after kind in the order of
    ``targets``; kinds that a network has not are passed over. Both branches of guidance leave out the same. A layer
    within one that is left out is not asked. The count of rows that were skipped includes those of which only the
    shortcut ran.
    """

    type: Literal["layer-skip"] = "layer-skip"
    targets: tuple[Layer, ...] = Field(
        default=("block", "resnet"), min_length=1, description="Kinds of layers in the table."
    )

    @model_validator(mode="after")
    def _different(self) -> Self:
        check_targets("layer skip", self.targets)
        return self

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> LayerSkip:
        """Every second step, from the first on, leaves out the layer in the middle.

        Raises:
            InputError: when no network of the pipeline has layers that can be left out.
        """
        width = cls(rows=("1",) * steps).width(pipe)
        row = "".join("0" if index == width // 2 else "1" for index in range(width))
        return cls(rows=tuple("1" * width if index % 2 else row for index in range(steps)))

    def width(self, pipe: Any) -> int:
        """How many layers the first network of a pipeline has that this part can leave out.

        Raises:
            InputError: when none has any.
        """
        modules = self.modules(pipe)
        component = next(iter(modules)).partition(".")[0]
        return sum(name.startswith(f"{component}.") for name in modules)

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """The layers of the table.

        Raises:
            InputError: when the network has none that can be left out, or more or fewer than the table.
        """
        return self.check_modules(network, tuple(stand_ins(network, self.targets)))

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """What the part does in one call."""
        found = {
            f"{component}.{name}": stand_in
            for component, network in denoisers(run.pipe).items()
            if any(name.startswith(f"{component}.") for name in modules)
            for name, stand_in in stand_ins(network, self.targets).items()
        }
        return _Skip(self.type, modules, self.entries(modules), found, run.scheduler)


class _Skip(CacheHook):
    def __init__(
        self,
        part: str,
        modules: Mapping[str, nn.Module],
        computes: Mapping[str, tuple[bool, ...]],
        found: Mapping[str, StandIn],
        scheduler: Any,
    ) -> None:
        super().__init__(modules)
        self.part, self.computes, self.found, self.scheduler = part, computes, found, scheduler

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Checks the number of timesteps.

        Raises:
            InputError: when the scheduler has not as many as the table.
        """
        check_steps(self.part, len(next(iter(self.computes.values()))), len(self.scheduler.timesteps))
        return proceed(evaluation)

    def pass_module(self, passing: Passing) -> Any:
        """Runs a layer, or gives what stands for it."""
        if self.computes[passing.name][passing.evaluation.index]:
            return passing.run()
        return self.found[passing.name](passing.module, passing.args, passing.kwargs)
