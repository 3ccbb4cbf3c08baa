"""Found searches made of numbers, for tests of the report."""

from __future__ import annotations

import math

import numpy as np

from fewstep.eval import Estimate
from fewstep.samplers import Plan
from fewstep.search.found import Candidate, Found, Scored, Transfer

RUNGS = (256, 512, 1024)
FRESH = 10_000


def log_snr(time: float) -> float:
    """Of the linear VP schedule in continuous time."""
    u = time / 1000
    integral = 0.1 * u + 9.95 * u * u
    return -math.log(math.expm1(integral)) if integral > 0 else 10.0


def plan_of(times, name: str | None = None, **parts: object) -> Plan:
    grid = {"type": "explicit", "timesteps": [float(time) for time in times]}
    return Plan.from_json({"fewstep_plan": 1, "grid": grid, **({"name": name} if name else {}), **parts})


def scored(n: int, value: float, cost: float) -> Scored:
    relative = 1.6 / math.sqrt(n)
    return Scored(
        n=n,
        quality=Estimate(value, relative * value, n),
        others={"class_accuracy": Estimate(0.97 - 0.01 * value, 0.2 / math.sqrt(n), n)},
        costs={"nfe": cost, "latency_s": 0.004 * cost + 0.006},
    )


def candidate(order: int, times, value: float, fresh: float | None = None, **fields) -> Candidate:
    times = tuple(float(time) for time in times)
    plan = fields.pop("plan", None) or plan_of(times)
    cost = len(times)
    fields = {"at_search": scored(RUNGS[-1], value, cost)} | fields
    return Candidate(
        order=order,
        plan=plan,
        params={f"grid.{place}": time for place, time in enumerate(times)},
        fresh=None if fresh is None else scored(FRESH, fresh, cost),
        timesteps=times,
        log_snrs=tuple(log_snr(time) for time in times),
        **fields,
    )


def times_of(rng: np.random.Generator, steps: int) -> list[float]:
    spread = np.linspace(960, 40, steps) + rng.normal(0, 12, steps)
    return [float(time) for time in sorted(spread.round(), reverse=True)]


def fabricate_search(trials: int = 120, cost: str | None = "nfe", seed: int = 0) -> Found:
    """A search over numbers of steps (with a cost) or of five steps, with pruned and failed trials."""
    rng = np.random.default_rng(seed)
    history = []
    for order in range(trials):
        steps = int(rng.integers(4, 11)) if cost else 5
        times = times_of(rng, steps)
        value = 2 + 30 / steps**1.6 * (1 + 0.6 * rng.exponential() * math.exp(-order / 60))
        if order % 17 == 11:
            reason = "images are not finite at step 3; the solver diverged" if order % 2 else "times must fall"
            history.append(candidate(order, times, 0, state="failed", at_search=None, reason=reason))
        elif value > 5.2 or order % 9 == 4:
            early = scored(RUNGS[order % 2], value, steps)
            history.append(candidate(order, times, value, state="pruned", at_search=early, reason="not among the best"))
        else:
            history.append(candidate(order, times, value, holds=order % 13 != 6))
    front = _front([trial for trial in history if trial.state == "complete" and trial.holds], cost)
    best = front[min(2, len(front) - 1)]
    baselines = tuple(
        candidate(-1, np.linspace(980, 1, steps).round(), value, value * 1.01, name=name, gap=_gap(value))
        for name, steps, value in (("unipc-leading-5", 5, 7.6), ("dpmpp-karras-10", 10, 4.4), ("ddim-20", 20, 4.0))
    )
    return Found(
        plan=best.plan,
        metric="fd_fashion",
        higher_is_better=False,
        cost=cost,
        front=tuple(front),
        history=tuple(history),
        baselines=baselines,
        teacher=candidate(-1, np.linspace(999, 1, 100), 2.61, 2.55, name="teacher-100", gap=_gap(2.6)),
        transfers=tuple(
            Transfer(f"guidance scale {scale}", name, scored(2048, value + scale, 5))
            for scale in (1.0, 1.5, 3.0)
            for name, value in (("the plan found", 2.0), ("unipc-leading-5", 5.0))
        ),
        spent=612_480,
        seconds=5432.1,
        settings={
            "pipe": "demo:fashion-dit",
            "steps": 5,
            "objective": "fd_fashion",
            "limits": ["nfe<=10", "class_accuracy>=0.98*teacher"],
            "space": ["grid", "guidance", "cache"],
            "trials": trials,
            "seeds": [0, 1024],
            "fresh_seeds": [1_000_000, 1_010_000],
            "sampler": {"name": "tpe", "seed": 3},
        },
        command="fewstep search --pipe demo:fashion-dit --steps 5 --trials 120 --study study",
    )


def _gap(value: float) -> Estimate:
    return Estimate(value - 3.6, 0.05, FRESH)


def _front(trials: list[Candidate], cost: str | None) -> list[Candidate]:
    """The best of each number of steps, or the best eight, with fresh values that regress to the mean."""
    ranked = sorted(trials, key=lambda trial: trial.at_search.quality.value)
    if cost:
        best = {len(trial.timesteps): trial for trial in reversed(ranked)}
        ranked = [best[steps] for steps in sorted(best)]
    kept = []
    for trial in ranked[:8]:
        value = trial.at_search.quality.value
        kept.append(candidate(trial.order, trial.timesteps, value, value * 1.06, gap=_gap(1.06 * value)))
    return kept
