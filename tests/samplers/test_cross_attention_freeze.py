"""Cross-attention frozen after a step, against networks whose modules are told to repeat themselves."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_wan
from zoo import ZOO

from fewstep.samplers import GuidanceSchedule, InputError, Plan, SpacingGrid, attach
from fewstep.samplers.cross_attention_freeze import CrossAttentionFreeze
from fewstep.samplers.unet_deep import UNetDeep

REACHED = {
    "stable-diffusion": "attn2",
    "img2img": "attn2",
    "inpaint": "attn2",
    "controlnet": "attn2",
    "ip-adapter": "attn2",
    "sdxl": "attn2",
    "stable-video": "attn2",
    "animatediff": "attn2",
    "pixart-alpha": "attn2",
    "pixart-sigma": "attn2",
    "sana": "attn2",
    "hunyuan-dit": "attn2",
    "wan": "attn2",
    "ltx": "attn2",
    "allegro": "attn2",
    "latte": "attn2",
    "kandinsky5": "cross_attention",
    "stable-audio": "attn2",
    "amused": None,
}
"The families that have cross-attention, and what their blocks call it; amused has its attention without such a name."


@contextmanager
def repeating(modules, branches, after):
    """From the step ``after`` on all modules say, in each branch, what they said in the step before it."""
    said = {name: [] for name in modules}

    def hook(name):
        def answer(_module, _given, output):
            said[name].append(output)
            call = len(said[name]) - 1
            return said[name][(after - 1) * branches + call % branches] if call >= after * branches else output

        return answer

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", REACHED)
def test_each_branch_repeats_its_own_cross_attention(name):
    family = ZOO[name]
    pipe = family.build()
    plain = family.call(pipe, steps=4)
    network = getattr(pipe, family.denoiser)
    part = CrossAttentionFreeze(after=2)
    modules = {key: network.get_submodule(key) for key in part.reach(network)}
    if REACHED[name]:
        assert {key.rsplit(".", 1)[-1] for key in modules} == {REACHED[name]}
    branches = 2 if family.guidance == "separate" else 1
    with repeating(modules, branches, 2):
        expected = family.call(pipe, steps=4)
    with attach(pipe, Plan(caches=part)) as handle:
        assert torch.equal(family.call(pipe, steps=4), expected)
    assert set(handle.stats.modules) == {f"{family.denoiser}.{key}" for key in modules}
    assert all(rows.run == rows.skipped == handle.stats.rows / 2 for rows in handle.stats.modules.values())
    if name != "stable-video":  # its other sequence is one token long: whatever the query, it says the same
        assert not torch.equal(expected, plain)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in REACHED])
def test_families_without_cross_attention_are_refused(name):
    pipe = ZOO[name].build()
    with pytest.raises(InputError, match=r"has no cross-attention: it attends to (text and image in the same|no text)"):
        attach(pipe, Plan(caches=CrossAttentionFreeze(after=1)))


def test_refusals_say_why():
    plan = Plan(caches=CrossAttentionFreeze(after=1))
    words = "SD3Transformer2DModel has no cross-attention: it attends to text and image in the same modules"
    with pytest.raises(InputError, match=words):
        attach(tiny_sd3(), plan)
    with pytest.raises(InputError, match="DiTTransformer2DModel has no cross-attention: it attends to no text"):
        attach(tiny_dit(), plan)


def test_the_temporal_attention_of_animatediff_is_not_cross_attention():
    """Its second attention has the name but looks at the frames themselves."""
    pipe = ZOO["animatediff"].build()
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    reached = CrossAttentionFreeze(after=1).reach(pipe.unet)
    assert set(names) - set(reached) == {name for name in names if "motion_modules" in name} != set()


def test_composes_with_a_guidance_window_and_with_deep_features():
    """The paper's schedule: after the gate neither the text nor the unconditional branch is computed."""
    pipe = tiny_stable_diffusion(layers=2)
    guidance = GuidanceSchedule(scale=3.0, window=(0.0, 0.5))
    plan = Plan(grid=SpacingGrid(steps=8), caches=CrossAttentionFreeze(after=4), guidance=guidance)
    with attach(pipe, plan) as handle:
        pipe(**call_arguments(pipe))
    assert [step.rows for step in handle.stats.steps] == [4] * 4 + [2] * 4
    assert {(rows.run, rows.skipped) for rows in handle.stats.modules.values()} == {(16, 8)}
    both = (CrossAttentionFreeze(after=4), UNetDeep(interval=2))
    with attach(pipe, Plan(grid=SpacingGrid(steps=8), caches=both)) as handle:
        assert np.isfinite(pipe(**call_arguments(pipe)).images).all()
    rows = handle.stats.modules["unet.mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert (rows.run, rows.skipped) == (
        4 * 2 + 4,
        4,
    )  # steps 0, 2; at 4 it has nothing of step 3 and runs; 6 is skipped


def test_keeps_one_output_of_each_module():
    pipe = tiny_wan(layers=2)
    sizes = []
    modules = {
        name: pipe.transformer.get_submodule(name) for name in CrossAttentionFreeze(after=1).reach(pipe.transformer)
    }
    hooks = [module.register_forward_hook(lambda *given: sizes.append(given[-1].nbytes)) for module in modules.values()]
    with attach(pipe, Plan(grid=SpacingGrid(steps=4), caches=CrossAttentionFreeze(after=1))) as handle:
        pipe(**call_arguments(pipe))
    for hook in hooks:
        hook.remove()
    assert len(sizes) == 2 * len(modules)  # both branches, once
    assert handle.stats.cache_bytes == sum(sizes)


def test_computes():
    assert CrossAttentionFreeze(after=2).computes(4) == (True, True, False, False)
    assert CrossAttentionFreeze(after=9).computes(3) == (True,) * 3
    for steps in range(1, 50):
        for fraction in (0.01, 0.1, 0.3, 0.5, 1.0):
            computes = CrossAttentionFreeze(fraction=fraction).computes(steps)
            assert sum(computes) == -(-steps * round(fraction * 100) // 100)
            assert list(computes) == sorted(computes, reverse=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give one of after and fraction; got after=None, fraction=None"),
        ({"after": 2, "fraction": 0.5}, "give one of after and fraction; got after=2, fraction=0.5"),
        ({"after": 0}, "greater than or equal to 1"),
        ({"fraction": 0.0}, "greater than 0"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValidationError, match=words):
        CrossAttentionFreeze(**fields)
