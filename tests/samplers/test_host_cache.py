"""diffusers' own caches, named in a plan: the same samples as diffusers gives, without what it leaves behind."""

import threading

import diffusers
import diffusers.hooks
import numpy as np
import pytest
import torch
from host_cases import (
    ALWAYS,
    EVERY_SECOND,
    FASTER,
    FIRST_BLOCK,
    MAG,
    PYRAMID,
    SEA,
    STEPS,
    TAYLOR,
    cached,
    call,
    left_on,
    plain,
    plan_of,
    skipped,
)
from tiny import call_arguments, generators, tiny_dit, tiny_qwen, tiny_wan
from zoo import ZOO

from fewstep.samplers import GuidanceSchedule, InputError, Plan, attach
from fewstep.samplers.host_cache import HostCache

pytestmark = pytest.mark.filterwarnings("ignore:.* decides for a batch as a whole")

IDENTICAL = [
    (tiny_wan, FIRST_BLOCK, {}),
    (tiny_qwen, FIRST_BLOCK, {}),
    (tiny_wan, MAG, {"num_inference_steps": STEPS}),
    (tiny_qwen, MAG, {"num_inference_steps": STEPS}),
    (tiny_wan, TAYLOR, {"taylor_factors_dtype": torch.float32}),
    (tiny_qwen, TAYLOR, {"taylor_factors_dtype": torch.float32}),
    (tiny_wan, SEA, {}),
]


@pytest.mark.parametrize(("build", "part", "more"), IDENTICAL, ids=lambda value: getattr(value, "config", None))
def test_the_samples_of_diffusers_where_it_keeps_the_branches_apart(build, part, more):
    pipe, theirs = build(layers=4), build(layers=4)
    theirs.transformer.enable_cache(getattr(diffusers.hooks, part.config)(**part.options | more))
    wanted = plain(theirs)
    ours, stats = cached(pipe, part)
    np.testing.assert_array_equal(ours, wanted)
    assert skipped(stats) > 0
    assert stats.cache_bytes > 0
    assert not np.array_equal(ours, plain(pipe))


def test_pyramid_broadcast_is_that_of_diffusers_on_a_doubled_batch():
    pipe, theirs = tiny_dit(layers=2), tiny_dit(layers=2)
    config = diffusers.hooks.PyramidAttentionBroadcastConfig(**EVERY_SECOND, current_timestep_callback=lambda: 500)
    diffusers.hooks.apply_pyramid_attention_broadcast(theirs.transformer, config)
    ours, stats = cached(pipe, PYRAMID)
    np.testing.assert_array_equal(ours, plain(theirs))
    for module in stats.modules.values():
        assert module.run == module.skipped == stats.rows / 2


def test_faster_cache_is_that_of_diffusers_on_a_doubled_batch():
    family = ZOO["pixart-sigma"]
    pipe, theirs = family.build(), family.build()
    told = {"time": 0.0}
    network = theirs.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.update(time=float(kwargs["timestep"][0])), with_kwargs=True
    )
    config = diffusers.hooks.FasterCacheConfig(
        **FASTER.options,
        current_timestep_callback=lambda: told["time"],
        _unconditional_conditional_input_kwargs_identifiers=[
            "hidden_states",
            "encoder_hidden_states",
            "encoder_attention_mask",
            "timestep",
        ],
    )
    diffusers.hooks.apply_faster_cache(theirs.transformer, config)
    wanted = family.call(theirs, steps=STEPS)
    network.remove()
    with attach(pipe, Plan(caches=FASTER)) as handle:
        ours = family.call(pipe, steps=STEPS)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=0)
    assert handle.stats.rows == 4 * STEPS / 2 + 2 * STEPS / 2
    assert skipped(handle.stats) > 0


