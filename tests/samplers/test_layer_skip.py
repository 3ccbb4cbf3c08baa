"""Layers that are left out, against networks in which they compute and are made to change nothing."""

import copy
import inspect
import random
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
from mask_reference import sample_dit
from pydantic import ValidationError
from tiny import call_arguments, tiny_dit, tiny_stable_diffusion, tiny_unet
from torch.utils._pytree import tree_map_only
from zoo import ZOO

from fewstep.samplers import BlockMask, InputError, Plan, PlanWarning, SpacingGrid, attach
from fewstep.samplers.layer_skip import LayerSkip
from fewstep.samplers.left_out import shortcut, stand_ins
from fewstep.samplers.stacks import streams_of

KINDS = ("block", "attention", "cross-attention", "mlp", "resnet")
FAMILIES = [family for family in ZOO.values() if not family.tokens]
STEPS = 3


def zeros(*given):
    """A hook of torch that makes zeros of what a module returns."""
    return tree_map_only(torch.Tensor, torch.zeros_like, given[-1])


def inputs(block, args, kwargs, output):
    """A hook of torch that makes a block return its streams as they came in, by the shapes of what it computed."""
    named = inspect.signature(block.forward).bind(*args, **kwargs).arguments
    streams = {position: name for name, position in streams_of(block, args, kwargs, output)}
    if isinstance(output, torch.Tensor):
        return named[streams[0]]
    return tuple(named[streams[place]] if place in streams else value for place, value in enumerate(output))


@dataclass
class Oracle:
    """Runs a pipeline whose layers all compute; those that a table leaves out are then made to change nothing."""

    family: object
    pipe: object
    names: tuple
    kind: str
    rows: tuple

    def sample(self):
        network = getattr(self.pipe, self.family.denoiser)
        self.calls = 0
        hooks = [network.register_forward_hook(self._count)]
        for column, name in enumerate(self.names):
            module = network.get_submodule(name)
            hooks.append(self._listen(module, column))
        try:
            return self.family.call(self.pipe, steps=STEPS)
        finally:
            for hook in hooks:
                hook.remove()

    def _count(self, *_):
        self.calls += 1

    def _leaves_out(self, column):
        of_step = 2 if self.family.guidance == "separate" else 1
        return self.rows[len(self.rows) - STEPS + self.calls // of_step][column] == "0"

    def _listen(self, module, column):
        change = inputs if self.kind == "block" else zeros
        if self.kind == "resnet":
            module = module.conv2
        elif self.kind == "attention" and self.family.denoiser == "unet":
            module = module.to_out[0] if isinstance(module, Attention) else module.proj_out

        def hook(*given):
            return change(*given) if self._leaves_out(column) else None

        return module.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_layer_left_out_is_one_that_changes_nothing(family):
    """All kinds of layers in all families, some at each step, the first and the branches of guidance included."""
    pipe, total, drawn, tested = family.build(), round(STEPS / family.share), random.Random(family.name), []
    plain = family.call(pipe, steps=STEPS)
    for kind in KINDS:
        try:
            names = tuple(stand_ins(getattr(pipe, family.denoiser), (kind,)))
        except InputError:
            continue
        rows = ["".join(drawn.choice("01") for _ in names) for _ in range(total)]
        rows[-STEPS] = "0" + rows[-STEPS][1:]
        part = LayerSkip(rows=tuple(rows), targets=(kind,))
        with attach(pipe, Plan(caches=part)) as handle:
            found = family.call(pipe, steps=STEPS)
        expected = Oracle(family, pipe, names, kind, part.rows).sample()
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5, msg=lambda words, kind=kind: f"{kind}: {words}"
        )
        assert (found - plain).abs().max() > 1e-3, kind
        for column, name in enumerate(names):
            rows_of = handle.stats.modules[f"{family.denoiser}.{name}"]
            left_out = sum(row[column] == "0" for row in part.rows[-STEPS:])
            assert rows_of.skipped * STEPS == left_out * (rows_of.run + rows_of.skipped), name
        assert handle.stats.cache_bytes == 0
        tested.append(kind)
    assert tested


