"""The settings of each cache from the mildest to the boldest, for its calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..samplers import CachePart, InputError, Plan
from ..samplers.block_mask import BlockMask
from ..samplers.cross_attention_freeze import CrossAttentionFreeze
from ..samplers.gate import Gate
from ..samplers.host_cache import HostCache
from ..samplers.mask import Target
from ..samplers.step_rehash import StepRehash
from ..samplers.unet_deep import UNetDeep
from .cache import LADDERS
from .cache_costs import Costs, Sample, cheapest_steps, measure_factors, measure_moves, worthwhile_steps

__all__ = ["LADDERS"]

THRESHOLDS = tuple(0.005 * 1.25**rung for rung in range(31))
"Thresholds of gates, 0.005 to 4."

MASK_RUNGS = 48


@LADDERS.register("gate")
def gate_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Thresholds of a first-block gate."""
    return tuple(Gate(threshold=threshold) for threshold in THRESHOLDS)


@LADDERS.register("host")
def host_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Thresholds of diffusers' first-block cache."""
    return tuple(
        HostCache(config="FirstBlockCacheConfig", options={"threshold": threshold}) for threshold in THRESHOLDS
    )


@LADDERS.register("cross-attention-freeze")
def freeze_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """From all steps but the last down to the first."""
    return tuple(CrossAttentionFreeze(after=after) for after in range(steps - 1, 0, -1))


@LADDERS.register("step-rehash")
def rehash_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Whole steps of a transformer or a U-Net, chosen by dynamic programming over measured costs.

    The changes of the part are put so that the chosen steps compute, and no others.
    """

    def of(chosen: Sequence[int]) -> StepRehash:
        return StepRehash(changes=tuple(float(step in chosen) for step in range(1, steps)), threshold=0.5)

    part = of(range(steps))
    moved = measure_moves(plan, part, lambda name: True, sample)
    single = [of([step for step in range(steps) if step != skip]) for skip in range(steps)]
    costs = Costs.from_measured(moved, measure_factors(plan, lambda step: single[step], moved, steps, sample))
    together = Costs({"all": _summed(costs)})
    found = cheapest_steps(together, "all", steps)
    return tuple(of(found[count]) for count in sorted(found, reverse=True) if count < steps)


@LADDERS.register("unet-deep")
def deep_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Fewer and fewer steps that run the whole U-Net, chosen by dynamic programming over measured costs."""
    whole = UNetDeep(steps=tuple(range(steps)))
    names = list(whole.modules(pipe))
    moved = measure_moves(plan, whole, lambda name: name == names[-1], sample)

    def single(step: int) -> CachePart:
        return UNetDeep(steps=tuple(other for other in range(steps) if other != step))

    costs = Costs.from_measured(moved, measure_factors(plan, single, moved, steps, sample))
    found = cheapest_steps(costs, names[-1], steps)
    return tuple(UNetDeep(steps=found[count]) for count in sorted(found, reverse=True) if count < steps)


@LADDERS.register("block-mask")
def mask_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Tables of attentions and MLPs: for a rising price of parameters, the cheapest choice of steps for each module."""
    targets: tuple[Target, ...] = ("attention", "cross-attention", "mlp")
    part = BlockMask(rows=("1",) * steps, targets=targets)
    modules = part.modules(pipe)
    if len({name.partition(".")[0] for name in modules}) > 1:
        raise InputError("a block mask is calibrated for pipelines of one network; use the gate")
    moved = measure_moves(plan, part, lambda name: True, sample)

    def single(step: int) -> CachePart:
        return BlockMask(rows=tuple("0" if index == step else "1" for index in range(steps)), targets=targets)

    costs = Costs.from_measured(moved, measure_factors(plan, single, moved, steps, sample))
    sizes = {name: _size(module) for name, module in modules.items()}
    rungs: list[BlockMask] = []
    for price in _prices(costs, sizes):
        chosen = {name: worthwhile_steps(costs, name, steps, price * sizes[name]) for name in modules}
        rows = tuple("".join("01"[step in chosen[name]] for name in modules) for step in range(steps))
        if not rungs or rungs[-1].rows != rows:
            rungs.append(BlockMask(rows=rows, targets=targets))
    return tuple(rung for rung in rungs if any("0" in row for row in rung.rows))


def _size(module: nn.Module) -> int:
    return max(1, sum(parameter.numel() for parameter in module.parameters()))


def _prices(costs: Costs, sizes: dict[str, int]) -> list[float]:
    """Prices of a parameter, geometric, over the range of what the reuse of one costs in the next step."""
    single = [
        gaps[1] / sizes[name] for name, steps in costs.of.items() for gaps in steps.values() if gaps.get(1, 0.0) > 0
    ]
    low, high = math.log(min(single)), math.log(max(single) * 30)
    return [math.exp(low + (high - low) * rung / (MASK_RUNGS - 1)) for rung in range(MASK_RUNGS)]


def _summed(costs: Costs) -> dict[int, dict[int, float]]:
    """The costs of all modules together, where all were measured."""
    tables = list(costs.of.values())
    steps = set.intersection(*(set(table) for table in tables))
    return {
        step: {
            gap: sum(table[step][gap] for table in tables) for gap in set.intersection(*(set(t[step]) for t in tables))
        }
        for step in steps
    }