def tiny_nucleus():
    vae = tiny_qwen().vae
    torch.manual_seed(0)
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=8,
        axes_dims_rope=(4, 6, 6),
        moe_enabled=False,
        in_channels=64,
        out_channels=16,
    )
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.NucleusMoEImagePipeline(
        transformer=transformer.eval(), scheduler=scheduler, vae=vae, text_encoder=None, processor=None
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_text_cache_projects_each_prompt_once_and_changes_nothing():
    pipe, projected, kept = tiny_nucleus(), [], {"scale": 1.0}
    like = call_arguments(tiny_qwen(), 1)
    wanted = pipe(**like, num_inference_steps=4)[0]
    projection = pipe.transformer.transformer_blocks[0].attn.add_k_proj
    watch = projection.register_forward_hook(lambda *_: projected.append(1))
    with attach(pipe, plan_of(HostCache(config="TextKVCacheConfig"), steps=4)) as handle:
        assert torch.equal(pipe(**like | {"generator": generators(1)}, attention_kwargs=kept)[0], wanted)
    watch.remove()
    assert len(projected) == 2  # one for each branch
    assert kept == {"scale": 1.0}
    assert skipped(handle.stats) == 0
    assert handle.stats.cache_bytes > 0


def test_a_network_beside_that_it_cannot_reach_runs_as_it_is():
    pipe = ZOO["wan"].build()
    single = tiny_wan(layers=1).transformer
    pipe.register_modules(transformer_2=single)
    pipe.register_to_config(boundary_ratio=0.5)
    with attach(pipe, Plan(caches=FIRST_BLOCK)) as handle:
        ZOO["wan"].call(pipe, steps=STEPS)
    assert set(handle.stats.rows_by_network) == {"transformer", "transformer_2"}
    assert all(name.startswith("transformer.") for name in handle.stats.modules)


def branches_of(pipe, run):
    """Largest difference between the two branches, evaluated in turn, at each step."""
    outputs = []
    watch = pipe.transformer.register_forward_hook(lambda *given: outputs.append(given[-1][0].clone()))
    run(pipe)
    watch.remove()
    assert len(outputs) == 2 * STEPS
    return [float((a - b).abs().max()) for a, b in zip(outputs[::2], outputs[1::2], strict=True)]


def test_pyramid_broadcast_does_not_cancel_guidance_as_it_does_in_diffusers():
    options = {"cross_attention_block_skip_range": 2, "cross_attention_timestep_skip_range": ALWAYS}
    pipe, theirs = tiny_wan(layers=2), tiny_wan(layers=2)
    config = diffusers.PyramidAttentionBroadcastConfig(**options, current_timestep_callback=lambda: 500)
    theirs.transformer.enable_cache(config)
    assert max(branches_of(theirs, plain)) == 0
    part = HostCache(config="PyramidAttentionBroadcastConfig", options=options)
    assert min(branches_of(pipe, lambda pipe: cached(pipe, part))) > 1e-3


@pytest.mark.parametrize("build", [tiny_wan, tiny_qwen])
@pytest.mark.parametrize("part", [PYRAMID, MAG, FIRST_BLOCK, TAYLOR], ids=lambda part: part.config)
def test_branches_that_are_evaluated_in_turn_stay_apart(build, part):
    assert min(branches_of(build(layers=3), lambda pipe: cached(pipe, part))) > 1e-4


def test_a_branch_is_answered_with_what_it_would_have_alone():
    """Guidance of scale 1 leaves the unconditional branch out, and the conditional one is what it is beside it."""
    pipe = tiny_wan(layers=2)
    outputs = []
    watch = pipe.transformer.register_forward_hook(lambda *given: outputs.append(given[-1][0].clone()))
    for part in (PYRAMID, FIRST_BLOCK, SEA):
        outputs.clear()
        same = call_arguments(pipe, 1)["prompt_embeds"]
        cached(pipe, part, guidance_scale=1.0)
        alone = outputs.copy()
        outputs.clear()
        cached(pipe, part, negative_prompt_embeds=same.clone(), guidance_scale=5.0)
        for mine, cond, uncond in zip(alone, outputs[::2], outputs[1::2], strict=True):
            assert torch.equal(mine, cond)
            assert torch.equal(mine, uncond)
    watch.remove()


@pytest.mark.parametrize("part", [FIRST_BLOCK, PYRAMID, MAG, TAYLOR, SEA], ids=lambda part: part.config)
def test_nothing_is_installed_on_the_network_and_an_aborted_call_leaves_nothing(part):
    pipe = tiny_wan(layers=3)
    plain(pipe)  # the pipeline's cache contexts make registries
    before, during = left_on(pipe.transformer), []
    wanted, _ = cached(pipe, part)

    def stop(pipe, index, timestep, inputs):
        during.append({name: found[1:] for name, found in left_on(pipe.transformer).items()})
        if index == 4:
            raise RuntimeError("stop")
        return inputs

    with attach(pipe, plan_of(part)):
        with pytest.raises(RuntimeError, match="stop"):
            call(pipe, callback_on_step_end=stop)
        assert left_on(pipe.transformer) == before
        other = call(pipe, batch=2, height=32, width=32)
        again = call(pipe)
    assert left_on(pipe.transformer) == before
    assert all(found == {name: left[1:] for name, left in before.items()} for found in during)
    np.testing.assert_array_equal(again, wanted)
    with attach(tiny_wan(layers=3), plan_of(part)) as fresh:
        np.testing.assert_array_equal(other, call(fresh._pipe, batch=2, height=32, width=32))


@pytest.mark.parametrize("part", [FIRST_BLOCK, PYRAMID], ids=lambda part: part.config)
def test_two_threads_on_shared_networks_do_not_see_each_other(part):
    first, second, third = (tiny_wan(layers=3) for _ in range(3))
    second.transformer = third.transformer = first.transformer
    without = plain(third)
    with attach(first, plan_of(part)), attach(second, plan_of(part)):
        wanted = call(first)
        assert not np.array_equal(wanted, without)
        found = {}

        def run(name, function, pipe):
            found[name] = [function(pipe) for _ in range(3)]

        jobs = {"a": (call, first), "b": (call, second), "c": (plain, third)}
        threads = [threading.Thread(target=run, args=(name, *job)) for name, job in jobs.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, images in found.items():
        assert len(images) == 3
        for image in images:
            np.testing.assert_array_equal(image, without if name == "c" else wanted)


def test_another_pipeline_on_the_same_network_within_a_call_needs_a_plan_of_its_own():
    pipe, inner = tiny_wan(layers=3), tiny_wan(layers=3)
    inner.transformer = pipe.transformer
    without, (wanted, _) = plain(inner), cached(pipe, FIRST_BLOCK)
    seen = []

    def nested(pipe, index, timestep, inputs):
        if index == 3:
            seen.append(plain(inner))
        return inputs

    with attach(pipe, plan_of(FIRST_BLOCK)):
        with attach(inner, Plan()):
            np.testing.assert_array_equal(call(pipe, callback_on_step_end=nested), wanted)
        np.testing.assert_array_equal(seen[0], without)
        with pytest.raises(InputError, match="one evaluation of a branch in a step; step 4 has two"):
            call(pipe, callback_on_step_end=nested)
        np.testing.assert_array_equal(call(pipe), wanted)


def test_hooks_of_others_run_beneath_and_stay():
    pipe = tiny_wan(layers=3)
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[1])

    class Count(diffusers.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    registry.register_hook(Count(), "count")
    _, stats = cached(pipe, FIRST_BLOCK)
    assert list(registry.hooks) == ["count"]
    assert registry.hooks["count"].calls == stats.modules["transformer.blocks.1"].calls < 2 * STEPS


@pytest.mark.parametrize("part", [FIRST_BLOCK, MAG, PYRAMID, TAYLOR], ids=lambda part: part.config)
def test_counted_modules_are_those_that_ran(part):
    pipe = tiny_qwen(layers=4)
    plain(pipe)
    names = part.reach(pipe.transformer)
    ran = dict.fromkeys(names, 0)

    def count(name):
        return lambda *_: ran.update({name: ran[name] + 1})

    hooks = [pipe.transformer.get_submodule(name).register_forward_hook(count(name)) for name in names]
    _, stats = cached(pipe, part)
    for hook in hooks:
        hook.remove()
    assert {name: stats.modules[f"transformer.{name}"].calls for name in names} == ran
    assert all(module.run + module.skipped <= stats.rows for module in stats.modules.values())
    assert min(ran.values()) < 2 * STEPS


@pytest.mark.parametrize("part", [PYRAMID, TAYLOR, MAG], ids=lambda part: part.config)
@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0)])
def test_a_guidance_window_starts_the_branch_anew(part, window):
    for pipe in (tiny_wan(layers=2), tiny_dit(layers=2)):
        guidance = GuidanceSchedule(scale=3.0, window=window)
        with attach(pipe, plan_of(part, guidance=guidance)) as handle:
            assert np.isfinite(call(pipe, batch=2)).all()
        assert skipped(handle.stats) > 0


