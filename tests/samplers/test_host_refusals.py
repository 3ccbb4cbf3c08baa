"""What diffusers' caches would do wrong is refused, with the reason and the mend."""

from types import SimpleNamespace

import diffusers.hooks
import pytest
import torch
from host_cases import FASTER, FIRST_BLOCK, PYRAMID, SEA, call, left_on, plan_of
from pydantic import ValidationError
from tiny import tiny_dit, tiny_sd3, tiny_stable_diffusion, tiny_wan
from zoo import ZOO

from fewstep.samplers import InputError, Plan, attach
from fewstep.samplers.host_cache import HostCache
from fewstep.samplers.host_faster import BranchOrder

pytestmark = pytest.mark.filterwarnings("ignore:.* decides for a batch as a whole")

REFUSED = [
    (lambda: tiny_wan(layers=1), FIRST_BLOCK, "it needs two blocks or more, and WanTransformer3DModel has one"),
    (tiny_stable_diffusion, FIRST_BLOCK, "it finds no list of transformer blocks in UNet2DConditionModel"),
    (lambda: tiny_sd3(layers=2), SEA, "it reads the samples of Wan's text-to-video networks"),
    (tiny_wan, HostCache(config="TextKVCacheConfig"), "it does nothing on WanTransformer3DModel"),
    (tiny_wan, HostCache(config="TaylorSeerCacheConfig"), "forecasts nothing of WanTransformer3DModel.*blocks"),
    (tiny_wan, HostCache(config="MagCacheConfig"), "needs the mag_ratios of this model"),
    (
        tiny_wan,
        HostCache(config="MagCacheConfig", options={"mag_ratios": [1.0], "num_inference_steps": 30}),
        "has num_inference_steps 30; the run has 6 timesteps; leave it out",
    ),
    (tiny_wan, HostCache(config="MagCacheConfig", options={"calibrate": True}), "calibrate it skips nothing"),
    (tiny_wan, HostCache(config="PyramidAttentionBroadcastConfig"), "needs one of spatial_attention_block_skip_range"),
    (
        tiny_stable_diffusion,
        HostCache(config="PyramidAttentionBroadcastConfig", options={"temporal_attention_block_skip_range": 2}),
        "it does nothing on UNet2DConditionModel",
    ),
]


@pytest.mark.parametrize(("build", "part", "words"), REFUSED)
def test_a_network_where_it_cannot_work_is_refused(build, part, words):
    pipe = build()
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    before = left_on(network)
    with pytest.raises(InputError, match=words):
        attach(pipe, plan_of(part))
    assert left_on(network) == before


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("chroma", "does not know the ChromaTransformerBlock of ChromaTransformer2DModel.*'gate' cache works"),
        ("kandinsky5", "reads the argument 'hidden_states', which Kandinsky5TransformerDecoderBlock does not have"),
        ("latte", "those of LatteTransformer3DModel run in alternation"),
        ("sd3", "in SD3Transformer2DModel these are different things"),
        ("flux2", "in Flux2Transformer2DModel these are different things"),
    ],
)
def test_blocks_that_diffusers_would_fail_on_are_refused(family, words):
    pipe = ZOO[family].build()
    with pytest.raises(InputError, match=words):
        attach(pipe, Plan(caches=FIRST_BLOCK))


def test_faster_cache_refuses_branches_in_turn_and_the_conditional_one_first():
    pipe = tiny_wan()
    with attach(pipe, plan_of(FASTER)), pytest.raises(InputError, match="a batch that is not doubled for guidance"):
        call(pipe)
    pipe = tiny_dit()
    with attach(pipe, plan_of(FASTER)), pytest.raises(InputError, match="stacks its conditional branch first"):
        call(pipe)
    family = ZOO["pixart-sigma"]
    pipe = family.build()
    with (
        attach(pipe, Plan(caches=HostCache(config="FasterCacheConfig"))),
        pytest.raises(InputError, match="tensor_format 'BCFHW' and PixArtTransformer2DModel is shown 4 dimensions"),
    ):
        family.call(pipe)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_order_of_the_branches_is_seen_in_what_the_scheduler_is_given(sign):
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 4, 5, 5, generator=draw)

    def seen(given, output=(first, second)):
        hook = BranchOrder()
        hook.evaluate(None, lambda _: (torch.cat(output),))
        hook.before_step(SimpleNamespace(output=sign * given))
        return hook.known

    assert seen(first + 3 * (second - first))
    assert seen(second)
    assert not seen(first, (first, first))
    for given in (second + 3 * (first - second), first):
        with pytest.raises(InputError, match="stacks its conditional branch first"):
            seen(given)
    for given in (first.lerp(second, 0.5), first[:2]):
        with pytest.raises(InputError, match="combines its branches otherwise"):
            seen(given)


