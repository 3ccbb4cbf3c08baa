"""Fits the ratios of a timestep aligner (arXiv:2310.09469) through the pipeline itself.

Each iteration runs the attached pipeline up to the step after the one whose ratio is fitted, twice: once as it is,
which gives the noise predicted at the step, and once with gradients from the step on. What the network said before is
replayed. So guidance, the solver and its history are the pipeline's own, and every call costs what the paper's
algorithm costs: one evaluation a step without gradients, and two with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..samplers import InputError, Part, Plan, Process, Run, TunedFor, attach, denoisers, fingerprint
from ..samplers.aligner import Aligner
from ..samplers.call import CallHook, Step
from ..samplers.hook_tools import predicted
from ..samplers.network import Evaluation, time_unit

Call = Callable[[list[int]], dict[str, Any]]
"""From the positions of some samples to the pipeline's arguments for them, such as their class labels."""

Progress = Callable[[int, int, float], None]
"""Told the gradient steps taken, their total, and the last loss."""


def fit_aligner(
    pipe: Any,
    plan: Plan,
    *,
    samples: Tensor,
    mode: Literal["sequential", "parallel"] = "sequential",
    iterations: int = 500,
    batch: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    call: Call | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Learns one ratio for each step but the last, by Adam.

    The loss of step i is the squared distance between the noise predicted at x_i and, told t_i r_i there, at the
    state to which the solver then steps. ``sequential`` fits one step after the other on the states that the plan
    reaches with the ratios so far; ``parallel`` fits all at once on noised samples, which is faster and does not see
    what the solver gets wrong.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        plan: a plan with a grid; a conditioning that it has is replaced.
        samples: (N, ...) clean samples as the network sees them: latents, or images in [-1, 1]; real ones or what
            `fewstep.samplers.recording.clean_samples` gives.
        mode: which states a ratio is learned on.
        iterations: gradient steps for each ratio.
        batch: samples in each.
        lr: learning rate.
        seed: of the batches, the noise and the pipeline's generators.
        call: arguments of the pipeline for some of the samples; not needed where it takes a batch_size.
        progress: told after each gradient step.

    Returns:
        The plan with an aligner part that says what it was fitted with, and ``tuned_for``.

    Raises:
        InputError: when the plan has no grid or a solver that an aligner cannot run on, or arguments do not fit.
    """
    steps = plan.nominal_steps
    if steps is None or steps < 2:
        raise InputError(f"an aligner is fitted on a grid of at least 2 steps; the plan has {steps or 'no grid'}")
    if mode not in ("sequential", "parallel"):
        raise InputError(f"mode is 'sequential' or 'parallel'; got {mode!r}")
    if min(iterations, batch) < 1 or not samples.is_floating_point() or len(samples) < batch:
        raise InputError(
            f"a fit takes at least {max(batch, 1)} floating point samples and 1 iteration; got {len(samples)} of "
            f"{samples.dtype} and {iterations} iterations"
        )
    watch = _Watch()
    probe = _Probe(inner=Aligner(ratios=(1.0,) * steps), watch=watch)
    fit = _Fit(pipe, watch, samples, batch, seed, call or _batch_size_call(pipe))
    ratios = [torch.ones((), requires_grad=True) for _ in range(steps - 1)]
    optimizers = [torch.optim.Adam([ratio], lr=lr) for ratio in ratios]
    total = iterations * len(ratios)
    order = (
        ((step,) for step in range(len(ratios)) for _ in range(iterations))
        if mode == "sequential"
        else (tuple(range(len(ratios))) for _ in range(iterations))
    )
    done = 0
    with _quiet(pipe), attach(pipe, plan.model_copy(update={"conditioning": probe})):
        for group in order:
            for step, loss in fit.losses(group, ratios, forced=mode == "parallel"):
                (ratios[step].grad,) = torch.autograd.grad(loss, ratios[step])
                optimizers[step].step()
                done += 1
                if progress is not None:
                    progress(done, total, float(loss.detach()))
    found = tuple(round(float(ratio.detach()), 6) for ratio in ratios)
    part = Aligner(ratios=(*found, 1.0), solver=fit.solver, guidance=fit.guidance)
    known = {} if plan.tuned_for is None else plan.tuned_for.model_dump()
    here = {
        "fingerprint": fingerprint(next(iter(denoisers(pipe).values()))),
        "pipeline": type(pipe).__name__,
        "steps": steps,
    }
    return plan.model_copy(update={"conditioning": part, "tuned_for": TunedFor(**(known | here))})


class _Reached(Exception):
    """The last step that was to be seen."""


@dataclass
class _Trial:
    """What one call of the pipeline is to do, and what was seen.

    Attributes:
        stop: the step before which the call ends; None for never.
        clean: (B, ...) the samples whose noised versions the states up to ``forced`` are.
        noise: (B, ...) their noise.
        forced: last step whose state is replaced by the noised sample; -1 for none.
        ratios: by step, what its time is multiplied with.
        learned: the step from which gradients are kept, whose ratio is learned; None for none.
        replay: outputs of the network by step and evaluation, given instead of running it.
        outputs: what the network returned, by step and evaluation.
        eps: (B, ...) the predicted noise by step, guidance applied.
    """

    stop: int | None = None
    clean: Tensor | None = None
    noise: Tensor | None = None
    forced: int = -1
    ratios: Mapping[int, Tensor] = field(default_factory=dict)
    learned: int | None = None
    replay: Mapping[tuple[int, int], Any] = field(default_factory=dict)
    outputs: dict[tuple[int, int], Any] = field(default_factory=dict)
    eps: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Watch:
    """A pipeline under watch: what its next call does, and the run that the plan prepared."""

    trial: _Trial = field(default_factory=_Trial)
    run: Run | None = None


class _Probe(Part):
    """Stands for a part of the plan while the pipeline is watched."""

    type: Literal["probe"] = "probe"
    inner: Any
    watch: Any

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        self.inner.prepare(run, known_arguments)
        self.watch.run, process = run, run.process
        run.hooks.append(lambda: _Watching(self.watch.trial, process))


class _Watching(CallHook):
    """Carries out a trial."""

    def __init__(self, trial: _Trial, process: Process) -> None:
        self.trial, self.process = trial, process

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        trial, index = self.trial, evaluation.index
        key = (index, evaluation.ordinal)
        if index <= trial.forced:
            evaluation = evaluation.with_inputs(**{evaluation.state_name: self._noised(evaluation.x, evaluation.time)})
        if key in trial.replay:
            return trial.replay[key]
        if index in trial.ratios:
            if index == trial.learned:
                torch.set_grad_enabled(True)  # until the pipeline's own no_grad ends
            evaluation = _told(evaluation, trial.ratios[index])
        output = trial.outputs[key] = proceed(evaluation)
        return output

    def before_step(self, step: Step) -> None:
        trial = self.trial
        if step.index <= trial.forced:
            step.x = self._noised(step.x, step.time)
        trial.eps[step.index] = step.process.to_eps(predicted(step), step.x, step.time)
        if step.index == trial.stop:
            raise _Reached

    def _noised(self, like: Tensor, time: float) -> Tensor:
        """The noised samples in the rows, dtype and device of ``like``."""
        clean, noise = self.trial.clean, self.trial.noise
        assert clean is not None
        assert noise is not None
        if like.shape[1:] != clean.shape[1:] or len(like) % len(clean):
            raise InputError(
                f"the network is shown {tuple(like.shape)} for samples of shape {tuple(clean.shape)}; give the "
                "samples as the network sees them"
            )
        x = self.process.add_noise(clean, noise, time)
        return x.to(like).repeat(len(like) // len(clean), *(1,) * (like.ndim - 1))


def _told(evaluation: Evaluation, ratio: Tensor) -> Evaluation:
    """The evaluation told ``ratio`` times its time, differentiable in the ratio."""
    told = torch.as_tensor(evaluation.inputs[evaluation.time_name])
    unit = time_unit(evaluation.time, float(told.reshape(-1)[0]), type(evaluation.network).__name__)
    dtype = told.dtype if told.is_floating_point() else torch.float32
    value = unit(evaluation.time * ratio).to(evaluation.x.device, dtype).expand(evaluation.rows)
    return evaluation.with_inputs(**{evaluation.time_name: value})


@dataclass
class _Fit:
    """Runs of the watched pipeline that give losses.

    Args:
        pipe: the pipeline; watched while losses are asked for.
        watch: its watch.
        samples: (N, ...) clean samples.
        batch: how many at a time.
        seed: of batches, noise and the pipeline's generators.
        call: the pipeline's arguments for some of the samples.
    """

    pipe: Any
    watch: _Watch
    samples: Tensor
    batch: int
    seed: int
    call: Call
    guidance: float | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def losses(self, group: tuple[int, ...], ratios: list[Tensor], forced: bool) -> Iterator[tuple[int, Tensor]]:
        """The loss of each step in ``group``, on one fresh batch.

        Args:
            group: steps, ascending.
            ratios: all ratios.
            forced: whether states are noised samples, instead of those that the ratios lead to.
        """
        index = torch.randperm(len(self.samples), generator=self.generator)[: self.batch]
        clean = self.samples[index.to(self.samples.device)].cpu()
        noise = torch.randn(clean.shape, generator=self.generator, dtype=clean.dtype)
        last = group[-1]
        before = {} if forced else {step: ratios[step].detach() for step in range(last)}
        plain = self._run(index, _Trial(last, clean, noise, last if forced else 0, before))
        for step in group:
            replay = {key: output for key, output in plain.outputs.items() if key[0] < step}
            trial = _Trial(step + 1, clean, noise, step if forced else 0, {step: ratios[step]}, step, replay)
            landed = self._run(index, trial).eps[step + 1]
            yield step, (landed - plain.eps[step]).square().flatten(1).sum(1).mean()

    def _run(self, index: Tensor, trial: _Trial) -> _Trial:
        self.watch.trial = trial
        chosen = index.tolist()
        arguments = _arguments(self.call(chosen), self.seed, chosen)
        self.guidance = self._guidance(arguments)
        try:
            self.pipe(**arguments)
        except _Reached:
            return trial
        raise InputError(f"the pipeline took fewer steps than the plan's grid has; it never reached step {trial.stop}")

    @property
    def _prepared(self) -> Run:
        assert self.watch.run is not None
        return self.watch.run

    @property
    def solver(self) -> str:
        """Class name of the scheduler."""
        return type(self._prepared.scheduler).__name__

    def _guidance(self, arguments: dict[str, Any]) -> float | None:
        """The scale that guides, if the pipeline has one: the call's, the plan's, or the pipeline's default."""
        for name in ("true_cfg_scale", "guidance_scale"):
            default = inspect.signature(type(self.pipe).__call__).parameters.get(name)
            if default is not None:
                return float(arguments.get(name, self._prepared.call_arguments.get(name, default.default)))
        return None


def _batch_size_call(pipe: Any) -> Call:
    """The arguments of a pipeline that takes nothing but a number of images.

    Raises:
        InputError: when it takes something else.
    """
    if "batch_size" not in inspect.signature(type(pipe).__call__).parameters:
        raise InputError(
            f"{type(pipe).__name__} takes no batch_size; give call=, a function from the positions of samples to the "
            "pipeline's arguments for them, such as their class labels"
        )
    return lambda index: {"batch_size": len(index)}


def _arguments(arguments: dict[str, Any], seed: int, index: list[int]) -> dict[str, Any]:
    """The pipeline's arguments, with one seeded generator for each sample."""
    generators = [torch.Generator().manual_seed(seed + position) for position in index]
    return {"generator": generators, "output_type": "np"} | arguments


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Switches the pipeline's own progress bar off until the block ends."""
    kept = dict(vars(pipe))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if "_progress_bar_config" in kept:
            pipe._progress_bar_config = kept["_progress_bar_config"]
        else:
            del pipe._progress_bar_config