NOTHING_SKIPPED = {
    "FirstBlockCacheConfig": {"threshold": 0.0},
    "PyramidAttentionBroadcastConfig": EVERY_SECOND | {"spatial_attention_block_skip_range": 1},
    "TaylorSeerCacheConfig": {"cache_interval": 1, "cache_identifiers": ["(transformer_)?blocks[.]0"]},
    "MagCacheConfig": {"mag_ratios": [1.0], "retention_ratio": 1.0},
    "SeaCacheConfig": {"retention_steps": 100},
}


@pytest.mark.filterwarnings("ignore:the host cache computes all")
@pytest.mark.parametrize(
    ("config", "family"),
    [
        (config, family)
        for config in NOTHING_SKIPPED
        for family in ("wan", "dit")
        if config != "SeaCacheConfig" or family == "wan"
    ],
)
def test_a_cache_that_computes_everything_changes_nothing(config, family):
    pipe = ZOO[family].build()
    wanted = ZOO[family].call(pipe, steps=3)
    part = HostCache(config=config, options=NOTHING_SKIPPED[config])
    with attach(pipe, Plan(caches=part)) as handle:
        assert torch.equal(ZOO[family].call(pipe, steps=3), wanted)
    assert skipped(handle.stats) == 0
    assert handle.stats.modules


