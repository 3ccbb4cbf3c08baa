"""Block masks, against a hand-unrolled DiT and diffusers' own TaylorSeer."""

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.hooks import TaylorSeerCacheConfig
from mask_reference import Reuse, newton, sample_dit
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion, tiny_wan
from zoo import ZOO

from fewstep.samplers import ExplicitGrid, InputError, Plan, SpacingGrid, attach
from fewstep.samplers.block_mask import BlockMask, uniform_mask
from fewstep.samplers.forecast import forecast
from fewstep.samplers.stacks import block_names

KINDS = ("block", "attention", "cross-attention", "mlp")
SEVERAL = [ZOO[name] for name in ("dit", "pixart-sigma", "flux-img2img", "wan", "latte", "z-image", "kandinsky5")]


def sampled(pipe, mask, **arguments):
    """Images of a call by a mask, and what was counted."""
    with attach(pipe, Plan(caches=mask)) as handle:
        images = pipe(**call_arguments(pipe) | {"num_inference_steps": len(mask.rows)} | arguments)[0]
    return images, handle.stats


@pytest.mark.parametrize("family", SEVERAL, ids=str)
@pytest.mark.filterwarnings("ignore:the block-mask cache computes all")
def test_a_mask_that_computes_everything_changes_no_bit(family):
    pipe, total = family.build(), round(3 / family.share)
    plain = family.call(pipe, steps=3)
    with attach(pipe, Plan(caches=BlockMask(rows=("1",) * total, targets=KINDS))) as handle:
        assert torch.equal(family.call(pipe, steps=3), plain)
    assert all(rows.skipped == 0 for rows in handle.stats.modules.values())
    assert handle.stats.cache_bytes == 0


@pytest.mark.parametrize("family", SEVERAL, ids=str)
def test_skips_what_the_table_says(family):
    pipe, total = family.build(), round(4 / family.share)
    network, ran = getattr(pipe, family.denoiser), []
    plain = family.call(pipe, steps=4)
    for name in block_names(network):
        network.get_submodule(name).register_forward_hook(lambda *_: ran.append(1))
    with attach(pipe, Plan(caches=uniform_mask(total, 2))) as handle:
        cached = family.call(pipe, steps=4)
    modules = handle.stats.modules.values()
    assert sum(rows.calls for rows in modules) == len(ran)
    assert all(rows.run == rows.skipped == handle.stats.rows / 2 for rows in modules)
    assert cached.shape == plain.shape
    assert not torch.equal(cached, plain)


