"""Conformance tests for parts of a plan, in the package so that you can run them on your own part.

Subclass in a pytest file and give the factories; every test below then runs on your part::

    class TestMySolver(PartConformance):
        def part(self):
            return MySolver(order=3)

        def pipe(self):
            return tiny_pipeline()

        def call(self, pipe):
            return {"class_labels": [1, 2], "generator": torch.Generator().manual_seed(0), "output_type": "np"}
"""

from __future__ import annotations

import copy
import inspect
import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from .attach import attach
from .errors import InputError
from .explicit import grid_adapter
from .part import Part, Run, Slot
from .plan import Plan
from .process import Process
from .samples import count_samples, select_samples
from .wrapped import wrap_scheduler


def slot_of(part: Part) -> str:
    """The field of `Plan` whose registry holds the class of ``part``.

    Raises:
        InputError: when the part is not registered.
    """
    for name, info in Plan.model_fields.items():
        for slot in info.metadata:
            if isinstance(slot, Slot) and part.type in slot.registry and slot.registry[part.type] is type(part):
                return name
    raise InputError(f"{type(part).__name__} is in no registry of a plan's slots; register it under {part.type!r}")


class PartConformance:
    """What every part of a plan must do. Subclass it and give the three factories."""

    @abstractmethod
    def part(self) -> Part:
        """The part under test."""

    @abstractmethod
    def pipe(self) -> Any:
        """A small pipeline that the part works on; the same weights at every call."""

    @abstractmethod
    def call(self, pipe: Any) -> dict[str, Any]:
        """Arguments of a call of ``pipe``, with fresh generators and ``output_type="np"``."""

    def resources(self) -> dict[str, Any]:
        """What the part asks for by name; nothing, unless you override this."""
        return {}

    def folder(self) -> Path | None:
        """Where the files are that the part names, for ``plan.json`` beside them; None when it names none."""
        return None

    def plan(self) -> Plan:
        """A plan with just this part."""
        part, folder = self.part(), self.folder()
        plan = Plan(**{slot_of(part): part})
        if folder is None:
            return plan
        plan.save(folder / "plan.json")
        return Plan.load(folder / "plan.json")

    def test_survives_json(self) -> None:
        plan = self.plan()
        again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        held = getattr(again, slot_of(self.part()))
        assert [type(part) for part in (held if isinstance(held, tuple) else (held,))] == [type(self.part())]

    def test_is_in_the_schema(self) -> None:
        assert self.part().type in json.dumps(Plan.model_json_schema()["properties"][slot_of(self.part())])

    def test_is_frozen_and_refuses_unknown_fields(self) -> None:
        part = self.part()
        for change in ({"type": "other"}, {"no_such_field": 1}):
            try:
                type(part).model_validate(part.model_dump() | change)
            except ValidationError:
                continue
            raise AssertionError(f"{type(part).__name__} accepts {change}")

    def test_prepare_does_not_touch_the_pipeline(self) -> None:
        pipe = self.pipe()
        before, scheduler = dict(vars(pipe)), copy.deepcopy(vars(pipe.scheduler))
        run = Run(pipe, copy.deepcopy(pipe.scheduler), resources=self.resources(), folder=self.folder())
        self.part().prepare(run, frozenset({"num_inference_steps", "guidance_scale", "guidance_rescale"}))
        assert vars(pipe) == before
        assert str(vars(pipe.scheduler)) == str(scheduler)

    def test_runs_the_same_twice_and_leaves_no_trace(self) -> None:
        pipe = self.pipe()
        plain = pipe(**self.call(pipe)).images
        images = []
        for _ in range(2):
            with attach(pipe, self.plan(), self.resources()) as handle:
                images.append(pipe(**self.call(pipe)).images)
            assert handle.stats is not None
            assert handle.stats.nfe > 0
        np.testing.assert_array_equal(images[0], images[1])
        assert np.isfinite(images[0]).all()
        np.testing.assert_array_equal(pipe(**self.call(pipe)).images, plain)

    def test_a_batch_is_the_stack_of_single_runs(self) -> None:
        """Up to rounding: a matrix product of another size may add in another order."""
        pipe = self.pipe()
        count = count_samples("conformance", self.call(pipe))
        assert count > 1, "call() must ask for several samples"
        with attach(pipe, self.plan(), self.resources()):
            together = pipe(**self.call(pipe)).images
            for row in range(count):
                alone = pipe(**select_samples("conformance", self.call(pipe), [row], count)).images
                np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-4)

    def test_the_global_generator_is_left_alone(self) -> None:
        pipe, resources = self.pipe(), self.resources()
        state, images = torch.get_rng_state(), []
        try:
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.get_rng_state()
                with attach(pipe, self.plan(), resources):
                    images.append(pipe(**self.call(pipe)).images)
                assert torch.equal(torch.get_rng_state(), before)
        finally:
            torch.set_rng_state(state)
        np.testing.assert_array_equal(images[0], images[1])

    def test_works_with_and_without_guidance(self) -> None:
        """On a pipeline that takes a guidance scale, unless the part or the call sets one."""
        pipe = self.pipe()
        guided = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters
        if slot_of(self.part()) == "guidance" or not guided or "guidance_scale" in self.call(pipe):
            return
        rows = []
        for scale in (1.0, 3.0):
            with attach(pipe, self.plan(), self.resources()) as handle:
                assert np.isfinite(pipe(**self.call(pipe), guidance_scale=scale).images).all()
            assert handle.stats is not None
            rows.append(handle.stats.rows)
        assert rows[1] > rows[0]


class ExplicitGridConformance:
    """What a scheduler must do that claims to run explicit grids. Subclass it and give the scheduler.

    ``grid`` is an uneven one within its range. ``stops`` is the time at which the scheduler stops, where that is not
    clean data but its smallest noise level.
    """

    grid: tuple[float, ...] = (960.0, 700.0, 431.0, 102.0, 14.0)
    stops: float | None = None

    @abstractmethod
    def scheduler(self) -> Any:
        """A fresh scheduler."""

    def test_tells_the_network_the_listed_times(self) -> None:
        """In their order; again, or with points of the scheduler's own between, where it evaluates more than once."""
        listed: list[float] = torch.tensor(self.grid, dtype=torch.float32).tolist()
        told: list[float] = self._wrapped().timesteps.float().tolist()
        assert list(dict.fromkeys(time for time in told if time in listed)) == listed
        assert told[0] == listed[0]
        assert told[-1] == listed[-1]

    def test_ends_at_the_only_point_of_a_point_distribution(self) -> None:
        """For data that is a single point, the true network sends every sampler to that point, whatever the grid."""
        scheduler = self._wrapped()
        process = Process.from_scheduler(scheduler)
        point = torch.full((2, 3), 0.4, dtype=torch.float64)
        x = process.add_noise(point, torch.randn(2, 3, dtype=torch.float64), self.grid[0])
        x = x * process.scheduler_state_scale(self.grid[0])
        for t in scheduler.timesteps:
            scale = process.scheduler_state_scale(float(t))
            output: Tensor = process.from_x0(point, x / scale, float(t))
            getattr(scheduler, "init_noise_sigma", None)  # the read says that x is in the scheduler's state space
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            x = scheduler.step(output, t, x, return_dict=False)[0]
        left = 0.0 if self.stops is None else 5 * float(process.sigma(self.stops))
        torch.testing.assert_close(x, point, rtol=0, atol=2e-3 + left)

    def _wrapped(self) -> Any:
        scheduler = self.scheduler()
        wrap_scheduler(scheduler, grid_adapter(scheduler, self.grid))
        scheduler.set_timesteps(len(self.grid))
        return scheduler
