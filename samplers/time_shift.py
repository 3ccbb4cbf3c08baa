"""Time-shift sampler (arXiv:2305.15583): the network is told the time whose noise level each sample really has.

After a step to t the sample's variance v is compared with the variances V_k that are expected at the train steps k
within window // 2 of t, and the network is told argmin_k |v - V_k| instead of t. Steps to t <= cutoff, and the
first evaluation, are not shifted. The solver's coefficients stay on the grid. What is compared:

==============  ==========================  ================================
criterion       v, over all but the batch   V_k
==============  ==========================  ================================
residual        Var(x - alpha_t x0)         sigma_k^2
data-variance   Var(x)                      alpha_k^2 data_variance + sigma_k^2
paper           Var(x)                      sigma_k^2
==============  ==========================  ================================

The paper's leaves out what the data add to the variance. Latents are scaled to unit variance: then Var(x) is about
1 at every t, above every sigma_k^2, and the answer is the noisy end of the window whatever the sample. It is for
data of small variance. ``data-variance`` corrects that where data_variance (of one image's values, averaged over
images) is known, and is refused where it does not tell the times apart, as 1 does not. ``residual`` needs no
knowledge: x0 is the prediction of the step that led here, guidance and clipping applied. A prediction of the noise
has less variance than the noise, by its error, so it leans a little to the clean side.

A variance of n values is known to a share of sqrt(2/n). Where the V_k of a window differ by less, as they do at
noisy times, the answer is one end of it or the other by chance: on small images keep the window small.

The released implementations differ from the paper and each other; as ``variant``:

* ``deis``: a window of twice the width, and the first evaluation is shifted too.
* ``adm``: not the told time but the landing of the DDIM step moves, by as much as the time found around the
  *current* t, from the state before the step, is away from it. (The released code also lands one train step
  further, by an index; not copied.) The cutoff is compared with the current t.
* ``pndm``: the same with the window around the next t, where the landing is. Its higher-order solvers land by a
  blend of several predictions that a scheduler does not show.

Those two are exact for DDIM without noise (eta = 0), and refused on other solvers. The fourth one (DPM-Solver)
takes the variance of the noise prediction, which is about 1 and so always ends at the noisy end, and steps a
multistep solver between times of its own for each sample, which diffusers' cannot: it is left out.

On the demo ``fashion-unet`` the best cell takes 0.5 +- 0.2 of 73.8 off DDIM's fd_fashion in ten steps, and nothing
that can be told from chance off DPM-Solver++'s; low cutoffs and wide windows do harm (docs/samplers.md).

Solvers with several evaluations a step (Heun, KDPM2, PNDM's warm-up) are shifted at each of them: there too the
state belongs to the listed time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from .call import CallHook, Step
from .conditioning import CONDITIONINGS
from .errors import InputError
from .hook_tools import predicted, train_steps
from .network import Evaluation
from .part import Around, Part, Run, Sampling
from .process import Process
from .recognise import own_option


class _Variant(NamedTuple):
    """Where an implementation departs from the paper.

    Attributes:
        widths: windows on either side of the centre, in units of ``window``.
        shifts_first: whether the first evaluation is shifted too.
        moves_target: whether the solver's landing is moved, instead of the time that the network is told.
        centred_next: whether a moved landing's window is centred at the next time of the grid, not at this one.
    """

    widths: float
    shifts_first: bool = False
    moves_target: bool = False
    centred_next: bool = False


VARIANTS = {
    "paper": _Variant(0.5),
    "deis": _Variant(1.0, shifts_first=True),
    "pndm": _Variant(0.5, moves_target=True, centred_next=True),
    "adm": _Variant(0.5, moves_target=True),
}


@CONDITIONINGS.register("time-shift")
class TimeShift(Part):
    """Time-Shift Sampler (arXiv:2305.15583): the told time follows the variance of each sample, on its own.

    The module says what is compared, and where the variants depart from the paper.
    """

    type: Literal["time-shift"] = "time-shift"
    window: int = Field(ge=0, description="Width of the window, in train steps; 0 is off.")
    cutoff: float = Field(default=0.0, ge=0, description="Timestep up to which nothing is shifted.")
    criterion: Literal["residual", "data-variance", "paper"] = Field(
        default="residual", description="Which variance is compared with which."
    )
    data_variance: float | None = Field(
        default=None, gt=0, description="Variance of the values of one clean sample, as the network sees them."
    )
    variant: Literal["paper", "deis", "pndm", "adm"] = Field(
        default="paper", description="The paper's algorithm, or how a released implementation departs from it."
    )

    @model_validator(mode="after")
    def _consistent(self) -> TimeShift:
        if (self.criterion == "data-variance") != (self.data_variance is not None):
            has = "none" if self.data_variance is None else f"{self.data_variance:g}"
            raise ValueError(
                f"data_variance goes with criterion 'data-variance'; got criterion {self.criterion!r} and "
                f"data_variance {has}"
            )
        if self.variant != "paper" and self.criterion == "residual":
            raise ValueError(
                f"variant {self.variant!r} looks at the state alone; give it criterion 'paper' or 'data-variance'"
            )
        return self

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Adds the hook; a window of 0 adds none.

        Raises:
            InputError: when the process has no train steps, its variances do not tell the times apart, or the variant
                or criterion cannot see what the solver does.
        """
        if self.window == 0:
            return
        process, scheduler = run.process, run.scheduler
        finder = _Finder(self, process)
        moves = VARIANTS[self.variant].moves_target
        if own_option(scheduler, "thresholding") and (moves or self.criterion == "residual"):
            raise InputError(
                "thresholding=True changes the predicted x0 within the scheduler, where the time-shift part does not "
                "see it; set it to false in the solver's config, or use criterion 'data-variance'"
            )
        if not moves:
            run.hooks.append(lambda: _ShiftedTime(finder))
            return
        if type(scheduler).__name__ != "DDIMScheduler":
            raise InputError(
                f"variant {self.variant!r} of the time-shift part moves the landing of DDIM's step; "
                f"{type(scheduler).__name__} lands otherwise, use DDIMScheduler or variant 'paper'"
            )
        run.hooks.append(lambda: _ShiftedTarget(finder))
        run.arounds.append(_without_eta(self.variant))


