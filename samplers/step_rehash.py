"""Step Rehash (Streamlined Inference, arXiv:2411.01171): whole steps reuse features where they change little."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from .cache import CACHES
from .cache_call import CacheHook
from .errors import InputError
from .mask import MaskPart, Table, is_block
from .part import Run
from .stack_mask import StackMaskHook
from .stacks import block_names

_LEVELS = ("down_blocks", "up_blocks")


@CACHES.register("step-rehash")
class StepRehash(MaskPart):
    """Computes a step in full once the features have changed enough since the last one, by what was measured.

    The paper gives no more than the idea, to skip steps whose features are like those of the step before, and its
    released code lacks it. Here the changes since the last computed step are added up, and a step computes when the
    sum would pass ``threshold``; or, with ``budget``, the threshold is the smallest at which no more than that many
    steps compute. The first step always does. In a step that does not, the blocks of a transformer together add to
    their streams what they added last, and the blocks of a U-Net beneath its first level give what they gave last; with
    an ``order`` the polynomial in the step's position through the last 2 or 3 computed values goes on from there.
    """

    type: Literal["step-rehash"] = "step-rehash"
    changes: tuple[Annotated[float, Field(ge=0)], ...] = Field(
        min_length=1,
        description="Relative change of the features from each timestep to the next, as measure_changes gives it.",
    )
    threshold: float | None = Field(default=None, ge=0, description="Largest sum of changes that is passed over.")
    budget: int | None = Field(default=None, ge=1, description="How many steps compute at most, in its place.")
    order: int = Field(default=0, ge=0, le=2, description="Degree of the forecast; 0 reuses the last value.")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.threshold is None) == (self.budget is None):
            raise ValueError("a step-rehash cache has a threshold or a budget, and not both")
        return self

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> StepRehash:
        """Half of the steps compute, as if all changed alike.

        Raises:
            InputError: when there is a single step, or the cache works on no network of the pipeline.
        """
        if steps < 2:
            raise InputError(f"a step-rehash cache takes at least 2 steps; got {steps}")
        part = cls(changes=(1.0,) * (steps - 1), budget=(steps + 1) // 2)
        part.modules(pipe)
        return part

    def table(self) -> Table:
        """Whether each step computes."""
        if self.threshold is not None:
            return _computed(self.changes, self.threshold)
        sums = {0.0} | {total for first in range(len(self.changes)) for total in accumulate(self.changes[first:])}
        tables = (_computed(self.changes, threshold) for threshold in sorted(sums))
        return next(table for table in tables if sum(computes for (computes,) in table) <= (self.budget or 1))

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """The blocks: of a transformer all, of a U-Net those beneath the first level.

        Raises:
            InputError: when the network has neither.
        """
        return rehashed(network)

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """The hook of one call."""
        computes = tuple(value for (value,) in self.table())
        stacked = frozenset(filter(keeps_change, modules))
        return StackMaskHook(self.type, modules, computes, run.scheduler, self.order, stacked)


def rehashed(network: nn.Module) -> tuple[str, ...]:
    """Names of the blocks whose work a step can leave out, so that a network still answers to its input.

    Raises:
        InputError: when the network is neither a transformer nor a U-Net, or a U-Net of one level.
    """
    down, up = (getattr(network, name, None) for name in _LEVELS)
    if not isinstance(down, nn.ModuleList) or not isinstance(up, nn.ModuleList):
        return block_names(network)
    inner = [f"down_blocks.{index}" for index in range(1, len(down))]
    inner += ["mid_block"] if isinstance(getattr(network, "mid_block", None), nn.Module) else []
    inner += [f"up_blocks.{index}" for index in range(len(up) - 1)]
    if not inner or any(isinstance(network.get_submodule(name), nn.ModuleList) for name in inner):
        raise InputError(f"{type(network).__name__} has no blocks beneath its first level that fewstep knows")
    return tuple(inner)


def keeps_change(name: str) -> bool:
    """Whether a block is one of a transformer, which adds to its streams; those of U-Nets change their shapes."""
    return is_block(name) and name.split(".")[-2] not in _LEVELS


def _computed(changes: tuple[float, ...], threshold: float) -> tuple[tuple[bool], ...]:
    """Whether each step computes, when those that are passed over add up to no more than ``threshold``."""
    table, passed = [(True,)], 0.0
    for change in changes:
        passed += change
        computes = passed > threshold
        table.append((computes,))
        passed = 0.0 if computes else passed
    return tuple(table)
