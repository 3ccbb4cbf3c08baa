"""Grids by dynamic programming over a recorded trajectory of the teacher.

Which few of many fine times to step between is a shortest path (Watson et al., arXiv:2106.03802), and with the error
of a step against the teacher's own trajectory as its cost it needs no network at all once the trajectory is there
(GITS, arXiv:2405.11326). Here the cost is that of the solver that will run, its memory of the step before included.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samplers import ExplicitGrid, InputError, Plan
from .cache import Call
from .trajectory import Trajectories, prepared_scheduler, record_trajectories

WIDEST = 14.0
"log(alpha/sigma) that stands for infinity, where a solver extrapolates over it."

Term = tuple[Tensor | float, Tensor]
"""A coefficient, and the place in the Gram matrix of what it multiplies; both are broadcast."""


@dataclass(frozen=True)
class Weighting:
    """How much an error made at a time counts for the result.

    An error in x / alpha shrinks on its way to clean data, the more the noisier it was made: by
    1 / sqrt(1 + (sigma / (alpha s))^2) on Gaussian data of deviation s. ``power`` is how strongly it is taken to
    shrink: 0 not at all, 1 as on that data. The errors of a path add up as the ``exponent``-th powers.

    Attributes:
        power: at least 0.
        exponent: 1 where errors of steps point one way (they add), 2 where they are independent.
    """

    power: float = 1.0
    exponent: float = 2.0

    def factors(self, trajectories: Trajectories) -> Tensor:
        """Of errors in x at the fine times and the end, (N + 1,); 1 at the end."""
        alpha, sigma = trajectories.alpha.clamp(min=1e-6), trajectories.sigma
        end = len(trajectories.times)
        size = trajectories.gram[end, end].clamp(min=1e-12).sqrt()
        return (1 + (sigma / (alpha * size)) ** 2) ** (-self.power / 2) / alpha


WEIGHTINGS = (
    *(Weighting(power, 2.0) for power in (1.5, 0.5, 1.0, 1.25, 2.0, 0.75, 3.0)),
    *(Weighting(power, 1.0) for power in (2.0, 1.5, 1.0, 0.5)),
)
"The family that is tried; which of them fits depends on the pipeline and on the metric."


@dataclass(frozen=True)
class GridPath:
    """A grid that is the best by one weighting.

    Attributes:
        timesteps: in the scheduler's units, decreasing.
        weighting: by which it is the best.
        cost: the sum that is the least, in the units of that weighting.
    """

    timesteps: tuple[float, ...]
    weighting: Weighting
    cost: float

    @property
    def grid(self) -> ExplicitGrid:
        """The part of a plan."""
        return ExplicitGrid(timesteps=self.timesteps)


@dataclass(frozen=True)
class Suggestions:
    """Grids worth sampling with.

    Attributes:
        paths: distinct grids, in the order of the weightings.
        rows: rows of network evaluations that were spent on the trajectory.
    """

    paths: tuple[GridPath, ...]
    rows: int


@dataclass(frozen=True)
class LocalErrors:
    """Mean squared errors of single steps that begin on the teacher's trajectory of N times; infinite where none goes.

    Attributes:
        start: (N,) of beginning at a time with pure noise.
        first: (N, N) of a first step from i to j.
        second: (N, N, N) of a step from i to j after one from k to i.
        last: (N,) of the step to clean data.
    """

    start: Tensor
    first: Tensor
    second: Tensor
    last: Tensor


ORDERS = {
    "DDIMParallelScheduler": 1,
    "DDIMScheduler": 1,
    "DPMSolverMultistepScheduler": 2,
    "EulerDiscreteScheduler": 1,
    "FlowMatchEulerDiscreteScheduler": 1,
    "UniPCMultistepScheduler": 2,
}
"""By which order the steps of a scheduler are judged. Euler's step is DDIM's.