class _Finder:
    """Finds the times of samples from their variances.

    Raises:
        InputError: when the process has no train steps, or the variances do not tell the times apart.
    """

    def __init__(self, part: TimeShift, process: Process) -> None:
        self.part, self.process = part, process
        self.variant = VARIANTS[part.variant]
        self.range = train_steps("time-shift", process)
        half = int(part.window * self.variant.widths)
        self.offsets = torch.arange(-half, half + 1, dtype=torch.float64)
        self.windows: dict[float, tuple[Tensor, Tensor]] = {}
        self._require_distinct()

    def times(self, values: Tensor, centre: float) -> Tensor:
        """The time within the window around ``centre`` that fits each sample, (rows,) float64.

        Args:
            values: (rows, ...) whose variance is compared.
            centre: a time.
        """
        rows = values.float().flatten(1)
        centred = rows - rows.mean(dim=1, keepdim=True)
        variance = centred.square().sum(dim=1) / (rows.shape[1] - 1)  # as Tensor.var, which is slow on the CPU
        candidates, expected = self._window(centre)
        nearest = (variance[:, None] - expected.to(variance)).abs().argmin(dim=1)
        return candidates.to(nearest.device).take(nearest)

    def _window(self, centre: float) -> tuple[Tensor, Tensor]:
        """The times around ``centre`` and the variances that are expected there; the same in every call."""
        if centre not in self.windows:
            candidates = (centre + self.offsets).clamp(*self.range)
            self.windows[centre] = candidates, self._expected(candidates)
        return self.windows[centre]

    def clean(self, step: Step) -> Tensor:
        """The predicted clean samples as the solver uses them."""
        x0 = self.process.to_x0(predicted(step), step.x, step.time)
        if not own_option(step.scheduler, "clip_sample"):
            return x0
        bound = step.scheduler.config.clip_sample_range
        return x0.clamp(-bound, bound)

    def _expected(self, times: Tensor) -> Tensor:
        data = self.part.data_variance or 0.0
        return self.process.alpha(times) ** 2 * data + self.process.sigma(times) ** 2

    def _require_distinct(self) -> None:
        if self.part.data_variance is None:
            return
        lowest = max(self.range.cleanest, self.part.cutoff + float(self.offsets[0]))
        times = torch.arange(int(lowest), int(self.range.noisiest) + 1, dtype=torch.float64)
        steps = self._expected(times).diff()
        one_way = bool((steps > -1e-6).all()) or bool((steps < 1e-6).all())
        if not one_way or steps.sum().abs() < 0.01 * (self.process.sigma(times) ** 2).diff().sum().abs():
            raise InputError(
                f"data_variance {self.part.data_variance:g} does not tell the times above {lowest:g} apart by their "
                "variance; use criterion 'residual', or a higher cutoff"
            )


