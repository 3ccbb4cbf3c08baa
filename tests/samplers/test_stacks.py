"""The structure of transformers, against what runs in every family of the zoo."""

import functools

import pytest
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn
from zoo import ZOO

from fewstep.samplers.errors import InputError
from fewstep.samplers.stacks import (
    Stack,
    block_names,
    block_stacks,
    named_arguments,
    streams_of,
    sublayers,
    with_arguments,
)

UNETS = ("ddim", "ddpm", "stable-diffusion", "img2img", "inpaint", "controlnet", "ip-adapter", "sdxl", "stable-video")
UNETS += ("animatediff",)
TRANSFORMERS = [name for name in ZOO if name not in UNETS]


@functools.cache
def network_of(family):
    return getattr(family.build(), family.denoiser)


@pytest.fixture(scope="module")
def seen():
    """Of each family, the calls of its blocks in one step: name, module, args, kwargs, output."""
    calls = {}
    for name in TRANSFORMERS:
        family = ZOO[name]
        pipe = family.build()
        network = getattr(pipe, family.denoiser)
        calls[name] = []
        for block in block_names(network):
            network.get_submodule(block).register_forward_hook(
                lambda module, args, kwargs, output, name=name, block=block: calls[name].append(
                    (block, module, args, kwargs, output)
                ),
                with_kwargs=True,
            )
        family.call(pipe, batch=2, steps=2)
    return calls


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_are_named_in_the_order_in_which_they_run(name, seen):
    names = block_names(network_of(ZOO[name]))
    ran = [call[0] for call in seen[name]]
    assert tuple(ran[: len(names)]) == names
    assert tuple(ran) == names * (len(ran) // len(names))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_output_continues_an_input_of_its_shape(name, seen):
    for block, module, args, kwargs, output in seen[name]:
        streams = streams_of(module, args, kwargs, output)
        inputs = named_arguments(module, args, kwargs)
        outputs = (output,) if isinstance(output, torch.Tensor) else output
        assert len({key for key, _ in streams}) == len({place for _, place in streams}) == len(streams) > 0
        assert sum(value is not None for value in outputs) == len(streams)
        for key, place in streams:
            assert inputs[key].shape == outputs[place].shape, block


def test_streams_agree_with_the_hosts_registry(seen):
    checked = 0
    for calls in seen.values():
        for _, module, args, kwargs, output in calls:
            try:
                data = TransformerBlockRegistry.get(type(module))
            except ValueError:
                continue
            if isinstance(output, tuple):
                streams = dict(streams_of(module, args, kwargs, output))
                assert streams[data.hidden_states_argument_name] == data.return_hidden_states_index
                checked += len(streams) == 2
    assert checked > 20


def test_the_last_block_of_sd3_ends_the_stream_of_the_text(seen):
    per_step = len(block_names(network_of(ZOO["sd3"])))
    streams = [streams_of(*call[1:]) for call in seen["sd3"][:per_step]]
    assert [dict(each) for each in streams] == [{"encoder_hidden_states": 0, "hidden_states": 1}] * (per_step - 1) + [
        {"hidden_states": 1}
    ]


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_has_no_stack(name):
    with pytest.raises(InputError, match="is a U-Net, which has no stack of equal blocks"):
        block_stacks(network_of(ZOO[name]))


def test_a_network_without_blocks_says_which_lists_it_has():
    network = nn.Module()
    network.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(InputError, match=r"Module has no stack of transformer blocks .* its lists are \['layers'\]"):
        block_stacks(network)


def test_stacks_of_a_few_networks():
    flux = block_stacks(network_of(ZOO["flux"]))
    assert [stack.name for stack in flux] == ["transformer_blocks", "single_transformer_blocks"]
    assert flux[0] == Stack("transformer_blocks", tuple(f"transformer_blocks.{index}" for index in range(3)))
    assert [stack.name for stack in block_stacks(network_of(ZOO["z-image"]))] == ["layers"]
    assert [stack.name for stack in block_stacks(network_of(ZOO["kandinsky5"]))] == ["visual_transformer_blocks"]
    latte = block_names(network_of(ZOO["latte"]))
    assert latte[:3] == ("transformer_blocks.0", "temporal_transformer_blocks.0", "transformer_blocks.1")


def test_a_wrapper_hides_no_stack():
    network = network_of(ZOO["dit"])
    wrapper = nn.Module()
    wrapper.inner = network
    assert block_names(wrapper) == tuple(f"inner.{name}" for name in block_names(network))


def test_sublayers_of_a_few_networks():
    def of_first(name, block):
        return {
            kind: [part.removeprefix(f"{block}.") for part in names if part.startswith(f"{block}.")]
            for kind, names in sublayers(network_of(ZOO[name])).items()
        }

    assert of_first("wan", "blocks.0") == {"attention": ["attn1"], "cross-attention": ["attn2"], "mlp": ["ffn"]}
    assert of_first("flux", "transformer_blocks.0") == {
        "attention": ["attn"],
        "cross-attention": [],
        "mlp": ["ff", "ff_context"],
    }
    assert of_first("flux", "single_transformer_blocks.0") == {"attention": ["attn"], "cross-attention": [], "mlp": []}
    assert of_first("kandinsky5", "visual_transformer_blocks.0") == {
        "attention": ["self_attention"],
        "cross-attention": ["cross_attention"],
        "mlp": ["feed_forward"],
    }
    assert of_first("qwen-image", "transformer_blocks.0")["mlp"] == ["img_mlp", "txt_mlp"]
    assert of_first("ltx", "transformer_blocks.0")["cross-attention"] == ["attn2"]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_block_has_an_attention(name):
    network = network_of(ZOO[name])
    found = sublayers(network)
    for block in block_names(network):
        assert any(part.startswith(f"{block}.") for kind in ("attention", "cross-attention") for part in found[kind])


class _Pair(nn.Module):
    def forward(self, hidden_states, context, *rest, scale=1.0):
        return (context + 0, hidden_states + 0)


def test_arguments_are_named_and_replaced_the_way_they_were_given():
    a, b, c = torch.zeros(2, 3), torch.ones(2, 4), torch.ones(1)
    assert list(named_arguments(_Pair(), (a, b, c), {"scale": 2})) == ["hidden_states", "context", "*0", "scale"]
    args, kwargs = with_arguments(_Pair(), (a, b, c), {"scale": 2}, {"context": a, "*0": b, "scale": 3})
    assert all(given is wanted for given, wanted in zip(args, (a, a, b), strict=True))
    assert kwargs == {"scale": 3}


def test_shapes_tell_streams_apart_where_nothing_else_does():
    a, b = torch.zeros(2, 3), torch.ones(2, 4)
    assert dict(streams_of(_Pair(), (a,), {"context": b}, (b, a))) == {"context": 0, "hidden_states": 1}
    with pytest.raises(InputError, match="cannot tell which output continues which input"):
        streams_of(_Pair(), (a,), {"context": a}, (a, a))


def test_an_output_of_another_shape_is_no_residual():
    with pytest.raises(InputError, match=r"turns .* into \[\(5,\)\]; fewstep cannot tell"):
        streams_of(_Pair(), (torch.zeros(3),), {}, torch.zeros(5))
    with pytest.raises(InputError, match="_Pair returns dict; a block returns a tensor"):
        streams_of(_Pair(), (torch.zeros(3),), {}, {})
