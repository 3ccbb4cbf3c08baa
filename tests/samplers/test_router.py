"""Routers: block masks whose table is learned, in the plan or in a file beside it."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit, tiny_sd3

from fewstep.samplers import InputError, Plan, SpacingGrid, attach
from fewstep.samplers.block_mask import BlockMask
from fewstep.samplers.files import write_tensors
from fewstep.samplers.router import Router, read_router, write_router

ROWS = ((0.0, 1.0, 0.4, 0.9), (0.05, 0.9, 0.1, 0.2), (0.9, 0.0, 0.1, 0.1))
MASK = BlockMask(rows=("1111", "0101", "1000"), targets=("attention", "mlp"))


def images_of(pipe, plan):
    with attach(pipe, plan) as handle:
        return pipe(**call_arguments(pipe)).images, handle.stats


def test_is_the_block_mask_of_what_is_above_the_threshold():
    """The first step computes everything, whatever the router says."""
    pipe, grid = tiny_dit(layers=2), SpacingGrid(steps=3)
    images, stats = images_of(pipe, Plan(grid=grid, caches=Router(probabilities=ROWS, threshold=0.15)))
    expected, counted = images_of(pipe, Plan(grid=grid, caches=MASK))
    np.testing.assert_array_equal(images, expected)
    assert stats.modules == counted.modules


def test_reads_the_file_beside_the_plan(tmp_path):
    pipe, plan = (
        tiny_dit(layers=2),
        Plan(grid=SpacingGrid(steps=3), caches=Router(file="r.safetensors", threshold=0.15)),
    )
    names = Router(probabilities=ROWS).reach(pipe.transformer)
    write_router(tmp_path / "r.safetensors", torch.tensor(ROWS), names)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert list(loaded.file_digests()) == ["r.safetensors"]
    assert loaded.caches[0].computes(3) is None
    torch.testing.assert_close(read_router(tmp_path / "r.safetensors"), torch.tensor(ROWS))
    images, _ = images_of(pipe, loaded)
    np.testing.assert_array_equal(images, images_of(pipe, Plan(grid=plan.grid, caches=MASK))[0])


def test_takes_cross_attentions_and_both_streams_mlps():
    names = Router(probabilities=((1.0,), (0.0,))).reach(tiny_sd3(layers=2).transformer)
    assert [name.partition(".0.")[2] for name in names][:3] == ["attn", "ff", "ff_context"]


@pytest.mark.parametrize(
    ("tensors", "header"),
    [
        ({"probabilities": torch.ones(2, 4)}, {}),
        ({"probabilities": torch.ones(2, 4) * 2}, {"format": "fewstep-router-1"}),
        ({"probabilities": torch.full((2, 4), torch.nan)}, {"format": "fewstep-router-1"}),
        ({"probabilities": torch.ones(2)}, {"format": "fewstep-router-1"}),
        ({"logits": torch.ones(2, 4)}, {"format": "fewstep-router-1"}),
    ],
)
def test_refuses_files_that_hold_no_router(tmp_path, tensors, header):
    write_tensors(tmp_path / "r.safetensors", tensors, header)
    with pytest.raises(InputError, match=r"r\.safetensors holds no router; write one with write_router"):
        read_router(tmp_path / "r.safetensors")


def test_refuses_what_cannot_work(tmp_path):
    pipe = tiny_dit(layers=2)
    with pytest.raises(ValidationError, match=r"one probability for each sublayer; got \[1, 2\]"):
        Router(probabilities=((1.0, 0.0), (1.0,)))
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Router(probabilities=((1.5,),))
    with pytest.raises(InputError, match=r"router part reads 'router\.safetensors' beside the plan; load the plan"):
        attach(pipe, Plan(caches=Router()))
    with pytest.raises(InputError, match="the router table is 4 modules wide and DiTTransformer2DModel has 2"):
        attach(tiny_dit(), Plan(caches=Router(probabilities=ROWS)))
    with pytest.raises(InputError, match="the router table is for 3 timesteps and the scheduler has 2"):
        attach(pipe, Plan(grid=SpacingGrid(steps=2), caches=Router(probabilities=ROWS)))
    write_router(tmp_path / "router.safetensors", torch.tensor(ROWS)[:, :3], ["a", "b", "c"])
    Plan(caches=Router()).save(tmp_path / "plan.json")
    with pytest.raises(InputError, match="the router table is 3 modules wide"):
        attach(pipe, Plan.load(tmp_path / "plan.json"))