def called(pipe, steps):
    """Images of a call; two calls start from the same noise."""
    return pipe(**call_arguments(pipe) | {"num_inference_steps": steps})[0]


def without(pipe, *names):
    """A pipeline in which some matrices are zero."""
    pipe = copy.deepcopy(pipe)
    network = getattr(pipe, "unet", None) or pipe.transformer
    for name in names:
        for parameter in network.get_submodule(name).parameters():
            parameter.data.zero_()
    return pipe


ZEROED = {
    "resnet": (tiny_unet, "down_blocks.1.resnets.0", ("down_blocks.1.resnets.0.conv2",)),
    "resnet of other channels": (tiny_unet, "up_blocks.0.resnets.0", ("up_blocks.0.resnets.0.conv2",)),
    "attention of pixels": (tiny_unet, "mid_block.attentions.0", ("mid_block.attentions.0.to_out.0",)),
    "attention to text": (
        tiny_stable_diffusion,
        "down_blocks.1.attentions.0",
        ("down_blocks.1.attentions.0.proj_out",),
    ),
    "attention": (tiny_dit, "transformer_blocks.0.attn1", ("transformer_blocks.0.attn1.to_out.0",)),
    "mlp": (tiny_dit, "transformer_blocks.0.ff", ("transformer_blocks.0.ff.net.2",)),
    "block": (
        tiny_dit,
        "transformer_blocks.0",
        ("transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.ff.net.2"),
    ),
}


@pytest.mark.parametrize("case", ZEROED)
def test_is_a_network_with_a_last_matrix_of_zeros(case):
    build, layer, matrices = ZEROED[case]
    pipe, kind = build(), case.split()[0]
    names = list(stand_ins(getattr(pipe, "unet", None) or pipe.transformer, (kind,)))
    row = "".join("0" if name == layer else "1" for name in names)
    expected, plain = called(without(pipe, *matrices), 2), called(pipe, 2)
    with attach(pipe, Plan(caches=LayerSkip(rows=(row, row), targets=(kind,)))):
        images = called(pipe, 2)
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)
    assert np.abs(images - plain).max() > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        {"out_channels": 12},
        {"up": True, "output_scale_factor": 2**0.5},
        {"down": True, "out_channels": 4},
        {"up": True, "kernel": "fir", "out_channels": 12},
        {"down": True, "kernel": "fir"},
        {"up": True, "kernel": "sde_vp"},
        {"down": True, "kernel": "sde_vp", "output_scale_factor": 0.5},
        {"time_embedding_norm": "scale_shift"},
        {"time_embedding_norm": "ada_group", "out_channels": 4, "down": True, "output_scale_factor": 3.0},
    ],
    ids=str,
)
def test_what_is_left_of_a_resnet_is_its_shortcut(options):
    torch.manual_seed(0)
    kind = ResnetBlockCondNorm2D if options.get("time_embedding_norm") == "ada_group" else ResnetBlock2D
    resnet = kind(in_channels=8, temb_channels=6, groups=4, **options).eval()
    torch.nn.init.zeros_(resnet.conv2.weight)
    torch.nn.init.zeros_(resnet.conv2.bias)
    x, time = torch.randn(2, 8, 6, 6), torch.randn(2, 6)
    with torch.no_grad():
        assert torch.equal(shortcut(resnet, (x, time), {}), resnet(x, time))
        assert torch.equal(shortcut(resnet, (), {"input_tensor": x, "temb": time}), resnet(x, time))


class LeaveOut:
    """What `sample_dit` asks for each layer: zeros for those that a table leaves out."""

    def __init__(self, kind, rows):
        self.kind, self.rows, self.step = kind, rows, 0

    def __call__(self, kind, block, compute):
        value = compute()
        return torch.zeros_like(value) if kind == self.kind and self.rows[self.step][block] == "0" else value


