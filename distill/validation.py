"""Images and scores of the student while it trains, as it will be deployed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from ..eval.conditions import Conditions
from ..eval.features import FeatureNet, metric_name
from ..eval.generate import sample_images
from ..eval.jackknife import Estimate, mean_estimate
from ..eval.metrics import KINDS, HeldImages, Sample
from ..eval.paired import feature_distance, psnr
from ..eval.reference import RealImages
from ..samplers import Plan, PlanWarning, attach
from ..samplers.errors import InputError
from ..samplers.files import atomic_path
from .export import Student, call_arguments, deployed_plan
from .pictures import Row, labelled_rows

FOLDER = "validation"


@dataclass(frozen=True)
class Judge:
    """What the images are judged by.

    Attributes:
        net: the feature network.
        real: real images; None to compare with the teacher alone.
        count: images that are compared with real ones; 0 for none.
    """

    net: FeatureNet
    real: RealImages | None = None
    count: int = 0


@dataclass(frozen=True)
class Shown:
    """What is looked at.

    Attributes:
        conditions: what the images show.
        count: of images in a row, at least 1; their seeds are 0, 1, 2, ...
        call_kwargs: further arguments of the pipeline's call.
        batch_size: images per call.
    """

    conditions: Conditions
    count: int = 8
    call_kwargs: Mapping[str, Any] | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise InputError(
                f"a validation shows at least 1 image, in batches of at least 1; got {self.count} and {self.batch_size}"
            )


class Validation:
    """Samples the student, or its average, by its plans, beside the teacher.

    A `Watch`: after every so many updates it writes ``validation/step-000500.png``, hands the picture to the trackers
    that show images, and returns numbers for the log. The main process samples, the others wait; with networks that
    are cut over the processes they sample the same, because each has a part of the weights. Training does not notice:
    random generators, roles and the pipeline are as before afterwards, and a validation that fails warns.

    Args:
        student: while it trains.
        teacher: how the teacher samples.
        accelerator: of the run.
        folder: of the run.
        every: updates between validations.
        last: number of the last update, which is always followed by one.
        shown: what is looked at.
        judge: for distances of features; None for the peak signal-to-noise ratio to the teacher alone.
    """

    def __init__(
        self,
        student: Student,
        teacher: Plan,
        accelerator: Accelerator,
        *,
        folder: Path,
        every: int,
        last: int,
        shown: Shown,
        judge: Judge | None = None,
    ) -> None:
        self.student = student
        # the network carries adapters by now, which are other weights to a plan that knows its fingerprint
        self.teacher = teacher.model_copy(update={"tuned_for": None})
        self.accelerator, self.folder = accelerator, folder / FOLDER
        self.every, self.last, self.shown, self.judge = every, last, shown, judge
        self._reference: Tensor | None = None
        self._reference_features: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether it is time to validate after so many updates."""
        return step % self.every == 0 or step == self.last

    def __call__(self, step: int) -> dict[str, float]:
        """Validates if it is time to.

        Args:
            step: updates so far.

        Returns:
            Numbers of the main process, ``validation/METRIC/STEPS``, and their standard errors,
            ``validation/METRIC_se/STEPS``; nothing when it is not the time.

        Raises:
            torch.OutOfMemoryError: where networks are cut: the other processes would wait for this one's weights.
        """
        if not self.due(step):
            return {}
        values: dict[str, float] = {}
        shared = self.student.team.sharing is not None
        if self.accelerator.is_main_process or shared:
            try:
                with _own_generators(self.accelerator.device):
                    values = self._validate(step)
            except (InputError, torch.OutOfMemoryError) as error:
                if shared and isinstance(error, torch.OutOfMemoryError):
                    raise
                warnings.warn(f"the validation after update {step} failed, training goes on: {error}", stacklevel=2)
            if self.accelerator.device.type != "cpu":
                torch.get_device_module(self.accelerator.device).empty_cache()
        self.accelerator.wait_for_everyone()
        return values

    def _validate(self, step: int) -> dict[str, float]:
        if self._reference is None:
            self._reference = self._sampled(self.teacher, self.shown.count)
            if self.judge is not None:
                self._reference_features = self.judge.net(self._reference)
        rows = [Row("teacher", _steps_of(self.teacher), self._reference)]
        values: dict[str, float] = {}
        student, roles = self.student, self.student.team.roles
        with roles.use(student.deployed_role, grad=False, frozen=True) as network, self._inserted(network):
            for steps, plan in sorted(student.plans.items(), reverse=True):
                deployed = deployed_plan(student.pipe, network, student.method, plan)
                images = self._sampled(deployed, max(self.shown.count, self.judge.count if self.judge else 0))
                scores = self._scores(images)
                rows.append(Row(f"{steps} step{'s' * (steps != 1)}", _notes(scores), images[: self.shown.count]))
                for name, estimate in scores.items():
                    values[f"validation/{name}/{steps}"] = estimate.value
                    values[f"validation/{name}_se/{steps}"] = estimate.se
        if not self.accelerator.is_main_process:
            return {}
        picture = labelled_rows(f"{student.method.type}, update {step:,}", self._heads(), rows)
        with atomic_path(self.folder / f"step-{step:06d}.png") as temporary:
            picture.save(temporary, format="PNG")
        show(self.accelerator, picture, step)
        return values

    def _sampled(self, plan: Plan, count: int) -> Tensor:
        """Images of the seeds below ``count`` by a plan, uint8 (count, C, H, W)."""
        pipe, size, conditions = self.student.pipe, self.shown.batch_size, self.shown.conditions
        arguments = call_arguments(plan, self.shown.call_kwargs or {})
        with warnings.catch_warnings(action="ignore", category=PlanWarning), attach(pipe, plan):
            batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
            return torch.cat([sample_images(pipe, conditions, batch, arguments)[0].cpu() for batch in batches])

    def _scores(self, images: Tensor) -> dict[str, Estimate]:
        """Scores of images of the seeds from 0 on."""
        assert self._reference is not None
        paired = len(self._reference)
        distances = {"psnr": psnr(images[:paired], self._reference)}
        if self.judge is None:
            return {name: _mean(values) for name, values in distances.items()}
        net, real, count = self.judge.net, self.judge.real, self.judge.count
        features = torch.cat([net(batch) for batch in torch.split(images, self.shown.batch_size)])
        assert self._reference_features is not None
        distances["feature_distance"] = feature_distance(features[:paired], self._reference_features)
        scores = {name: _mean(values) for name, values in distances.items()}
        if real is not None and count >= 4:
            sample = Sample(
                HeldImages(range(count), images[:count]), self.shown.conditions, features[:count], net, real,
                clip=None, lpips=None, reference=None,
            )  # fmt: skip
            scores[metric_name(net.name, count, net.dim)] = KINDS["fd"].estimate(sample)
        return scores

    @contextmanager
    def _inserted(self, network: nn.Module) -> Iterator[None]:
        """The pipeline with ``network`` in it; weights of a wider type are cast to the pipeline's as they are used."""
        parts, component = self.student.pipe.__dict__, self.student.component
        own = parts[component]
        held, wanted = (next(each.parameters()).dtype for each in (network, own))
        parts[component] = network
        try:
            with torch.autocast(self.accelerator.device.type, wanted, enabled=held != wanted):
                yield
        finally:
            parts[component] = own

    def _heads(self) -> list[str]:
        """What each column shows."""
        kind, seeds = self.shown.conditions.kind, range(self.shown.count)
        if kind == "none":
            return [f"seed {seed}" for seed in seeds]
        shown: Sequence[Any] = next(iter(self.shown.conditions.inputs(seeds).values()))
        names = {number: name for name, number in (getattr(self.student.pipe, "labels", None) or {}).items()}
        return [str(value) if kind == "prompts" else str(names.get(value, f"class {value}")) for value in shown]


def show(accelerator: Accelerator, picture: Image.Image, step: int) -> None:
    """Hands a picture to those of the open trackers that show images."""
    pixels = np.asarray(picture)
    for tracker in accelerator.trackers:
        name = tracker.name
        if name == "tensorboard":
            tracker.log_images({FOLDER: pixels[None]}, step=step, dataformats="NHWC")
        elif name in ("wandb", "swanlab"):
            tracker.log_images({FOLDER: [pixels]}, step=step)
        elif name in ("aim", "clearml"):
            tracker.log_images({FOLDER: pixels}, step=step)


def _mean(values: Tensor) -> Estimate:
    return mean_estimate(values) if len(values) > 1 else Estimate(values.item(), 0.0, 1)


def _steps_of(plan: Plan) -> tuple[str, ...]:
    return () if plan.nominal_steps is None else (f"{plan.nominal_steps} steps",)


def _notes(scores: Mapping[str, Estimate]) -> tuple[str, ...]:
    return tuple(
        f"psnr {score.value:.1f} dB" if name == "psnr" else f"{name.replace('_', ' ')} {score.value:.3g}"
        for name, score in scores.items()
    )


def _own_generators(device: torch.device) -> Any:
    """Leaves torch's global generators as they were at the start of the block."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
