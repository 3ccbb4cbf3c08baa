"""A student samples, a judge looks, and a teacher finishes what the judge rejects."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from .attach import attach
from .errors import InputError
from .models import MODELS
from .part import Part, Run, Sampling
from .plan import Plan
from .samples import conditions_of, count_samples, merge_outputs, select_samples, with_first
from .scoring import Judged, finished, images_in, refuse_without_images, score
from .stats import Stats, Work
from .teacher_pass import Begin, TeacherPass, landing

NAME = "escalate"

NONE_ESCALATED = -1e300
"A threshold that no score is below."


@MODELS.register("escalate")
class Escalate(Part):
    """Adaptive teacher-student collaboration (arXiv:2312.10835), per sample.

    The rest of the plan is the student. Its samples are scored; those below the threshold are noised again and
    finished by the teacher: another plan, on the pipeline's own network or, by a ``model-switch`` part of its own, on
    another one. This is the paper's refinement strategy, in latent space: nothing is decoded and encoded again.

    A rejected sample's noise comes from a generator that is seeded by one draw from the sample's own, so that with one
    generator a sample nothing depends on the other samples of a batch. Scores and the teacher's evaluations are
    counted (``Stats.work``; ``Stats.rows`` has the teacher's rows too).
    """

    type: Literal["escalate"] = "escalate"
    teacher: dict[str, Any] = Field(description="The plan that finishes rejected samples, with a grid.")
    strength: float = Field(
        gt=0, le=1, description="Share of the teacher's grid that runs on a rejected sample; it is noised to its start."
    )
    threshold: float = Field(description="Samples that score lower are rejected; calibrate_escalation finds it.")
    scorer: str = Field(default="scorer", min_length=1, description="The resource that scores.")
    samples: Judged = Field(default="images", description="What the scorer sees.")
    calibration_n: int | None = Field(default=None, ge=1, description="How many samples the threshold comes from.")
    calibration_percentile: float | None = Field(
        default=None, gt=0, lt=100, description="Per cent of those samples that score below it."
    )
    calibration_guidance: float | None = Field(
        default=None, description="The guidance_scale that those were sampled with; calls with another one are refused."
    )

    @field_validator("teacher", mode="before")
    @classmethod
    def _as_data(cls, teacher: Any) -> dict[str, Any]:
        plan = teacher if isinstance(teacher, Plan) else Plan.from_json(teacher, "teacher")
        return plan.to_json()

    @model_validator(mode="after")
    def _possible(self) -> Escalate:
        plan = self.teacher_plan
        if plan.grid is None:
            raise ValueError("the teacher needs a grid; add a grid part to its plan")
        if plan.grid.type == "adaptive-steps":
            raise ValueError("the teacher runs one grid; give it another one than 'adaptive-steps'")
        if plan.start is not None:
            raise ValueError(
                f"the teacher starts from the student's samples; remove its {plan.start.type!r} start part"
            )
        if isinstance(plan.models, Escalate):
            raise ValueError("a teacher does not escalate; give one teacher")
        return self

    @property
    def teacher_plan(self) -> Plan:
        """The plan that finishes rejected samples."""
        return Plan.from_json(self.teacher, "teacher")

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return tuple(name for part in self.teacher_plan.parts for name in part.files)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Attaches the teacher to a copy of the pipeline, and decides over the run's calls.

        Raises:
            InputError: when there is no scorer, or the teacher cannot run on the pipeline.
        """
        scorer = run.resource(NAME, self.scorer)
        plan = self.teacher_plan
        plan._folder = run.folder
        try:
            teacher = TeacherPass(run.own_pipe, plan, self.strength, run.resources)
        except InputError as error:
            raise InputError(f"teacher of the escalate part: {error}") from None
        run.warnings.extend(f"teacher of the escalate part: {sentence}" for sentence in teacher.handle.warnings)
        parameters = inspect.signature(type(run.pipe).__call__).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        run.arounds.append(_Escalation(self, run, scorer, teacher, defaults, landing(run)))


@dataclass(frozen=True)
class _Escalation:
    """Decides over one call after another; keeps nothing between them."""

    part: Escalate
    student: Run
    scorer: Any
    teacher: TeacherPass
    defaults: Mapping[str, Any]
    listen: Callable[[Callable[[], Any]], tuple[Any, Tensor]]

    def __call__(self, arguments: dict[str, Any], sampling: Sampling) -> Any:
        count = count_samples(NAME, arguments)
        self._check_guidance(arguments)
        images = self.part.samples == "images"
        output_type = str(arguments.get("output_type", self.defaults.get("output_type")))
        if images:
            refuse_without_images(NAME, output_type)
            arguments = arguments | {"output_type": "pt"}
        output, landed = self.listen(lambda: sampling.run(arguments))
        landed = landed[:count]
        scores = self._judged(images_in(output) if images else landed, conditions_of(arguments, count), sampling)
        rejected = (scores < self.part.threshold).nonzero()[:, 0].tolist()
        if rejected:
            taught = self._taught(arguments, rejected, landed, sampling)
            output = merge_outputs([(range(count), output), (rejected, taught)], count)
        if images:
            output = with_first(output, finished(self.student.pipe, images_in(output), output_type))
        return output

    def _check_guidance(self, arguments: Mapping[str, Any]) -> None:
        wanted = self.part.calibration_guidance
        given = arguments.get("guidance_scale", self.defaults.get("guidance_scale"))
        if wanted is not None and given != wanted:
            raise InputError(
                f"the escalation's threshold was calibrated at guidance_scale={wanted}; got {given} in the call; "
                "calibrate it again at this scale"
            )

    def _judged(self, samples: Tensor, conditions: Mapping[str, Any], sampling: Sampling) -> Tensor:
        """Scores, (B,), counted."""
        began = _clock(samples)
        scores = score(self.scorer, samples, conditions)
        work = Work(self.part.scorer, len(samples), 1, _clock(samples) - began)
        sampling.add(Stats(0.0, 0, 0, (), True, work=(work,)))
        return scores

    def _taught(self, arguments: dict[str, Any], rows: Sequence[int], landed: Tensor, sampling: Sampling) -> Any:
        """The teacher's output for the samples ``rows``."""
        own = self.teacher.sets | self.student.call_arguments.keys()
        own |= {"num_inference_steps", "timesteps", "sigmas", "latents", "generator"}
        kept = {name: value for name, value in arguments.items() if name not in own}
        call = select_samples(NAME, kept, rows, len(landed))
        generators = fresh_generators(arguments.get("generator"), rows, len(landed))
        if "generator" in self.defaults:
            call["generator"] = generators
        noise = [
            torch.randn(landed.shape[1:], generator=g, device=g.device, dtype=landed.dtype).to(landed.device)
            for g in generators
        ]
        began = _clock(landed)
        output = self.teacher.run(call, Begin(landed[list(rows)], torch.stack(noise)))
        seconds = _clock(landed) - began
        stats = self.teacher.handle.stats
        assert stats is not None
        work = Work("teacher", len(rows), sum(step.evaluations for step in stats.steps), seconds)
        sampling.add(replace(stats, work=(*stats.work, work)))
        return output


def _clock(like: Tensor) -> float:
    """Seconds, once everything that the device of ``like`` was asked for is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def fresh_generators(given: Any, rows: Sequence[int], count: int) -> list[torch.Generator]:
    """A new generator for each of the samples ``rows``, seeded by one draw from the sample's own.

    Args:
        given: the call's generators: one a sample, one for all (one draw a sample, whichever are asked for), or None
            (PyTorch's global one).
        rows: which samples.
        count: number of samples of the call.
    """
    if isinstance(given, list | tuple) and len(given) > 1:
        return [fresh_generators(given[row], [0], 1)[0] for row in rows]
    source = given[0] if isinstance(given, list | tuple) else given
    device = torch.device("cpu") if source is None else source.device
    seeds = torch.randint(2**63 - 1, (count,), generator=source, device=device).tolist()
    return [torch.Generator(device).manual_seed(seeds[row]) for row in rows]


def calibrate_escalation(
    pipe: Any,
    plan: Plan,
    scorer: Any,
    call: Callable[[Sequence[int]], dict[str, Any]],
    n: int,
    percentile: float = 50.0,
    *,
    batch_size: int = 16,
    resources: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan with the threshold below which ``percentile`` per cent of the student's samples score.

    The student samples just as it will when the plan runs: by the same plan, at the guidance of the same calls, which
    the plan then holds calls to. (The paper's code calibrates without guidance and samples with it.)

    Args:
        pipe: the pipeline.
        plan: a plan with an ``escalate`` part, whose threshold does not matter.
        scorer: what scores; see `fewstep.samplers.scoring.Scorer`.
        call: from the numbers of some samples, of 0 to n - 1, to the arguments of a call for them, seeds included.
        n: number of samples; 5000 in the paper.
        percentile: above 0 and below 100.
        batch_size: samples per call.
        resources: objects that other parts of the plan ask for.

    Raises:
        InputError: when the plan has no such part, or the calls do not fit together.
    """
    part = plan.models
    if not isinstance(part, Escalate):
        raise InputError("calibrate_escalation takes a plan with an escalate part; add one as its models part")
    if n < 1 or not 0 < percentile < 100:
        raise InputError(f"calibration needs n of at least 1 and a percentile between 0 and 100; got {n}, {percentile}")
    scores: list[Tensor] = []

    def listening(samples: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        scores.append(score(scorer, samples, conditions))
        return scores[-1]

    idle = part.model_copy(update={"threshold": NONE_ESCALATED, "calibration_guidance": None})
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    scales = set()
    with attach(
        pipe, plan.model_copy(update={"models": idle}), {**(resources or {}), part.scorer: listening}
    ) as handle:
        fixed = handle._run.call_arguments.get("guidance_scale", default.default if default else None)
        for first in range(0, n, batch_size):
            arguments = call(range(first, min(first + batch_size, n)))
            pipe(**arguments)
            scales.add(arguments.get("guidance_scale", fixed))
    found = torch.cat(scores)
    if len(found) != n or len(scales) != 1:
        raise InputError(
            f"the calls made {len(found)} samples at guidance {sorted(map(str, scales))}; "
            f"calibration needs n={n} at one guidance"
        )
    threshold = float(torch.quantile(found, percentile / 100))
    calibrated = {
        "threshold": threshold,
        "calibration_n": n,
        "calibration_percentile": percentile,
        "calibration_guidance": scales.pop(),
    }
    return plan.model_copy(update={"models": part.model_copy(update=calibrated)})
