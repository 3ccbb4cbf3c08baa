"""Measuring plans for a search: the same noise for all, a few images first and more for those that are worth it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..eval.conditions import Conditions
from ..eval.jackknife import BLOCKS, Estimate, mean_jackknife
from ..eval.metrics import KINDS, WHY_NOT, HeldImages, Need, Sample, needed, unmet_need
from ..eval.paired import psnr, ssim
from ..eval.quantise import to_uint8
from ..eval.timing import WARMUPS, Spread, count_flops, timed
from ..samplers import Plan
from ..samplers.errors import InputError
from ..samplers.stats import Stats
from .budget import Judges, relative_errors
from .cache import Call
from .objective import LEAST_IMAGES, PAIRED, RELATIVE_ERROR, Limit, Objective
from .runs import Run, batches, running
from .space import plan_key

KEPT_PLANS = 4
"Plans whose samples are kept, so that they can be measured on more of them; the teacher's are kept besides."

REPEATS = 5
"Calls behind a latency, after the warm-up."

PAIRS: Mapping[str, Callable[[Sample], Tensor]] = {
    "psnr": lambda sample: sample.pairs(psnr),
    "ssim": lambda sample: sample.pairs(ssim),
    "lpips": lambda sample: sample.pairs(needed(sample.lpips)),
    "feature_distance": lambda sample: sample.feature_distances,
}
"""Of each image its paired quality, (n,). A bench has the mean alone; here its replicates tell two plans apart."""


class CandidateError(Exception):
    """A plan that has no numbers: it does not run on the pipeline, or what it returns is not finite.

    Attributes:
        reason: why, in one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Measured:
    """What one plan has on n images.

    Attributes:
        plan: the plan.
        n: number of images.
        values: the quality and every other one that was asked for; each is a `Jackknife`, which can be paired with that
            of another plan on the same numbers.
        costs: ``nfe`` (network rows per image), and ``flops`` and ``latency_s`` of one image where asked for.
    """

    plan: Plan
    n: int
    values: Mapping[str, Estimate]
    costs: Mapping[str, float]

    @property
    def numbers(self) -> dict[str, float]:
        """Values without their errors, and costs."""
        return {name: value.value for name, value in self.values.items()} | dict(self.costs)


@dataclass
class _Held:
    """What is kept of the samples of one plan, by name and in the order of their numbers, and what one call costs."""

    plan: Plan
    kept: dict[str, Tensor] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.kept.get("nfe", ()))

    def add(self, found: Mapping[str, Tensor]) -> None:
        for name, rows in found.items():
            self.kept[name] = torch.cat([self.kept[name], rows]) if name in self.kept else rows

    def first(self, name: str, n: int) -> Tensor | None:
        return self.kept[name][:n] if name in self.kept else None