class _ShiftedTime(CallHook):
    """Tells the network the time that each sample's variance stands for."""

    def __init__(self, finder: _Finder) -> None:
        self.finder = finder
        self.first: int | None = None
        self.shape: tuple[int, ...] | None = None
        self.mean: Tensor | None = None

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        part = self.finder.part
        if self.first is None:
            self.first = evaluation.index
        spared = evaluation.index == self.first and not self.finder.variant.shifts_first
        if spared or evaluation.time <= part.cutoff:
            return proceed(evaluation)
        values = self._state(evaluation)
        if self.mean is not None:
            values = values - self.mean[torch.arange(len(values), device=values.device) % len(self.mean)]  # branches
        return proceed(evaluation.at_times(self.finder.times(values, evaluation.time)))

    def after_step(self, step: Step) -> None:
        self.shape = tuple(step.x.shape[1:])
        if self.finder.part.criterion == "residual" and step.next_time > self.finder.part.cutoff:
            self.mean = float(step.process.alpha(step.next_time)) * self.finder.clean(step)

    def _state(self, evaluation: Evaluation) -> Tensor:
        """The noisy samples in what the network is shown: they come first, before masks and images."""
        x = evaluation.x
        if self.shape is None or tuple(x.shape[1:]) == self.shape:
            return x
        return x[(slice(None), *(slice(size) for size in self.shape))]


class _ShiftedTarget(CallHook):
    """Lands each sample's DDIM step where its variance says, instead of at the next time of the grid."""

    def __init__(self, finder: _Finder) -> None:
        self.finder = finder
        self.first: int | None = None

    def after_step(self, step: Step) -> None:
        finder, process = self.finder, step.process
        if self.first is None:
            self.first = step.index
        centre = step.next_time if finder.variant.centred_next else step.time
        last = step.next_time == process.clean_time
        if step.index == self.first or last or centre <= finder.part.cutoff:
            return
        moved = finder.times(step.x, centre) - centre
        eps = process.to_eps(predicted(step), step.x, step.time)
        target = (step.next_time + moved).clamp(*finder.range)
        step.x_next = process.jump(step.x, step.time, target, x0=finder.clean(step), eps=eps)


def _without_eta(variant: str) -> Around:
    def around(arguments: dict[str, Any], sampling: Sampling) -> Any:
        if arguments.get("eta"):
            raise InputError(
                f"variant {variant!r} of the time-shift part moves the landing of a DDIM step without noise; "
                f"got eta={arguments['eta']} in the call, leave it out"
            )
        return sampling.run(arguments)

    return around
