"""Step Rehash: which steps compute, what is reused, and the calibration."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion, tiny_unet, tiny_wan
from zoo import ZOO

from fewstep.samplers import InputError, Plan, SpacingGrid, attach
from fewstep.samplers.block_mask import BlockMask
from fewstep.samplers.feature_changes import measure_changes
from fewstep.samplers.step_rehash import StepRehash


@pytest.mark.parametrize(
    ("threshold", "computed"),
    [(0.0, "111101"), (0.25, "101101"), (0.3, "101100"), (0.5, "100100"), (0.99, "100100"), (10.0, "100000")],
)
def test_changes_add_up_from_one_computed_step_to_the_next(threshold, computed):
    part = StepRehash(changes=(0.25, 0.25, 0.5, 0.0, 0.3), threshold=threshold)
    assert "".join("01"[value] for value in part.computes(6)) == computed


def test_a_budget_is_kept_with_the_smallest_threshold():
    """Against all ways to choose the steps: none with as few has a smaller largest sum."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        changes = tuple(torch.rand(6, generator=draw).tolist())

        def worst(computes, changes=changes):
            passed = [0.0]
            for value, change in zip(computes[1:], changes, strict=True):
                passed.append(0.0 if value else passed[-1] + change)
            return max(passed)

        for budget in range(1, 8):
            computed = StepRehash(changes=changes, budget=budget).computes(7)
            assert sum(computed) <= budget
            others = ((True, *rest) for rest in itertools.product((False, True), repeat=6) if sum(rest) < budget)
            assert worst(computed) == min(map(worst, others))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_transformer_is_what_a_block_mask_of_whole_rows_is_in_the_memory_of_one_block(order):
    """Up to rounding: the mask forecasts block by block and adds up, here the sum is forecast."""
    pipe = tiny_dit(layers=3)
    arguments = {"num_inference_steps": 5}
    with attach(pipe, Plan(caches=StepRehash(changes=(1, 1, 0.1, 0.1), threshold=0.15, order=order))) as whole:
        images = pipe(**call_arguments(pipe), **arguments).images
    with attach(pipe, Plan(caches=BlockMask(rows=("1", "1", "1", "0", "1"), order=order))) as apart:
        np.testing.assert_allclose(pipe(**call_arguments(pipe), **arguments).images, images, atol=2e-6)
    assert whole.stats.modules == apart.stats.modules
    assert 3 * whole.stats.cache_bytes == apart.stats.cache_bytes > 0


@pytest.mark.parametrize("build", [tiny_unet, tiny_stable_diffusion])
def test_a_unet_runs_its_first_level_on_what_the_others_gave_last(build):
    """Against a loop that puts the kept output of the last block beneath the first level into the U-Net by hand."""
    pipe = build()
    kept, step = [], itertools.count()

    def replace(module, args, output):
        if next(step) % 2:
            return kept[-1]
        kept.append(output)
        return output

    inner = pipe.unet.up_blocks[0].register_forward_hook(replace)
    expected = pipe(**call_arguments(pipe), num_inference_steps=4).images
    inner.remove()
    plain = pipe(**call_arguments(pipe), num_inference_steps=4).images
    with attach(pipe, Plan(caches=StepRehash(changes=(0.1, 1, 0.1), threshold=0.5))) as handle:
        images = pipe(**call_arguments(pipe), num_inference_steps=4).images
    np.testing.assert_array_equal(images, expected)
    assert not np.array_equal(images, plain)
    names = {"unet.down_blocks.1", "unet.mid_block", "unet.up_blocks.0"}
    assert {name: rows.run for name, rows in handle.stats.modules.items()} == dict.fromkeys(
        names, handle.stats.rows / 2
    )


def test_changes_are_those_of_the_blocks_residuals():
    """Measured beside it by hooks of our own."""
    pipe, steps = tiny_dit(layers=2), 5
    seen = {0: [], 1: []}
    hooks = [
        block.register_forward_hook(lambda _, args, output, index=index: seen[index].append(output - args[0]))
        for index, block in enumerate(pipe.transformer.transformer_blocks)
    ]
    plain = pipe(**call_arguments(pipe), num_inference_steps=steps).images
    for hook in hooks:
        hook.remove()
    expected = [
        np.mean([float((r[i + 1] - r[i]).abs().mean() / r[i].abs().mean()) for r in seen.values()])
        for i in range(steps - 1)
    ]
    changes = measure_changes(pipe, Plan(grid=SpacingGrid(steps=steps)), call_arguments(pipe))
    np.testing.assert_allclose(changes, expected, rtol=1e-5)
    np.testing.assert_array_equal(pipe(**call_arguments(pipe), num_inference_steps=steps).images, plain)
    assert StepRehash(changes=changes, budget=3).computes(steps)[0]


def test_changes_are_those_of_the_branch_that_changes_most():
    pipe = tiny_wan(layers=1)
    seen = []
    hook = pipe.transformer.blocks[0].register_forward_hook(lambda _, args, output: seen.append(output - args[0]))
    changes = measure_changes(pipe, Plan(grid=SpacingGrid(steps=4)), call_arguments(pipe))
    hook.remove()
    branches = [
        [float((after - before).abs().mean() / before.abs().mean()) for before, after in itertools.pairwise(turns)]
        for turns in (seen[::2], seen[1::2])
    ]
    np.testing.assert_allclose(changes, np.max(branches, axis=0), rtol=1e-5)
    assert branches[0] != branches[1]


def test_a_unet_is_calibrated_on_its_inner_blocks():
    pipe, plan = tiny_unet(), Plan(grid=SpacingGrid(steps=4))
    changes = measure_changes(pipe, plan, call_arguments(pipe))
    cache = StepRehash(changes=changes, budget=2)
    with attach(pipe, plan.model_copy(update={"caches": (cache,)})) as handle:
        pipe(**call_arguments(pipe))
    assert {rows.calls for rows in handle.stats.modules.values()} == {2}


def test_refuses_a_calibration_that_starts_late():
    family = ZOO["img2img"]
    pipe = family.build()
    arguments = family.arguments(pipe, 1, 0) | {"num_inference_steps": 4}
    with pytest.raises(InputError, match=r"the call left step \d of 4 timesteps out; measure a call that starts from"):
        measure_changes(pipe, Plan(), arguments)


def test_refuses_what_cannot_work():
    for fields in ({"threshold": 1.0, "budget": 2}, {}):
        with pytest.raises(ValidationError, match="has a threshold or a budget, and not both"):
            StepRehash(changes=(1.0,), **fields)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        StepRehash(changes=(-1.0,), threshold=1.0)
    with pytest.raises(InputError, match="the step-rehash table is for 3 timesteps and the scheduler has 4"):
        attach(tiny_dit(), Plan(grid=SpacingGrid(steps=4), caches=StepRehash(changes=(1, 1), threshold=0.5)))
