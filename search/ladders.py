"""The settings of each cache from the mildest to the boldest, for its calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..samplers import CachePart, InputError, Plan
from ..samplers.block_mask import BlockMask
from ..samplers.cross_attention_freeze import CrossAttentionFreeze
from ..samplers.feature_changes import changes_in
from ..samplers.gate import Gate
from ..samplers.host_cache import HostCache
from ..samplers.mask import Target
from ..samplers.step_rehash import StepRehash
from ..samplers.unet_deep import UNetDeep
from .cache import LADDERS
from .cache_costs import Costs, Products, Sample, every_one, measure_factors, measure_products
from .rungs import ORDERS, Make, Tries, ladder_of
from .step_choice import worthwhile_steps

__all__ = ["LADDERS"]

THRESHOLDS = tuple(0.005 * 1.25**rung for rung in range(31))
"Thresholds of gates, 0.005 to 4."

MASK_RUNGS = 8
"Prices of a parameter for which steps are chosen module by module."


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
    """Whole steps of a transformer or a U-Net, and the order of the forecast.

    The changes of the part are put so that the chosen steps compute, and no others.
    """

    def make(chosen: Sequence[int], order: int) -> StepRehash:
        changes = tuple(float(step in chosen) for step in range(1, steps))
        return StepRehash(changes=changes, threshold=0.5, order=order)

    products = measure_products(plan, make(range(steps), 0), lambda name: True, steps, sample)
    tries, costs = _measured(pipe, plan, make, products, steps, sample)
    return ladder_of(tries.whole_steps(make, costs))


@LADDERS.register("unet-deep")
def deep_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Fewer and fewer steps that run the whole U-Net, and the order of the forecast."""

    def make(chosen: Sequence[int], order: int) -> UNetDeep:
        return UNetDeep(steps=tuple(chosen), order=order)

    whole = make(range(steps), 0)
    last = list(whole.modules(pipe))[-1]
    products = measure_products(plan, whole, lambda name: name == last, steps, sample)
    tries, costs = _measured(pipe, plan, make, products, steps, sample)
    return ladder_of(tries.whole_steps(make, costs))


@LADDERS.register("block-mask")
def mask_ladder(pipe: Any, plan: Plan, steps: int, sample: Sample) -> Sequence[CachePart]:
    """Tables of attentions and MLPs: whole steps; and for a rising price of parameters, the steps of each module.

    Raises:
        InputError: when several networks have blocks.
    """
    targets: tuple[Target, ...] = ("attention", "cross-attention", "mlp")

    def make(chosen: Sequence[int], order: int) -> BlockMask:
        return BlockMask(rows=tuple("01"[step in chosen] for step in range(steps)), targets=targets, order=order)

    whole = make(range(steps), 0)
    modules = whole.modules(pipe)
    if len({name.partition(".")[0] for name in modules}) > 1:
        raise InputError("a block mask is calibrated for pipelines of one network; use the gate")
    products = measure_products(plan, whole, lambda name: True, steps, sample)
    tries, costs = _measured(pipe, plan, make, products, steps, sample)
    by_module = {name: Costs(tables, costs.factors) for name, tables in products.items()}
    sizes = {name: _size(modules[name]) for name in products}
    rungs = tries.whole_steps(make, costs)
    for table, order in dict.fromkeys(_by_module(by_module, sizes, price) for price in _prices(by_module, sizes)):
        chosen = dict(zip(products, table, strict=True))
        rows = tuple("".join("01"[step in chosen.get(name, ())] for name in modules) for step in range(steps))
        share = sum(len(chosen[name]) * sizes[name] for name in products) / (steps * sum(sizes.values()))
        if share < 1:
            rungs.append(tries.rung(BlockMask(rows=rows, targets=targets, order=order), share))
    return ladder_of(rungs)


def _measured(pipe: Any, plan: Plan, make: Make, products: Products, steps: int, sample: Sample) -> tuple[Tries, Costs]:
    """What a choice of whole steps costs, and what tries it."""

    def single(step: int) -> CachePart:
        return make([other for other in range(steps) if other != step], 0)

    plain, factors = measure_factors(plan, single, products, steps, sample)
    return Tries(plan, plain, sample, _changes(pipe, plan, steps, sample)), Costs(every_one(products), factors)


def _changes(pipe: Any, plan: Plan, steps: int, sample: Sample) -> tuple[float, ...]:
    """How much features change from step to step; none where no whole steps of the network can be left out."""
    try:
        StepRehash.suggest(pipe, steps)
    except InputError:
        return ()

    def run(watched: Plan) -> int:
        sample(watched)
        return steps

    return changes_in(run, plan)


def _size(module: nn.Module) -> int:
    return max(1, sum(parameter.numel() for parameter in module.parameters()))


def _by_module(costs: dict[str, Costs], sizes: dict[str, int], price: float) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Of each module the steps that compute where a parameter costs ``price``, and the order that costs least."""
    best = []
    for order in ORDERS:
        tables = tuple(worthwhile_steps(costs[name], order, price * sizes[name]) for name in costs)
        paid = (
            costs[name].apart(table, order) + price * sizes[name] * len(table)
            for name, table in zip(costs, tables, strict=True)
        )
        best.append((sum(paid), tables, order))
    _, tables, order = min(best)
    return tables, order


def _prices(costs: dict[str, Costs], sizes: dict[str, int]) -> list[float]:
    """Prices of a parameter, geometric, over the range of what the reuse of one costs in the next step."""
    single = [
        cost / sizes[name]
        for name, table in costs.items()
        for step in range(1, table.steps)
        if (cost := table.of(step, (step - 1,))) > 0
    ]
    low, high = math.log(min(single)), math.log(max(single) * 30)
    return [math.exp(low + (high - low) * rung / (MASK_RUNGS - 1)) for rung in range(MASK_RUNGS)]
