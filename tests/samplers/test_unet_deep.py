"""Deep features of a U-Net reused, against DeepCache's own package and against a network that runs whole."""

import itertools
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    AudioLDM2UNet2DConditionModel,
    HeunDiscreteScheduler,
    Kandinsky3UNet,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
)
from mask_reference import newton
from pydantic import ValidationError
from tiny import call_arguments, generators, tiny_dit, tiny_stable_diffusion, tiny_unet
from torch.utils._pytree import tree_leaves, tree_map_only, tree_structure, tree_unflatten
from zoo import ZOO

from fewstep.samplers import Call, GuidanceSchedule, InputError, Plan, SpacingGrid, attach
from fewstep.samplers.network import listening
from fewstep.samplers.part import Run
from fewstep.samplers.unet_cut import cut_unet
from fewstep.samplers.unet_deep import UNetDeep, quadratic_steps

UNETS = [name for name, family in ZOO.items() if family.denoiser == "unet"]
CUTS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, None)]
IN_ORDER = ("motion_modules", "temp_attentions", "attentions", "temp_convs", "resnets")


def giver(unet, depth, layer):
    """The module whose output enters the outer part."""
    top = len(unet.up_blocks) - 1 - depth
    layers = len(unet.down_blocks[depth].resnets)
    if layer is None or layer == layers:
        return unet.up_blocks[top - 1] if top else unet.mid_block
    modules = next(getattr(unet.up_blocks[top], name) for name in IN_ORDER if hasattr(unet.up_blocks[top], name))
    return modules[(layers - layer) * len(modules) // (layers + 1) - 1]


@contextmanager
def whole_with_old_features(module, computes, order=0):
    """The whole network runs in every step, but on the others ``module`` says what follows from its last outputs."""
    calls, kept = itertools.count(), []

    def answer(_module, _given, output):
        step = next(calls)
        if computes[step]:
            kept[:] = [(step, tree_map_only(torch.Tensor, torch.clone, output)), *kept[:order]]
            return output
        leaves = zip(*(tree_leaves(tree) for _, tree in kept), strict=True)
        steps = [step for step, _ in kept]
        said = [newton(list(zip(steps, values, strict=True)), step) for values in leaves]
        return tree_unflatten(said, tree_structure(kept[0][1]))

    handle = module.register_forward_hook(answer)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("cut", [(0, 0), (0, None), (1, 1)])
@pytest.mark.parametrize("name", UNETS)
def test_is_the_whole_network_with_old_features(name, cut):
    family = ZOO[name]
    pipe = family.build()
    part = UNetDeep(steps=(0, 1, 3), depth=cut[0], layer=cut[1])
    with whole_with_old_features(giver(pipe.unet, *cut), part.computes(5)):
        expected = family.call(pipe, steps=5)
    with attach(pipe, Plan(caches=part)) as handle:
        found = family.call(pipe, steps=5)
    assert torch.equal(found, expected)
    assert handle.stats.rows == sum(step.rows for step in handle.stats.steps)
    for rows in handle.stats.modules.values():
        assert (rows.run, rows.skipped) == (handle.stats.rows * 3 / 5, handle.stats.rows * 2 / 5)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("cut", CUTS)
def test_is_the_whole_network_with_forecast_features(cut, order):
    family = ZOO["stable-diffusion"]
    pipe = family.build()
    parts = [UNetDeep(steps=(0, 1, 3, 4), depth=cut[0], layer=cut[1], order=degree) for degree in (0, order)]
    with whole_with_old_features(giver(pipe.unet, *cut), parts[1].computes(7), order):
        expected = family.call(pipe, steps=7)
    found = []
    for part in parts:
        with attach(pipe, Plan(caches=part)) as handle:
            found.append(family.call(pipe, steps=7))
    torch.testing.assert_close(found[1], expected, rtol=0, atol=1e-5)
    assert (found[0] - expected).abs().max() > 1e-4
    assert {rows.run for rows in handle.stats.modules.values()} == {handle.stats.rows * 4 / 7}


def test_a_forecast_keeps_one_value_more_for_each_order():
    pipe = tiny_stable_diffusion(layers=2)
    held = [images(pipe, UNetDeep(interval=2, order=order), steps=7)[1].cache_bytes for order in (0, 1, 2)]
    assert held == [held[0], 2 * held[0], 3 * held[0]]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", ["stable-diffusion", "controlnet", "img2img"])
def test_is_what_the_package_of_the_paper_does(name, cut):
    package = pytest.importorskip("DeepCache", reason="the package DeepCache is not installed")
    family = ZOO[name]
    pipe = family.build()
    helper = package.DeepCacheSDHelper(pipe=pipe)
    layer = 2 if cut[1] is None else cut[1]
    helper.set_params(cache_interval=3, cache_branch_id=3 * cut[0] + layer)
    helper.enable()
    expected = family.call(pipe, steps=5)
    helper.disable()
    with attach(pipe, Plan(caches=UNetDeep(interval=3, depth=cut[0], layer=cut[1]))):
        found = family.call(pipe, steps=5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - family.call(pipe, steps=5)).abs().max() > 1e-3


def images(pipe, part, steps=5, **options):
    with attach(pipe, Plan(grid=SpacingGrid(steps=steps), caches=part)) as handle:
        return pipe(**call_arguments(pipe) | options).images, handle.stats


@pytest.mark.parametrize("cut", CUTS)
def test_freeu_scales_what_is_kept_once(cut):
    pipe = tiny_stable_diffusion(layers=2)
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.5, b2=1.6)
    part = UNetDeep(interval=3, depth=cut[0], layer=cut[1])
    with whole_with_old_features(giver(pipe.unet, *cut), part.computes(5)):
        expected = pipe(**call_arguments(pipe), num_inference_steps=5).images
    np.testing.assert_array_equal(images(pipe, part)[0], expected)