class Measurer:
    """Measures plans on common numbers of samples, so on the same noise and conditions.

    A plan that was measured on some images and is measured on more runs the new ones only. The same plan has the same
    numbers each time, to the last bit; the size of the batches changes rounding and nothing else. The latency alone
    depends on the machine and on what else it does.

    Args:
        pipe: a pipeline, with no plan attached; as it was after each measurement.
        objective: what is measured.
        call: from numbers of samples to the arguments of a call for them, seeds included.
        judges: what images are judged with.
        teacher: the plan that paired qualities and limits compare with.
        also: further qualities and costs, by name; a quality that needs more images than there are is left out.
        batch_size: samples in a call.
        first: number of the first sample.

    Attributes:
        spent: network rows that were run so far, those of the teacher, of failed plans and of timing included.

    Raises:
        InputError: for a quantity that is unknown or cannot be measured, or too few images for it.
    """

    def __init__(
        self,
        pipe: Any,
        objective: Objective,
        call: Call,
        judges: Judges | None = None,
        *,
        teacher: Plan | None = None,
        also: tuple[str, ...] = (),
        batch_size: int = 64,
        first: int = 0,
    ) -> None:
        for name in also:
            Limit.check_quantity(name)
        if batch_size < 1:
            raise InputError(f"a call has at least one sample; got a batch size of {batch_size}")
        self.spent = 0
        self._pipe, self._objective, self._call = pipe, objective, call
        self._judges = judges or Judges()
        self._also = frozenset(also).difference(objective.quantities)
        self._quantities = tuple(dict.fromkeys((*objective.quantities, *also)))
        self._batch_size, self._first = batch_size, first
        self._teacher = _Held(teacher) if teacher is not None else None
        self._plans: OrderedDict[str, _Held] = OrderedDict()
        self._conditions: dict[int, Conditions] = {}
        self._teacher_at: dict[int, Measured] = {}
        self._check_teacher()
        for n in objective.rungs:
            self._check_needs(n)

    def measure(self, plan: Plan, n: int) -> Measured:
        """A plan on the first n samples.

        Raises:
            CandidateError: when the plan does not run, or what it returns is not finite.
            InputError: for too few images, a teacher that cannot be measured, or images that a metric cannot judge.
        """
        self._check_needs(n)
        teacher = self._grown_teacher(n) if not PAIRED.isdisjoint(self._quantities) else None
        return self._judged(self._grown(self._held(plan), n), n, teacher)

    def measure_teacher(self, n: int) -> Measured:
        """The teacher on the first n samples, without what compares with itself; judged once for each n.

        Raises:
            InputError: when there is none, or it cannot be measured.
        """
        self._check_needs(n)
        if n not in self._teacher_at:
            self._teacher_at[n] = self._judged(self._grown_teacher(n), n, None)
        return self._teacher_at[n]

    def _check_teacher(self) -> None:
        if self._teacher is not None:
            return
        for name in self._quantities:
            if name in PAIRED:
                raise InputError(f"{name} compares with a teacher's samples; give its plan, or another quantity")
        for limit in self._objective.limits:
            if limit.relative:
                raise InputError(f"the limit {limit} needs a teacher; give its plan, or a number")

    def _check_needs(self, n: int) -> None:
        if n < LEAST_IMAGES:
            raise InputError(f"a plan is measured on at least {LEAST_IMAGES} images; got {n}")
        for kind in self._quantities:
            need = self._unmet(kind, n)
            if need == "moments":
                if kind not in self._also:
                    raise self._too_few(kind, n)
            elif need is not None:
                raise InputError(f"{kind} cannot be measured: {WHY_NOT[need]}")

    def check_enough(self, n: int) -> None:
        """Refuses fewer images than some quantity needs.

        Args:
            n: the most that anything is measured on.

        Raises:
            InputError: naming the quantity.
        """
        for kind in self._quantities:
            if self._unmet(kind, n) == "moments":
                raise self._too_few(kind, n)

    def _unmet(self, kind: str, n: int) -> Need | None:
        """What a quantity lacks on n images; None for one that needs nothing."""
        judges = self._judges
        if kind not in KINDS:
            return None
        return unmet_need(
            kind, net=judges.net, real=judges.real, clip=judges.clip, lpips=judges.lpips, asked=self._asked, n=n
        )

    def _too_few(self, kind: str, n: int) -> InputError:
        net = needed(self._judges.net)
        return InputError(
            f"{kind} needs at least {2 * net.dim} images, twice the {net.dim} dimensions of {net.name}; got {n}; "
            "measure on more, or take kd"
        )

    @property
    def _asked(self) -> str:
        return self._conditions_of(LEAST_IMAGES).kind

    def _conditions_of(self, n: int) -> Conditions:
        """What the first n samples were to show, the first of them as seed 0."""
        if n not in self._conditions:
            arguments = self._call(range(self._first, self._first + n))
            prompts = arguments.get("prompt")
            if arguments.get("class_labels") is not None:
                labels = torch.as_tensor(arguments["class_labels"]).reshape(-1).tolist()
                self._conditions[n] = Conditions("labels", tuple(labels))
            elif prompts is not None:
                self._conditions[n] = Conditions("prompts", (prompts,) if isinstance(prompts, str) else tuple(prompts))
            else:
                self._conditions[n] = Conditions("none")
        return self._conditions[n]

    def _held(self, plan: Plan) -> _Held:
        """What is kept of a plan; the plan that waited longest is forgotten for a new one."""
        key = plan_key(plan)
        if self._teacher is not None and key == plan_key(self._teacher.plan):
            return self._teacher
        held = self._plans.setdefault(key, _Held(plan))
        self._plans.move_to_end(key)
        while len(self._plans) > KEPT_PLANS:
            self._plans.popitem(last=False)
        return held

    def _grown_teacher(self, n: int) -> _Held:
        if self._teacher is None:
            raise InputError("there is no teacher to measure; give its plan")
        try:
            return self._grown(self._teacher, n)
        except CandidateError as error:
            raise InputError(f"the teacher's plan cannot be measured: {error.reason}") from error

    def _grown(self, held: _Held, n: int) -> _Held:
        """Runs what is missing of the first n samples; batches end at rungs, so that they are the same in one go."""
        missing = {"flops", "latency_s"}.intersection(self._quantities) - held.single.keys()
        edges = sorted({edge for edge in (len(held), n, *self._objective.rungs) if len(held) <= edge <= n})
        if len(held) < n or missing:
            with self._running(held.plan) as run:
                for start, end in pairwise(edges):
                    for batch in batches(range(self._first + start, self._first + end), self._batch_size):
                        held.add(self._kept(run(batch)))
                held.single |= {name: self._cost(name, run) for name in sorted(missing)}
        return held

    @contextmanager
    def _running(self, plan: Plan) -> Iterator[Callable[[range], Run]]:
        with ExitStack() as stack:
            with _blamed_on_the_plan():
                run = stack.enter_context(running(self._pipe, plan, self._count))

            def sample(numbers: range) -> Run:
                arguments = self._call(numbers)
                with _blamed_on_the_plan():
                    return run(arguments, numbers[0])

            yield sample

    def _count(self, stats: Stats) -> None:
        self.spent += stats.rows

    def _kept(self, run: Run) -> dict[str, Tensor]:
        """What the quantities see of a batch."""
        count = len(run.samples)
        bad = count - int(torch.isfinite(run.samples).flatten(1).all(1).sum())
        if bad:
            raise CandidateError(f"{bad} of {count} samples hold NaN or infinity")
        found = {"nfe": torch.full((count,), run.stats.nfe, dtype=torch.float64)}
        if RELATIVE_ERROR in self._quantities:
            found["samples"] = run.samples
        kinds = [kind for kind in self._quantities if kind in KINDS]
        by_net = [kind for kind in kinds if "net" in KINDS[kind].needs]
        if kinds:
            images = to_uint8(run.samples)
            if len(by_net) < len(kinds):
                found["images"] = images
            if by_net and self._judges.net is not None:
                found["features"] = self._judges.net(images)
        return found

    def _cost(self, name: str, run: Callable[[range], Run]) -> float:
        def one() -> None:
            run(range(self._first, self._first + 1))

        if name == "flops":
            flops = count_flops(one)
            if flops is None:
                kind = type(self._pipe).__name__
                raise InputError(f"torch counts no operation of {kind}, so it has no flops; take nfe or latency_s")
            return float(flops)
        for _ in range(WARMUPS):
            one()
        return Spread.of([timed(one, self._pipe.device) for _ in range(REPEATS)]).median

    def _judged(self, held: _Held, n: int, teacher: _Held | None) -> Measured:
        sample = self._sample(held, n, None if teacher is None else self._sample(teacher, n, None))
        values: dict[str, Estimate] = {}
        for name in self._quantities:
            if self._unmet(name, n) is not None:
                continue
            if name not in PAIRED and name in KINDS:
                values[name] = KINDS[name].estimate(sample)
            elif name in PAIRED and teacher is not None:
                both = (held.first("samples", n), teacher.first("samples", n))
                each = relative_errors(*map(needed, both)) if name == RELATIVE_ERROR else PAIRS[name](sample)
                values[name] = mean_jackknife(each, min(BLOCKS, n // 2))
        return Measured(held.plan, n, values, {"nfe": held.kept["nfe"][:n].mean().item()} | held.single)

    def _sample(self, held: _Held, n: int, reference: Sample | None) -> Sample:
        return Sample(
            images=HeldImages(range(n), held.first("images", n)),
            conditions=self._conditions_of(n),
            vectors=held.first("features", n),
            net=self._judges.net,
            real=self._judges.real,
            clip=self._judges.clip,
            lpips=self._judges.lpips,
            reference=reference,
        )


@contextmanager
def _blamed_on_the_plan() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise CandidateError(str(error)) from error
