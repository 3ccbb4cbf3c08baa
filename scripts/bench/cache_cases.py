"""The settings of caches that are compared: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.samplers import CachePart
from fewstep.samplers.block_mask import uniform_mask
from fewstep.samplers.cache import CACHES
from fewstep.samplers.mask import Target
from fewstep.samplers.step_rehash import StepRehash

STEPS = 20
FEATURES = [r"transformer_blocks\.\d+\.(attn1|ff)"]
"What TaylorSeer's paper caches; the patterns that diffusers has by default match nothing in a DiT."

BLOCKS = [r"transformer_blocks\.\d+"]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        whose: of this package, of another one, or the solver itself in fewer steps.
        method: what its settings are points on a curve of.
        setting: which point.
        caches: of the plan.
        peer: name and settings of another package's cache, in place of the plan's.
        steps: of the solver.
    """

    whose: Literal["ours", "peer", "control"]
    method: str
    setting: str
    caches: tuple[dict[str, Any], ...] = ()
    peer: tuple[str, dict[str, Any]] | None = None
    steps: int = STEPS

    def plan(self, guidance: dict[str, Any] | None) -> dict[str, Any]:
        """The plan, without a version."""
        plan: dict[str, Any] = {
            "solver": {"type": "diffusers", "scheduler": "DDIMScheduler"},
            "grid": {"type": "spacing", "steps": self.steps, "spacing": "trailing"},
        }
        plan |= {"guidance": guidance} if guidance else {}
        return plan | ({"caches": list(self.caches)} if self.caches else {})


@dataclass(frozen=True)
class Calibration:
    """What some settings are made from, measured on other seeds.

    Attributes:
        changes: of the features from step to step, for step-rehash.
        ratios: of the size of the residual from step to step, for MagCache.
        rungs: settings from the ladder that ``fewstep search cache`` climbs.
    """

    changes: Sequence[float]
    ratios: Sequence[float] = ()
    rungs: Sequence[dict[str, Any]] = ()


def fewer_steps(counts: Sequence[int]) -> list[Case]:
    """The solver without a cache."""
    return [Case("control", "fewer steps", str(count), steps=count) for count in counts]


def ours(method: str, setting: Any, **cache: Any) -> Case:
    """A cache of this package; the first word of ``method`` is its type."""
    return Case("ours", method, str(setting), caches=(cache | {"type": method.replace(",", "").split()[0]},))


def peer(method: str, setting: Any, package: str, **settings: Any) -> Case:
    """A cache of another package."""
    return Case("peer", method, str(setting), peer=(package, settings))


def unet_cases(known: Calibration) -> list[Case]:
    """On the U-Net: deep caches at the same cuts, evenly spaced and not, and steps that were chosen by measurement."""
    cases = fewer_steps((15, 12, 10, 8, 7, 6, 5, 4))
    for branch, (depth, layer) in {0: (0, 0), 1: (0, 1), 3: (1, 0)}.items():
        cut, at = f"cut {depth}.{layer}", {"depth": depth, "layer": layer}
        for every in (2, 3, 5):
            cases.append(peer(f"DeepCache, branch {branch}", every, "deepcache", interval=every, branch=branch))
            cases.append(ours(f"unet-deep, {cut}", every, interval=every, **at))
        for every in (2, 3, 5):
            cases.append(ours(f"unet-deep quadratic, {cut}", every, interval=every, schedule="quadratic", **at))
        for budget in (10, 7, 4):
            cases.append(ours(f"unet-deep measured, {cut}", budget, steps=chosen_steps(known, budget), **at))
        for rung in known.rungs:
            cases.append(ours(f"unet-deep calibrated, {cut}", len(rung["steps"]), **rung | at))
    return cases