def test_an_error_of_diffusers_says_whose_it_is_and_one_of_the_network_stays():
    options = {"cache_identifiers": ["transformer_blocks[.][0-9]+"], "disable_cache_before_step": 1}
    part = HostCache(config="TaylorSeerCacheConfig", options=options)
    pipe = tiny_sd3(layers=2)  # its last block gives no text
    with (
        attach(pipe, plan_of(part)),
        pytest.raises(InputError, match=r"TaylorSeerCacheConfig fails at transformer_blocks[.]1, a JointTransformer"),
    ):
        call(pipe)

    def fail(*_):
        raise RuntimeError("mine")

    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
    with attach(pipe, plan_of(part)), pytest.raises(RuntimeError, match="mine"):
        call(pipe)
    hook.remove()


def test_a_cache_that_is_enabled_already_is_refused():
    pipe = tiny_wan(layers=2)
    pipe.transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig())
    with pytest.raises(InputError, match=r"a FirstBlockCacheConfig is enabled .* call its disable_cache\(\) first"):
        attach(pipe, plan_of(PYRAMID))
    pipe.transformer.disable_cache()
    with attach(pipe, plan_of(FIRST_BLOCK)):
        pipe.transformer.enable_cache(diffusers.hooks.FirstBlockCacheConfig())
        with pytest.raises(InputError, match="is enabled on WanTransformer3DModel already"):
            call(pipe)
    pipe = tiny_dit(layers=2)
    diffusers.hooks.apply_first_block_cache(pipe.transformer, diffusers.hooks.FirstBlockCacheConfig())
    with pytest.raises(InputError, match=r"hooks of a diffusers cache are on transformer_blocks[.]0 already"):
        attach(pipe, plan_of(PYRAMID))


def test_a_compiled_network_is_refused():
    pipe = tiny_wan(layers=2)
    pipe.transformer.compile()
    with pytest.raises(InputError, match=r"WanTransformer3DModel is compiled, with blocks[.]0 in it"):
        attach(pipe, plan_of(FIRST_BLOCK))
    pipe = tiny_wan(layers=2)
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(InputError, match=r"is wrapped by torch[.]compile"):
        attach(pipe, plan_of(FIRST_BLOCK))


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("FirstBlockCache", {}, "unknown cache of diffusers 'FirstBlockCache'; did you mean 'FirstBlockCacheConfig'"),
        ("FirstBlockCacheConfig", {"treshold": 1}, "unknown option of FirstBlockCacheConfig 'treshold'; did you mean"),
        ("FirstBlockCacheConfig", {"threshold": "x"}, "option 'threshold' of FirstBlockCacheConfig: .*; got 'x'"),
        ("FirstBlockCacheConfig", {"threshold": float("nan")}, "option 'threshold' .* finite number; got nan"),
        ("FirstBlockCacheConfig", {"threshold": -1.0}, "option 'threshold' of .* is at least 0; got -1.0"),
        ("TaylorSeerCacheConfig", {"cache_interval": 0}, "option 'cache_interval' of .* is at least 1; got 0"),
        ("TaylorSeerCacheConfig", {"taylor_factors_dtype": "int8"}, "name of a type such as 'bfloat16'; got 'int8'"),
        (
            "PyramidAttentionBroadcastConfig",
            {"current_timestep_callback": 1},
            "is a function, which a plan cannot hold; leave it out",
        ),
    ],
)
def test_bad_options_name_the_value_and_the_mend(config, options, words):
    with pytest.raises((ValidationError, InputError), match=words):
        HostCache(config=config, options=options)