def test_what_is_computed_is_known_beforehand():
    assert PYRAMID.computes(5) == (True, False, True, False, True)
    assert HostCache(config="TaylorSeerCacheConfig").computes(28) == tuple(
        step in (0, 1, 2, 4, 9, 14, 19, 24) for step in range(28)
    )
    assert FIRST_BLOCK.computes(5) is None
    narrow = HostCache(config="PyramidAttentionBroadcastConfig", options={"spatial_attention_block_skip_range": 2})
    assert narrow.computes(5) is None


@pytest.mark.parametrize("part", [PYRAMID, TAYLOR], ids=lambda part: part.config)
def test_what_is_known_beforehand_is_what_runs(part):
    pipe = tiny_qwen()
    _, stats = cached(pipe, part)
    for module in stats.modules.values():
        assert module.calls == 2 * sum(part.computes(STEPS))


def test_says_that_a_batch_decides_together():
    with pytest.warns(UserWarning, match="FirstBlockCacheConfig decides for a batch as a whole"):
        attach(tiny_wan(layers=2), plan_of(FIRST_BLOCK)).detach()


def test_suggests_a_setting_that_works():
    assert HostCache.suggest(tiny_wan(layers=2), 4).config == "FirstBlockCacheConfig"
    assert HostCache.suggest(tiny_dit(), 4).config == "PyramidAttentionBroadcastConfig"