UniPC's is judged before its corrector: that one uses the prediction where the step landed, which on the teacher's
trajectory is better than it is in a few steps. Orders above 2 are judged as order 2.
"""


def solver_order(scheduler: Any) -> int:
    """By which order the steps of a scheduler are judged, 1 or 2.

    Raises:
        InputError: when its steps are of another kind.
    """
    name = type(scheduler).__name__
    if name not in ORDERS:
        raise InputError(f"grids cannot be suggested for {name}; known: {', '.join(ORDERS)}")
    return min(ORDERS[name], int(scheduler.config.get("solver_order", 2)))


def local_errors(trajectories: Trajectories, order: int) -> LocalErrors:
    """Errors of all steps between the fine times, from the Gram matrix.

    x_j = (sigma_j / sigma_i) x_i + alpha_j (1 - e^-h) D with h the step in log(alpha/sigma): of order 1 D is D_i (DDIM,
    arXiv:2010.02502 equation 12), of order 2 D_i + (D_i - D_k) / 2r with r = h_before / h (DPM-Solver++(2M),
    arXiv:2211.01095 algorithm 2). The first and the last step are of order 1.

    Args:
        trajectories: of N times.
        order: 1 or 2.

    Raises:
        InputError: for another order.
    """
    if order not in (1, 2):
        raise InputError(f"steps are judged by order 1 or 2; got {order}")
    gram, n = trajectories.gram, len(trajectories.times)
    alpha, sigma = trajectories.alpha, trajectories.sigma
    level = (alpha.log() - sigma.log()).clamp(-WIDEST, WIDEST)
    x = torch.arange(n)
    d = x + n + 1
    start = _mean_square(gram, [(trajectories.start_scale, torch.zeros_like(x)), (-1.0, x)])
    last = _mean_square(gram, [(1.0, d), (-1.0, torch.full_like(x, n))])

    def step(i: Tensor, j: Tensor) -> list[Term]:
        keep = sigma[j] / sigma[i]
        return [(keep, x[i]), (alpha[j] - alpha[i] * keep, d[i]), (-1.0, x[j])]

    i, j = x[:, None], x
    first = torch.where(i < j, _mean_square(gram, step(i, j)), torch.inf)
    if order == 1:
        second = torch.where(x[:, None, None] < i, first, torch.inf)
        return LocalErrors(start, first, second, last)
    k = x[:, None, None]
    (keep, here), (whole, now), landing = step(i, j)
    slope = whole * (level[j] - level[i]) / (2 * (level[i] - level[k]))
    terms = [(keep, here), (whole + slope, now), (-slope, d[k]), landing]
    second = torch.where((k < i) & (i < j), _mean_square(gram, terms), torch.inf)
    return LocalErrors(start, first, second, last)


def _mean_square(gram: Tensor, terms: Sequence[Term]) -> Tensor:
    """The mean square of a sum of tensors that the Gram matrix is of."""
    total = torch.zeros((), dtype=torch.float64)
    for one, at in terms:
        for other, place in terms:
            total = total + one * other * gram[at, place]
    return total.clamp(min=0)


def shortest_path(errors: LocalErrors, factors: Tensor, steps: int, exponent: float, starts: Tensor) -> list[int]:
    """The grid of ``steps`` fine times whose weighted errors add up to the least.

    Args:
        errors: of N fine times.
        factors: (N + 1,) what the root mean square of an error is multiplied with, by where the step lands.
        steps: 1 to N.
        exponent: to which power the products are added.
        starts: bool (N,) where a grid may begin.

    Returns:
        Indices of the fine times, increasing.

    Raises:
        InputError: when no grid has that many.
    """

    def cost(error: Tensor, factor: Tensor) -> Tensor:
        return (error.sqrt() * factor) ** exponent

    inner = factors[:-1]
    start = torch.where(starts, cost(errors.start, inner), torch.inf)
    last = cost(errors.last, factors[-1])
    if steps == 1:
        return [int((start + last).argmin())]
    value = start[:, None] + cost(errors.first, inner)
    second, came = cost(errors.second, inner), []
    for _ in range(steps - 2):
        value, older = (value[:, :, None] + second).min(0)
        came.append(older)
    total = value + last
    if not bool(total.isfinite().any()):
        raise InputError(f"no grid of {steps} steps begins where it may; give fewer steps, or more fine times")
    before, here = divmod(int(total.argmin()), len(start))
    path = [here, before]
    for older in reversed(came):
        path.append(int(older[path[-1], path[-2]]))
    return path[::-1]


def path_cost(errors: LocalErrors, factors: Tensor, path: Sequence[int], exponent: float) -> float:
    """What `shortest_path` makes the least, of any grid."""
    parts = [errors.start[path[0]].sqrt() * factors[path[0]], errors.last[path[-1]].sqrt() * factors[-1]]
    for place in range(1, len(path)):
        j = path[place]
        error = errors.first[path[0], j] if place == 1 else errors.second[path[place - 2], path[place - 1], j]
        parts.append(error.sqrt() * factors[j])
    return float(sum(part**exponent for part in parts))


def best_grids(
    trajectories: Trajectories,
    steps: int,
    order: int,
    *,
    weightings: Iterable[Weighting] = WEIGHTINGS,
    first: tuple[float, float] | None = None,
) -> list[GridPath]:
    """The best grid by each weighting, without those that are the same again.

    Args:
        trajectories: what was recorded.
        steps: evaluations of the network, at least 1.
        order: by which the solver's steps are judged, 1 or 2 (`solver_order`).
        weightings: of the errors.
        first: noisiest and cleanest time that a grid may begin at; by default any: a start below the noisiest time
            takes pure noise for the state there, and that is one of the errors.

    Raises:
        InputError: when there are fewer fine times than steps, or none to begin at.
    """
    if not 1 <= steps <= len(trajectories.times):
        raise InputError(f"a grid takes 1 to {len(trajectories.times)} of the fine times; got {steps} steps")
    noisiest, cleanest = first or (trajectories.times[0], trajectories.times[-1])
    starts = torch.tensor([cleanest <= time <= noisiest for time in trajectories.times])
    if not bool(starts.any()):
        raise InputError(f"no fine time lies between {noisiest:g} and {cleanest:g}, where a grid may begin")
    errors = local_errors(trajectories, order)
    found: dict[tuple[int, ...], GridPath] = {}
    for weighting in weightings:
        factors = weighting.factors(trajectories)
        path = shortest_path(errors, factors, steps, weighting.exponent, starts)
        cost = path_cost(errors, factors, path, weighting.exponent)
        times = tuple(trajectories.times[place] for place in path)
        found.setdefault(tuple(path), GridPath(times, weighting, cost))
    return list(found.values())


def suggest_grids(
    pipe: Any,
    plan: Plan,
    call: Call,
    *,
    steps: int,
    n: int = 64,
    fine: int = 64,
    batch_size: int = 16,
    weightings: Iterable[Weighting] = WEIGHTINGS,
) -> Suggestions:
    """Records the teacher's trajectory by the plan's solver on fine times, and suggests grids for that solver.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        plan: what runs around the grid: solver, guidance and the like.
        call: from numbers of samples to the arguments of a call for them, seeds included.
        steps: of the grids.
        n: samples that are recorded.
        fine: fine times.
        batch_size: samples in a call.
        weightings: of the errors.

    Raises:
        InputError: when the steps of the plan's solver are of another kind (`ORDERS`), or as `record_trajectories`.
    """
    order = solver_order(prepared_scheduler(pipe, plan))
    trajectories = record_trajectories(pipe, plan, call, n, fine=fine, batch_size=batch_size)
    return Suggestions(tuple(best_grids(trajectories, steps, order, weightings=weightings)), trajectories.rows)