@pytest.mark.parametrize("cut", CUTS)
def test_t2i_adapters_add_to_what_runs(cut):
    from diffusers import StableDiffusionAdapterPipeline

    pipe = tiny_stable_diffusion(layers=2)
    torch.manual_seed(1)
    adapter = T2IAdapter(in_channels=3, channels=[8, 8], num_res_blocks=1, downscale_factor=2)
    outside_in = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    unet = UNet2DConditionModel.from_config(
        pipe.unet.config, **outside_in, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")
    )
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"} | {"unet": unet.eval()}
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = call_arguments(tiny_stable_diffusion()) | {"image": torch.rand(2, 3, 16, 16), "num_inference_steps": 5}
    part = UNetDeep(interval=3, depth=cut[0], layer=cut[1])
    with whole_with_old_features(giver(pipe.unet, *cut), part.computes(5)):
        expected = pipe(**given | {"generator": generators(2)}).images
    with attach(pipe, Plan(caches=part)):
        np.testing.assert_array_equal(pipe(**given | {"generator": generators(2)}).images, expected)


def test_a_lora_is_part_of_the_network():
    peft = pytest.importorskip("peft")
    pipe = tiny_stable_diffusion(layers=2)
    part = UNetDeep(interval=3)
    before, _ = images(pipe, part)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config, "one")
    with whole_with_old_features(giver(pipe.unet, 0, 0), part.computes(5)):
        expected = pipe(**call_arguments(pipe), num_inference_steps=5).images
    np.testing.assert_array_equal(images(pipe, part)[0], expected)
    pipe.unet.delete_adapters("one")
    np.testing.assert_array_equal(images(pipe, part)[0], before)


def test_the_two_evaluations_of_heun_are_two_steps():
    pipe = tiny_stable_diffusion(scheduler=HeunDiscreteScheduler(steps_offset=1), layers=2)
    part = UNetDeep(interval=4)
    computes = part.computes(9)
    with whole_with_old_features(giver(pipe.unet, 0, 0), computes):
        expected = pipe(**call_arguments(pipe), num_inference_steps=5).images
    with attach(pipe, Plan(caches=part)) as handle:
        np.testing.assert_array_equal(pipe(**call_arguments(pipe), num_inference_steps=5).images, expected)
    assert handle.stats.modules["unet.mid_block"].calls == sum(computes) == 3