@pytest.mark.parametrize("kind", ["block", "attention", "mlp"])
def test_is_what_a_loop_written_by_hand_does(kind):
    """The first step leaves out a layer, and the last one all."""
    pipe, rows = tiny_dit(layers=3), ("011", "111", "101", "000")
    latents = sample_dit(pipe, LeaveOut(kind, rows), len(rows))
    expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()
    with attach(pipe, Plan(caches=LayerSkip(rows=rows, targets=(kind,)))):
        images = called(pipe, len(rows))
    np.testing.assert_allclose(images, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["ddim", "stable-diffusion", "sd3", "flux", "wan"])
def test_a_table_of_ones_changes_no_bit(name):
    family = ZOO[name]
    pipe = family.build()
    plain = family.call(pipe, steps=2)
    with warnings.catch_warnings(action="ignore", category=PlanWarning):
        handle = attach(pipe, Plan(caches=LayerSkip(rows=("1", "1"), targets=KINDS)))
    with handle:
        assert torch.equal(family.call(pipe, steps=2), plain)
    assert all(rows.skipped == 0 for rows in handle.stats.modules.values())


def test_layers_are_counted_block_after_block_and_kind_after_kind():
    unet = tiny_stable_diffusion().unet
    assert list(stand_ins(unet, ("attention", "resnet")))[:7] == [
        "down_blocks.0.resnets.0",
        "down_blocks.1.attentions.0",
        "down_blocks.1.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.0",
        "mid_block.resnets.1",
        "up_blocks.0.attentions.0",
    ]
    assert list(stand_ins(tiny_dit(layers=2).transformer, ("mlp", "resnet", "block"))) == [
        f"transformer_blocks.{index}{name}" for index in range(2) for name in (".ff", "")
    ]


def test_repeated_timesteps_have_rows_of_their_own():
    pipe = tiny_dit(HeunDiscreteScheduler(), layers=2)
    with attach(pipe, Plan(caches=LayerSkip(rows=("01", "11", "10", "00", "11")))) as handle:
        called(pipe, 3)
    skipped = {name[-1]: rows.skipped for name, rows in handle.stats.modules.items()}
    assert skipped == {"0": 2 * 4, "1": 2 * 4}


def test_works_beside_a_cache_of_other_modules():
    pipe = tiny_dit(layers=2)
    skip = LayerSkip(rows=("10", "01", "11"), targets=("attention",))
    mask = BlockMask(rows=("11", "00", "01"), targets=("mlp",))
    with attach(pipe, Plan(caches=[skip, mask])) as handle:
        both = called(pipe, 3)
    counted = {
        name.removeprefix("transformer.transformer_blocks."): rows.skipped
        for name, rows in handle.stats.modules.items()
    }
    assert counted == {"0.attn1": 4, "0.ff": 8, "1.attn1": 4, "1.ff": 4}
    with attach(pipe, Plan(caches=[mask, skip])):
        np.testing.assert_array_equal(called(pipe, 3), both)
    with pytest.raises(InputError, match="the block-mask and the layer-skip cache both decide about"):
        attach(pipe, Plan(caches=[mask, LayerSkip(rows=("11", "00", "11"), targets=("mlp",))]))


def test_the_layers_in_a_block_that_is_kept_stay_left_out():
    pipe = tiny_dit(layers=2)
    parts = [LayerSkip(rows=("0", "0"), targets=("attention",)), BlockMask(rows=("11", "10"))]
    with attach(pipe, Plan(caches=parts)) as handle:
        called(pipe, 2)
    counted = {name[-7:]: (rows.run, rows.skipped) for name, rows in handle.stats.modules.items()}
    assert counted == {"locks.0": (8, 0), "locks.1": (4, 4), "0.attn1": (0, 8), "1.attn1": (0, 4)}


