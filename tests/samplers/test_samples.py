"""A call taken apart by sample, and outputs put together again."""

import re

import numpy as np
import pytest
import torch
from diffusers import ImagePipelineOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image
from tiny import TINY, call_arguments, generators

from fewstep.samplers import InputError
from fewstep.samplers.samples import conditions_of, count_samples, merge_outputs, select_samples, with_first


@pytest.mark.parametrize("name", TINY)
def test_calls_of_every_family_are_counted_and_cut(name):
    pipe = TINY[name]()
    whole, single = call_arguments(pipe, batch=3), call_arguments(pipe, batch=1, seed=2)
    assert count_samples("x", whole) == 3
    cut = select_samples("x", whole, [2], 3)
    assert cut.keys() == whole.keys()
    assert count_samples("x", cut) == 1
    assert [g.initial_seed() for g in cut["generator"]] == [g.initial_seed() for g in single["generator"]]
    for key, value in cut.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, whole[key][2:])
    assert select_samples("x", whole, [0, 1, 2], 3).keys() == whole.keys()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"class_labels": [1, 2]}, 2),
        ({"class_labels": torch.tensor([1, 2, 3])}, 3),
        ({"prompt": "a cat"}, 1),
        ({"prompt": ["a", "b"], "negative_prompt": "c"}, 2),
        ({"prompt_embeds": [torch.zeros(3, 4), torch.zeros(2, 4)]}, 2),
        ({"batch_size": 5}, 5),
        ({"latents": torch.zeros(4, 1)}, 4),
        ({"generator": generators(3)}, 3),
        ({}, 1),
        ({"prompt": "a cat", "num_images_per_prompt": 1}, 1),
    ],
)
def test_how_many_samples_a_call_asks_for(arguments, count):
    assert count_samples("x", arguments) == count


def test_what_is_cut_and_what_is_shared():
    callback = print
    arguments = {
        "prompt": ["a", "b", "c"],
        "negative_prompt": "bad",
        "timesteps": [3, 2, 1],
        "guidance_scale": 2.0,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents"],
        "latents": torch.arange(3.0)[:, None],
        "prompt_embeds": None,
    }
    cut = select_samples("x", arguments, [2, 0], 3)
    assert torch.equal(cut.pop("latents"), torch.tensor([[2.0], [0.0]]))
    assert cut == {name: value for name, value in arguments.items() if name != "latents"} | {"prompt": ["c", "a"]}
    assert conditions_of(arguments, 3) == {"prompt": ["a", "b", "c"], "negative_prompt": ["bad"] * 3}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3}, "got num_images_per_prompt=3; repeat the prompts"),
        ({"class_labels": [1, 2], "latents": torch.zeros(3, 1)}, "latents has 3 entries and class_labels 2"),
        ({"class_labels": [1, 2], "generator": generators(1)[0]}, "give a list of 2 generators instead of one for all"),
        ({"class_labels": [1, 2], "generator": generators(3)}, "generator has 3 entries for 2 samples"),
        ({"class_labels": [1, 2], "image": torch.zeros(2, 3, 8, 8)}, "does not know how to cut image; leave it out"),
    ],
)
def test_calls_that_cannot_be_cut(arguments, words):
    with pytest.raises(InputError, match=re.escape(words)):
        select_samples("x", arguments, [0], count_samples("x", arguments))


def picture(value):
    return Image.fromarray(np.full((2, 2), value, np.uint8))


@pytest.mark.parametrize("kind", ["np", "pt", "pil"])
@pytest.mark.parametrize("wrap", ["output", "tuple", "flags"])
def test_outputs_are_merged_in_the_order_of_the_samples(kind, wrap):
    def output(*values):
        images = {
            "np": np.array(values, np.float32)[:, None],
            "pt": torch.tensor(values, dtype=torch.float32)[:, None],
            "pil": [picture(value) for value in values],
        }[kind]
        if wrap == "tuple":
            return (images, None)
        if wrap == "flags":
            return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=[value > 2 for value in values])
        return ImagePipelineOutput(images=images)

    merged = merge_outputs([([0, 1, 2, 3], output(0, 1, 2, 3)), ([3, 1], output(7, 9))], 4)
    values = [np.asarray(image).flat[0] for image in merged[0]]
    assert values == [0, 9, 2, 7]
    assert type(merged) is type(output(0))
    assert type(merged[0]) is type(output(0)[0])
    if wrap == "flags":
        assert merged.nsfw_content_detected == [False, True, False, True]
    assert with_first(merged, "new")[0] == "new"


def test_outputs_without_samples_are_refused():
    with pytest.raises(InputError, match="output has 1 entries in images for 2 samples"):
        merge_outputs([([0, 1], ImagePipelineOutput(images=np.zeros((1, 2))))], 2)
    with pytest.raises(InputError, match="output has images of type float, which has no samples"):
        merge_outputs([([0], ImagePipelineOutput(images=1.0))], 1)