def test_resolution_and_batch_change_between_calls():
    pipe = tiny_stable_diffusion(layers=2)
    part = UNetDeep(interval=3)
    sizes = ({"height": 16}, {"height": 40, "width": 24}, {"height": 16})
    alone = [images(tiny_stable_diffusion(layers=2), part, **size)[0] for size in sizes]
    with attach(pipe, Plan(grid=SpacingGrid(steps=5), caches=part)):
        for size, expected in zip(sizes, alone, strict=True):
            for batch in (1, 2):
                found = pipe(**call_arguments(pipe, batch) | size).images
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cut", CUTS)
def test_keeps_the_features_and_nothing_else(cut):
    pipe = tiny_stable_diffusion(layers=2)
    sizes, seen = [], []
    block = pipe.unet.up_blocks[-1 - cut[0]]
    handles = [
        giver(pipe.unet, *cut).register_forward_hook(lambda *given: sizes.append(tree_leaves(given[-1])[0].nbytes)),
        block.register_forward_pre_hook(lambda *given: seen.append(given[-1]["hidden_states"]), with_kwargs=True),
    ]
    _, stats = images(pipe, UNetDeep(interval=5, depth=cut[0], layer=cut[1]))
    for handle in handles:
        handle.remove()
    assert [stats.cache_bytes] == sizes
    if cut[1] not in (2, None):  # what comes up to a block whose first layers are left out is never read
        assert [tensor.untyped_storage().nbytes() == 4 for tensor in seen] == [False] + [True] * 4


def test_a_branch_that_a_window_left_out_runs_whole_when_it_returns():
    pipe = tiny_stable_diffusion(layers=2)
    guidance = GuidanceSchedule(scale=3.0, window=(0.5, 1.0))
    with attach(pipe, Plan(grid=SpacingGrid(steps=8), caches=UNetDeep(interval=3), guidance=guidance)) as handle:
        pipe(**call_arguments(pipe))
    assert [step.rows for step in handle.stats.steps] == [4, 2, 2, 2, 4, 4, 4, 4]
    # step 3 computes one branch, so step 4 computes both; step 6 does by its number
    rows = handle.stats.modules["unet.mid_block"]
    assert (rows.run, rows.skipped) == (4 + 2 + 4 + 4, 2 + 2 + 4 + 4)