def test_a_setting_to_begin_with():
    assert LayerSkip.suggest(tiny_dit(layers=3), 3).rows == ("101", "111", "101")
    assert LayerSkip(rows=("1", "0")).computes(2) == (True, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rows": ("11", "12")}, "row 1 of a layer skip is made of 0 and 1; got '12'"),
        ({"rows": ("11", "1")}, "row 1 of a layer skip has 1 modules and row 0 has 2"),
        ({"rows": ("1", "0"), "targets": ("mlp", "mlp")}, "the targets of a layer skip are different kinds; got mlp"),
        ({"rows": ()}, "at least 1 item"),
        ({"rows": ("1",), "targets": ()}, "at least 1 item"),
        ({"rows": ("1",), "targets": ("norm",)}, "Input should be 'block', 'attention', 'cross-attention', 'mlp' or"),
    ],
)
def test_refuses_tables_that_say_nothing(fields, message):
    with pytest.raises(ValidationError, match=message):
        LayerSkip(**fields)


def test_refuses_another_number_of_steps():
    pipe, part = tiny_dit(layers=2), LayerSkip(rows=("11", "00", "11"))
    words = "the layer-skip table is for 3 timesteps and the scheduler has 4; sample in as many steps"
    with pytest.raises(InputError, match=words):
        attach(pipe, Plan(grid=SpacingGrid(steps=4), caches=part))
    with attach(pipe, Plan(caches=part)), pytest.raises(InputError, match=words):
        called(pipe, 4)


@pytest.mark.parametrize(
    ("build", "rows", "targets", "message"),
    [
        (tiny_dit, ("11",), ("block",), "is 2 modules wide and DiTTransformer2DModel has 1 of its kinds, from"),
        (tiny_dit, ("1",), ("resnet",), "DiTTransformer2DModel is no U-Net, and has no resnet"),
        (tiny_dit, ("1",), ("cross-attention",), "DiTTransformer2DModel has no cross-attention in its blocks"),
        (
            tiny_unet,
            ("1",),
            ("block", "mlp"),
            "UNet2DModel is a U-Net, of which resnet and attention layers can .* mlp",
        ),
        (tiny_unet, ("0000",), ("resnet",), r"is 4 modules wide and UNet2DModel has \d+ of its kinds, from down_bl"),
    ],
)
def test_refuses_networks_that_the_table_does_not_fit(build, rows, targets, message):
    with pytest.raises(InputError, match=message):
        attach(build(), Plan(caches=LayerSkip(rows=rows, targets=targets)))


class Mixed(torch.nn.Module):
    """A block whose outputs are called otherwise than its inputs."""

    def __init__(self):
        super().__init__()
        self.attn = torch.nn.Sequential(torch.nn.Identity())
        self.ff = torch.nn.Sequential(torch.nn.Identity())

    def forward(self, x, y):
        a, b = self.attn(x), self.ff(y)
        return a, b


class Either(Mixed):
    """A block that returns its streams in several orders."""

    def forward(self, x, y):
        if x is None:
            return x, y
        return y, x


class Threefold(torch.nn.Sequential):
    """An attention of three outputs."""

    def forward(self, x):
        return x, x, x


class Pair(torch.nn.Sequential):
    """An MLP of two outputs."""

    def forward(self, x):
        return x, x


def network_of(block):
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList([block])
    return network


def test_refuses_modules_whose_answer_cannot_be_told():
    with pytest.raises(InputError, match=r"Mixed returns \(a, b\), which are not all called as inputs of it are"):
        stand_ins(network_of(Mixed()), ("block",))
    with pytest.raises(InputError, match="Either returns several things; fewstep cannot tell what it gives"):
        stand_ins(network_of(Either()), ("block",))
    block = Mixed()
    block.attn, block.ff = Threefold(torch.nn.Identity()), Pair(torch.nn.Identity())
    with pytest.raises(InputError, match=r"Threefold returns \(x, x, x\); fewstep cannot tell"):
        stand_ins(network_of(block), ("attention",))
    with pytest.raises(InputError, match="Pair returns a tuple; fewstep cannot tell"):
        stand_ins(network_of(block), ("mlp",))