CASES = {
    "attention": (("attention",), ("111", "010", "001", "110", "000"), 0),
    "attention and mlp": (("attention", "mlp"), ("111111", "010101", "001111", "110000", "000000"), 0),
    "blocks": (("block",), ("111", "011", "101", "110", "000"), 0),
    "blocks, linear": (("block",), ("111", "111", "001", "110", "000"), 1),
    "mlp, quadratic": (("mlp",), ("111", "111", "101", "011", "111", "000", "000"), 2),
    "all blocks in one column": (("block",), ("1", "0", "1", "0"), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_is_what_a_loop_written_by_hand_does(case):
    targets, rows, order = CASES[case]
    pipe = tiny_dit(layers=3)
    modules = [(kind, block) for block in range(3) for kind in targets]
    columns = {module: index if len(rows[0]) > 1 else 0 for index, module in enumerate(modules)}
    latents = sample_dit(pipe, Reuse(rows, columns, order), len(rows))
    expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    plain = pipe(**call_arguments(pipe), num_inference_steps=len(rows)).images
    images, _ = sampled(pipe, BlockMask(rows=rows, targets=targets, order=order))
    np.testing.assert_allclose(images, expected, rtol=0, atol=2e-5)
    assert np.abs(images - plain).max() > 1e-3


@pytest.mark.parametrize("order", [0, 1])
def test_agrees_with_the_hosts_taylorseer_up_to_order_one(order):
    """On a pipeline that evaluates its branches in turn and says so to the host."""
    steps = 8
    rows = tuple("1" if step < 2 or (step - 3) % 2 == 0 else "0" for step in range(steps))
    pipe = tiny_wan(layers=2)
    host = TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn[12]"],
    )
    pipe.transformer.enable_cache(host)
    expected = pipe(**call_arguments(pipe), num_inference_steps=steps)[0]
    pipe.transformer.disable_cache()
    cached, stats = sampled(pipe, BlockMask(rows=rows, targets=("attention", "cross-attention"), order=order))
    torch.testing.assert_close(torch.as_tensor(cached), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)
    assert {rows.skipped for rows in stats.modules.values()} == {3 * stats.rows / steps}


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_is_exact_for_polynomials_of_its_order(order):
    draw = torch.Generator().manual_seed(0)
    coefficients = torch.randn(order + 1, 2, 3, generator=draw, dtype=torch.float64)

    def feature(step):
        return {"a": sum(c * step**power for power, c in enumerate(coefficients)), "b": None}

    values = [(step, feature(step)) for step in (7, 4, 2)[: order + 1]]
    for step in (8, 9, 12):
        found = forecast(values, step)
        torch.testing.assert_close(found["a"], feature(step)["a"], rtol=1e-12, atol=1e-10)
        assert found["b"] is None
        by_hand = newton([(at, tree["a"]) for at, tree in values], step)
        torch.testing.assert_close(found["a"], by_hand, rtol=1e-12, atol=1e-10)


def test_a_forecast_of_half_precision_is_formed_in_single():
    values = [(step, torch.full((2,), float(value), dtype=torch.float16)) for step, value in ((3, 60000), (2, 59000))]
    torch.testing.assert_close(forecast(values, 8), torch.full((2,), 65000.0, dtype=torch.float16))


def test_a_module_that_runs_twice_in_an_evaluation_has_two_values():
    """CogView4's blocks give the image and the text to the same MLP."""
    family = ZOO["cogview4"]
    pipe = family.build()
    with attach(pipe, Plan(caches=uniform_mask(2, 2, ("mlp",)))) as handle:
        family.call(pipe, steps=2)
    assert all(rows.run == rows.skipped == handle.stats.rows for rows in handle.stats.modules.values())


def test_repeated_timesteps_have_rows_of_their_own():
    scheduler = HeunDiscreteScheduler()
    pipe = tiny_dit(scheduler, layers=2)
    images, stats = sampled(pipe, uniform_mask(5, 2), num_inference_steps=3)
    assert np.isfinite(images).all()
    assert {(rows.run, rows.skipped) for rows in stats.modules.values()} == {(3 * 4, 2 * 4)}


def test_a_call_that_starts_late_computes_first():
    family = ZOO["flux-img2img"]
    pipe, total = family.build(), round(2 / family.share)
    rows = ("1",) + ("0",) * (total - 1)
    with attach(pipe, Plan(caches=BlockMask(rows=rows))) as handle:
        family.call(pipe, steps=2)
    assert {(rows.run, rows.skipped) for rows in handle.stats.modules.values()} == {(2, 2)}


def test_keeps_only_what_a_later_step_asks_for():
    pipe = tiny_dit(layers=2)
    one = sampled(pipe, BlockMask(rows=("11", "01", "11")))[1].cache_bytes
    assert sampled(pipe, BlockMask(rows=("11", "00", "11")))[1].cache_bytes == 2 * one
    assert sampled(pipe, BlockMask(rows=("11", "11", "01", "01"), order=2))[1].cache_bytes == 2 * one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": ("11", "12")}, "row 1 of a block mask is made of 0 and 1; got '12'"),
        ({"rows": ("11", "1")}, "row 1 of a block mask has 1 modules and row 0 has 2"),
        ({"rows": ("10", "11")}, "first row of a block mask computes everything, .* got 10"),
        ({"rows": ("1", "0"), "targets": ("mlp", "mlp")}, "are different kinds; got mlp, mlp"),
        ({"rows": ()}, "at least 1 item"),
        ({"rows": ("1",), "order": 3}, "less than or equal to 2"),
        ({"rows": ("1",), "targets": ("norm",)}, "Input should be 'block', 'attention', 'cross-attention' or 'mlp'"),
    ],
)
def test_refuses_tables_that_say_nothing(fields, message):
    with pytest.raises(ValidationError, match=message):
        BlockMask(**fields)


def test_refuses_another_number_of_steps():
    pipe, mask = tiny_dit(layers=2), BlockMask(rows=("11", "00", "11"))
    words = "the block-mask table is for 3 timesteps and the scheduler has 4; sample in as many steps"
    with pytest.raises(InputError, match=words):
        attach(pipe, Plan(grid=SpacingGrid(steps=4), caches=mask))
    with attach(pipe, Plan(caches=mask)), pytest.raises(InputError, match=words):
        pipe(**call_arguments(pipe), num_inference_steps=4)
    with attach(pipe, Plan(grid=ExplicitGrid(timesteps=(900, 500, 100)), caches=mask)) as handle:
        pipe(**call_arguments(pipe))
    assert handle.stats.modules["transformer.transformer_blocks.0"].skipped == 4


def test_refuses_networks_that_the_table_does_not_fit():
    with pytest.raises(InputError, match=r"table is 2 modules wide and DiTTransformer2DModel has 3 of its kinds, from"):
        attach(tiny_dit(layers=3), Plan(caches=BlockMask(rows=("11", "00"))))
    with pytest.raises(InputError, match="cannot work on StableDiffusionPipeline: UNet2DConditionModel is a U-Net"):
        attach(tiny_stable_diffusion(), Plan(caches=uniform_mask(2, 2)))
    with pytest.raises(InputError, match="DiTTransformer2DModel has no cross-attention in its blocks"):
        attach(tiny_dit(), Plan(caches=uniform_mask(2, 2, ("cross-attention",))))


def test_a_uniform_mask():
    assert uniform_mask(5, 2).rows == ("1", "0", "1", "0", "1")
    assert uniform_mask(4, 3, ("mlp",), order=1) == BlockMask(rows=("1", "0", "0", "1"), targets=("mlp",), order=1)
    assert uniform_mask(4, 2).computes(4) == (True, False, True, False)
    with pytest.raises(InputError, match="computes every 1 or more; got 4 and 0"):
        uniform_mask(4, 0)
