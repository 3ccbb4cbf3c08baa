"""The preflight: what it says before and after a short run, and that it leaves the pipeline alone."""

import json

import pytest
import torch
from tiny import call_arguments, tiny_dit, tiny_qwen, tiny_stable_diffusion, tiny_unet, tiny_wan
from toy_cache import Blocks

from fewstep.samplers import (
    CacheHook,
    ConstantGuidance,
    DiffusersSolver,
    ExplicitGrid,
    Plan,
    SpacingGrid,
    TimeShift,
    attach,
    doctor,
)

ATTENTION = "transformer_blocks.0.attn1"


class SharedBetweenBranches(Blocks):
    """A cache that is wrong: it keeps one tensor for both branches."""

    def make(self, modules, run):
        return _Shared(modules)


class _Shared(CacheHook):
    kept = None

    def pass_module(self, passing):
        if self.kept is None:
            self.kept = passing.run()
        return self.kept


class Noisy(Blocks):
    """A cache that draws from the global generator."""

    def make(self, modules, run):
        return _Noise(modules)


class _Noise(CacheHook):
    def pass_module(self, passing):
        return passing.run() + torch.randn(())


def verdicts(report):
    return {finding.subject: finding.verdict for finding in report.findings}


def text(report, subject):
    return next(finding.text for finding in report.findings if finding.subject == subject)


def refused(report):
    return [finding.text for finding in report.findings if finding.verdict == "refused"]


@pytest.mark.parametrize("build", [tiny_dit, tiny_unet, tiny_stable_diffusion, tiny_wan])
def test_without_a_plan_it_says_what_could_be_and_changes_nothing(build):
    pipe = build()
    before = dict(vars(pipe))
    report = doctor(pipe)
    assert vars(pipe) == before
    assert report.ok
    assert verdicts(report)["grid: explicit"] == "runs"
    assert verdicts(report)["guidance: guidance"] == ("note" if build is tiny_unet else "runs")


def test_every_part_is_judged_by_itself():
    plan = Plan(
        name="bad",
        solver=DiffusersSolver(scheduler="AmusedScheduler"),
        grid=SpacingGrid(steps=4),
        guidance=ConstantGuidance(scale=2.0),
        caches=(Blocks(names=("nowhere",)), Blocks(names=(ATTENTION,), every=1)),
    )
    report = doctor(tiny_unet(), plan)
    assert not report.ok
    assert verdicts(report)["guidance: constant"] == "refused"
    assert "takes no argument 'guidance_scale'" in text(report, "guidance: constant")
    assert any("UNet2DModel has none of" in line for line in refused(report))


def test_a_grid_that_the_scheduler_cannot_run_is_found():
    report = doctor(tiny_dit(), Plan(grid=ExplicitGrid(timesteps=(2000.0, 10.0))))
    assert any("2000" in line for line in refused(report))


def test_a_cache_that_computes_every_step_is_refused():
    report = doctor(tiny_dit(), Plan(grid=SpacingGrid(steps=4), caches=Blocks(names=(ATTENTION,), every=1)))
    assert any("computes all of 4 steps: it would never save anything" in line for line in refused(report))


def test_says_how_far_a_cache_reaches():
    report = doctor(tiny_dit(), Plan(grid=SpacingGrid(steps=6), caches=Blocks(names=(ATTENTION,))))
    assert report.ok
    (finding,) = (finding for finding in report.findings if finding.subject == "caches: test-blocks")
    assert finding.text == (
        f"reaches 1 modules, transformer.{ATTENTION} to transformer.{ATTENTION}; computes 3 of 6 steps in full"
    )


@pytest.mark.parametrize(
    ("build", "name", "how"),
    [
        (tiny_dit, ATTENTION, "in one batch"),
        (tiny_wan, "blocks.0.attn2", "in turn"),
        (tiny_qwen, "transformer_blocks.0.attn", "in turn"),
    ],
)
def test_the_self_test_sees_the_branches_and_what_was_reused(build, name, how):
    pipe = build()
    more = {"true_cfg_scale": 3.0} if build is tiny_qwen else {}
    report = doctor(pipe, Plan(caches=Blocks(names=(name,))), lambda: call_arguments(pipe) | more)
    assert report.ok, str(report)
    assert text(report, "guidance") == f"two branches, {how}, told apart in every step"
    assert "4 of 8 rows of 1 modules were reused" in text(report, "caches")


def test_the_self_test_catches_a_cache_that_mixes_branches():
    pipe = tiny_wan()
    plan = Plan(caches=SharedBetweenBranches(names=("blocks.0",)))
    report = doctor(pipe, plan, lambda: call_arguments(pipe))
    assert refused(report) == ["the two branches became the same: a cache mixes them"]


def test_the_self_test_catches_a_cache_that_never_fires():
    pipe = tiny_dit()
    report = doctor(pipe, Plan(caches=Blocks(names=(ATTENTION,), every=100)), lambda: call_arguments(pipe))
    assert report.ok
    never = Plan(caches=Noisy(names=(ATTENTION,)))
    lines = refused(doctor(pipe, never, lambda: call_arguments(pipe)))
    assert "two runs on the same seeds differ: noise comes from elsewhere" in lines
    assert any(line.startswith("never fired: 0 of 8 rows") for line in lines)


def test_the_self_test_reports_a_failing_run():
    pipe = tiny_dit()
    report = doctor(pipe, Plan(grid=SpacingGrid(steps=2)), lambda: {"class_labels": ["no class"]})
    assert refused(report)[0].startswith("the pipeline fails without the plan:")


def test_parts_that_do_not_go_together_are_found():
    plan = Plan(conditioning=TimeShift(window=10), solver=DiffusersSolver(scheduler="EDMEulerScheduler"))
    report = doctor(tiny_unet(), plan)
    assert not report.ok
    assert verdicts(report)["conditioning: time-shift"] == "refused"


def test_an_attached_pipeline_is_refused():
    pipe = tiny_dit()
    with attach(pipe, Plan()):
        assert refused(doctor(pipe)) == ["a plan is attached to it; detach that one first"]
    assert refused(doctor(object())) == ["object is no diffusers pipeline with a scheduler"]


def test_prints_as_a_table_and_as_json():
    report = doctor(tiny_dit(), Plan(name="mine", grid=SpacingGrid(steps=4)))
    assert "DiTPipeline, mine" in str(report)
    assert "grid: spacing" in str(report)
    data = json.loads(json.dumps(report.to_json()))
    assert data["ok"] is True
    assert data["findings"][0] == {"subject": "grid: spacing", "verdict": "runs", "text": ""}