def dit_cases(known: Calibration) -> list[Case]:
    """On the DiT: gates, masks and rehashed steps, and what others have of the kind."""
    cases = fewer_steps((13, 10, 8, 7, 6, 5))
    for every in (2, 3):
        mask: dict[str, Any] = {"steps": STEPS, "residual_diff_threshold": 1.0, "max_warmup_steps": 1}
        mask |= {"steps_computation_mask": _every(every), "steps_computation_policy": "static"}
        cases.append(peer("cache-dit, mask", every, "cache-dit", **mask))
        cases.append(peer("cache-dit, mask, Taylor 1", every, "cache-dit", taylor=1, **mask))
    for order in (1, 2):
        for every in (2, 3, 4):
            cases.append(_taylorseer("attention, MLP", FEATURES, every, order))
            cases.append(_mask("attention, MLP", every, order, ("attention", "mlp")))
        for budget in (10, 8, 6, 5):
            cases.append(_measured("attention, MLP", known, budget, order, ("attention", "mlp")))
    for threshold in (0.1, 0.2, 0.3):
        cases.append(peer("cache-dit", threshold, "cache-dit", steps=STEPS, residual_diff_threshold=threshold))
        cases.append(ours("gate first-block", threshold, threshold=threshold))
        cases.append(ours("gate modulated-input", threshold, criterion="modulated-input", threshold=threshold))
    for threshold in (0.24, 0.5, 1.0):
        magnitude = {"config": "MagCacheConfig", "num_inference_steps": STEPS, "mag_ratios": list(known.ratios)}
        magnitude |= {"threshold": threshold}
        cases.append(peer("MagCache", threshold, "diffusers", **magnitude))
        longer = {"retention_ratio": 0.1, "max_skip_steps": 5}
        cases.append(peer("MagCache, retention 0.1", threshold, "diffusers", **magnitude, **longer))
    for threshold in (0.1, 0.2, 0.4):
        first = {"config": "FirstBlockCacheConfig", "threshold": threshold}
        cases.append(peer("FirstBlockCache", threshold, "diffusers", **first))
    for every in (2, 3):
        cases += [_taylorseer("blocks", BLOCKS, every, 1)]
        cases += [_mask("blocks", every, order, ("block",)) for order in (0, 1, 2)]
    for budget in (10, 7, 5):
        cases.append(_measured("blocks", known, budget, 1, ("block",)))
        cases += [
            ours(f"step-rehash measured, order {order}", budget, changes=known.changes, budget=budget, order=order)
            for order in (0, 1, 2)
        ]
    for threshold in (0.1, 0.2):
        dbcache = {"steps": STEPS, "residual_diff_threshold": threshold}
        cases.append(peer("cache-dit, Taylor 1", threshold, "cache-dit", taylor=1, **dbcache))
    for rung in known.rungs:
        part = CACHES[rung["type"]].model_validate(rung)
        cases.append(ours(f"{part.type} calibrated", f"{_share(part):.2f}", **rung))
    return cases


def rungs(ladder: Sequence[CachePart], shares: Sequence[float]) -> tuple[dict[str, Any], ...]:
    """The settings of a ladder that compute the shares nearest to some, as JSON.

    Args:
        ladder: as `fewstep.search.cache` has them.
        shares: of the table's entries, or of the steps, that compute.
    """
    computed = [_share(part) for part in ladder]
    nearest = (min(range(len(ladder)), key=lambda rung: abs(computed[rung] - share)) for share in shares)
    chosen = (ladder[rung] for rung in dict.fromkeys(nearest))
    return tuple({"type": part.type} | part.model_dump(mode="json", exclude_defaults=True) for part in chosen)


def _share(part: Any) -> float:
    if part.type == "unet-deep":
        return len(part.steps) / STEPS
    table = part.table()
    return sum(map(sum, table)) / sum(map(len, table))


def chosen_steps(known: Calibration, budget: int) -> list[int]:
    """At most ``budget`` steps that compute, by how much features change."""
    table = StepRehash(changes=tuple(known.changes), budget=budget).table()
    return [index for index, (computes,) in enumerate(table) if computes]


def _every(interval: int) -> list[int]:
    return [int(index % interval == 0) for index in range(STEPS)]


def _taylorseer(name: str, identifiers: list[str], every: int, order: int) -> Case:
    settings: dict[str, Any] = {
        "config": "TaylorSeerCacheConfig",
        "taylor_factors_dtype": "float32",
        "cache_identifiers": identifiers,
    }
    settings |= {"cache_interval": every, "max_order": order, "disable_cache_before_step": order + 1}
    return peer(f"TaylorSeer, {name}, order {order}", every, "diffusers", **settings)


def _mask(name: str, every: int, order: int, targets: tuple[Target, ...]) -> Case:
    mask = uniform_mask(STEPS, every, targets, order).model_dump(mode="json", exclude_defaults=True)
    return ours(f"block-mask {name}, order {order}", every, **mask)


def _measured(name: str, known: Calibration, budget: int, order: int, targets: tuple[Target, ...]) -> Case:
    chosen = chosen_steps(known, budget)
    rows = ["1" if index in chosen else "0" for index in range(STEPS)]
    return ours(f"block-mask measured {name}, order {order}", budget, rows=rows, order=order, targets=targets)