def test_quadratic_steps_are_squares_and_fit_any_number_of_steps():
    assert quadratic_steps(36, 6, 0.0, 2.0) == [0, 1, 4, 9, 16, 25]
    assert quadratic_steps(72, 6, 0.5, 2.0) == [0, 11, 20, 27, 32, 35, 36, 37, 40, 45, 52, 61]
    for steps in range(1, 60):
        for interval in (1, 2, 3, 5, 10):
            for center in (0.0, 0.3, 1.0):
                found = quadratic_steps(steps, interval, center, 1.4)
                assert len(found) == -(-steps // interval)
                assert found[0] == 0
                assert all(after > before for before, after in pairwise([*found, steps]))
    part = UNetDeep(interval=5, schedule="quadratic")
    gaps = np.diff([index for index, computes in enumerate(part.computes(100)) if computes])
    assert gaps.min() < 4 < 6 < gaps.max()
    assert abs(np.cumsum(gaps)[gaps.argmin()] - 30) < 6


@pytest.mark.parametrize(
    ("scope", "layer"),
    [
        ("blocks", None),
        pytest.param("blocks", 0, marks=pytest.mark.slow),
        pytest.param("whole", None, marks=pytest.mark.slow),
    ],
)
def test_compiled_networks_say_the_same_and_stop_compiling(scope, layer):
    from torch._dynamo.utils import counters

    pipe = tiny_stable_diffusion()
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    part = UNetDeep(interval=2, layer=layer)
    plain, expected = pipe(**call_arguments(pipe) | arguments).images, images(pipe, part, 3, output_type="latent")[0]
    torch._dynamo.reset()
    counters.clear()
    if scope == "whole":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        for block in (pipe.unet.mid_block, pipe.unet.up_blocks[-1]):
            block.compile(backend="eager")
    frames = []
    for _ in range(3):
        found, stats = images(pipe, part, 3, output_type="latent")
        assert torch.equal(found, expected)
        assert stats.modules["unet.mid_block"].skipped == 4
        assert torch.equal(pipe(**call_arguments(pipe) | arguments).images, plain)
        frames.append(counters["frames"]["total"])
    assert 0 < frames[0] <= (6 if (scope, layer) == ("blocks", None) else 80)
    assert frames[1] == frames[2]
    torch._dynamo.reset()


def other_unets():
    kinds = {"block_out_channels": (8, 8), "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 8}
    torch.manual_seed(0)
    yield (
        UNet3DConditionModel(
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            attention_head_dim=4,
            **kinds,
        ),
        {"sample": torch.randn(2, 4, 2, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 8)},
    )
    yield (
        AudioLDM2UNet2DConditionModel(
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,
            **kinds | {"cross_attention_dim": ((None, 8), (None, 8))},
        ),
        {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 8)},
    )
    yield (
        Kandinsky3UNet(
            in_channels=4,
            time_embedding_dim=8,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(8, 8, 8, 8),
            cross_attention_dim=8,
            encoder_hid_dim=8,
        ),
        {
            "sample": torch.randn(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 3, 8),
            "encoder_attention_mask": torch.ones(2, 3),
        },
    )


OTHERS = {type(network).__name__: (network.eval(), inputs) for network, inputs in other_unets()}


class Stub:
    """As much of a pipeline as a cache looks at."""

    def __init__(self, unet):
        self.unet = unet
        self.components = {"unet": unet}
        self.timesteps = torch.arange(9, -1, -1) * 100


@pytest.mark.parametrize("layer", [0, 1, None])
@pytest.mark.parametrize("name", OTHERS)
def test_networks_without_a_family_in_the_zoo(name, layer):
    unet, inputs = OTHERS[name]
    part = UNetDeep(interval=2, layer=layer)
    stub = Stub(unet)
    if name == "Kandinsky3UNet" and layer is not None:
        with pytest.raises(InputError, match="leave the level whole with layer null"):
            part.modules(stub)
        return
    call = Call({"unet": unet}, stub, caches=[part.make(part.modules(stub), Run(stub, stub))])
    outputs = []
    with torch.no_grad():
        with listening(call.modules, call):
            for time in (900, 800):
                outputs.append(unet(**inputs, timestep=time)[0])
                call.close_step(time)
        old = giver(unet, 0, layer) if hasattr(unet.up_blocks[0], "resnets") else unet.up_blocks[-2]
        with whole_with_old_features(old, (True, False)):
            expected = [unet(**inputs, timestep=time)[0] for time in (900, 800)]
    for found, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(found, wanted)
    assert all((rows.run, rows.skipped) == (2, 2) for rows in call.counter.modules.values())


def test_networks_that_cannot_be_cut():
    with pytest.raises(InputError, match="DiTTransformer2DModel is no U-Net whose down_blocks and up_blocks are pairs"):
        attach(tiny_dit(), Plan(caches=UNetDeep(interval=2)))
    unet = tiny_unet().unet
    with pytest.raises(InputError, match="UNet2DModel has levels 0 to 1; got depth 2"):
        cut_unet(unet, 2, 0)
    with pytest.raises(
        InputError, match="level 0 of UNet2DModel has 1 layers that can be cut; got layer 2; give at most"
    ):
        cut_unet(unet, 0, 2)
    skip = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("SkipDownBlock2D",) * 2,
        up_block_types=("SkipUpBlock2D",) * 2,
    )
    with pytest.raises(InputError, match="carries the image past its levels in SkipDownBlock2D"):
        cut_unet(skip, 0, 0)
    bare = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )
    with pytest.raises(InputError, match="UNet2DModel has nothing below all layers of level 1; lower depth or layer"):
        cut_unet(bare, 1, None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give an interval or a list of steps; got interval=None, steps=None"),
        ({"interval": 2, "steps": (0,)}, r"give an interval or a list of steps; got interval=2, steps=\(0,\)"),
        ({"steps": (1, 2)}, r"steps begin with 0 and increase; got \(1, 2\)"),
        ({"steps": (0, 3, 3)}, r"steps begin with 0 and increase; got \(0, 3, 3\)"),
        ({"steps": ()}, r"steps begin with 0 and increase; got \(\)"),
        ({"steps": (0,), "schedule": "quadratic"}, "a quadratic schedule has an interval; leave out the list of steps"),
        ({"interval": 2, "center": 0.5}, "center and power are of a quadratic schedule; got center=0.5, power=None"),
        ({"interval": 0}, "greater than or equal to 1"),
        ({"interval": 2, "depth": -1}, "greater than or equal to 0"),
    ],
)
def test_errors(fields, words):
    with pytest.raises(ValidationError, match=words):
        UNetDeep(**fields)


def test_steps_that_are_not_there():
    plan = Plan(grid=SpacingGrid(steps=4), caches=UNetDeep(steps=(0, 4)))
    with pytest.raises(InputError, match="computes at step 4 and the last of 4 steps is 3; list smaller steps"):
        attach(tiny_unet(), plan)
