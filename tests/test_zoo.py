import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zoo import ZOO


def families(condition=lambda family: True):
    return pytest.mark.parametrize("family", list(filter(condition, ZOO.values())), ids=str)


PROMISED = {
    "ddim", "ddpm", "stable-diffusion", "img2img", "inpaint", "controlnet", "ip-adapter", "sdxl", "stable-video",
    "animatediff", "dit", "pixart-alpha", "pixart-sigma", "sd3", "sana", "auraflow", "hunyuan-dit", "lumina2",
    "cogview4", "qwen-image", "z-image", "flux", "flux-img2img", "flux-fill", "flux-kontext", "flux2", "chroma",
    "cogvideox", "wan", "ltx", "mochi", "hunyuan-video", "allegro", "latte", "kandinsky5", "stable-audio",
    "amused",
}  # fmt: skip

LAST = "transformer_blocks.2."
IDLE = {
    # the queries and what follows them of the text, which the last block does not hand on
    "sd3": {LAST + "attn.add_q_proj.weight"},
    "mochi": {LAST + "attn1.add_q_proj.weight"},
    "qwen-image": {
        LAST + name + ".weight"
        for name in ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    },
}


def rows_of(output):
    """The tensor that a denoiser gives, whatever it wraps it in: (rows, ...)."""
    output = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(output) if isinstance(output, list) else output


class Watch:
    """Keeps the inputs and the output of each call of the denoiser; counts the scheduler's steps."""

    def __init__(self, family, pipe):
        self.calls, self.steps = [], 0
        self._step = pipe.scheduler.step
        pipe.scheduler.step = self.step
        getattr(pipe, family.denoiser).register_forward_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs, output):
        self.calls.append(((args, kwargs), output))

    def step(self, *args, **kwargs):
        self.steps += 1
        return self._step(*args, **kwargs)


def test_every_family_that_is_promised():
    assert set(ZOO) >= PROMISED
    assert all(family.name == name for name, family in ZOO.items())


def test_importing_the_zoo_imports_no_pipeline():
    code = "import sys, zoo; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


@functools.cache
def samples_of(family):
    return family.call(family.build())


@families()
def test_two_builds_give_the_same_samples(family):
    samples, second = samples_of(family), family.build()
    assert torch.equal(samples, family.call(second))
    assert torch.isfinite(samples.float()).all()
    assert not torch.equal(samples, family.call(second, seed=5))


@families()
def test_branches_of_guidance_are_evaluated_as_the_field_says(family):
    pipe = family.build()
    watch = Watch(family, pipe)
    samples = family.call(pipe, batch=2, steps=2)
    assert len(samples) == 2
    assert watch.steps == 2
    calls, rows = {"doubled": (1, 4), "separate": (2, 2)}.get(family.guidance, (1, 2))
    assert [len(rows_of(output)) for _, output in watch.calls] == [rows] * calls * 2
    if family.guidance == "embedded":
        assert watch.calls[0][0][1]["guidance"] is not None


def branches(family, pipe, arguments):
    """What the denoiser says in the first step, one half for each branch of guidance."""
    watch = Watch(family, pipe)
    family.call(pipe, batch=1, **arguments)
    calls = 2 if family.guidance == "separate" else 1
    return torch.cat([rows_of(output) for _, output in watch.calls[:calls]]).chunk(2)


@families(lambda family: family.guidance in ("doubled", "separate"))
def test_branches_of_guidance_come_in_the_order_the_field_says(family):
    pipe = family.build()
    arguments = family.arguments(pipe, 1, 0)
    others = ("_prompt", "_mask", "_seqlens")
    negative = {name for name in arguments if name.startswith("negative") and not name.endswith(others)}
    # without a negative prompt there is a label or an image, which the conditional branch alone is told
    changed = {
        name: [part + 1 for part in value] if isinstance(value, list) else value + 1
        for name, value in arguments.items()
        if name in (negative or {"class_labels", "image"})
    }
    pairs = zip(branches(family, pipe, {}), branches(family, pipe, changed), strict=True)
    moved = [not torch.equal(before, after) for before, after in pairs]
    first = family.conditional_first or family.guidance == "separate"
    assert moved == ([not first, first] if negative else [first, not first])


@families(lambda family: family.guidance != "none")
def test_samples_depend_on_the_scale_of_guidance(family):
    pipe = family.build()
    low, high = (family.call(pipe, **{family.scale: scale}) for scale in (2.0, 9.0))
    assert (low != high).float().mean() > 0.5


@families()
def test_samples_depend_on_the_weights(family):
    pipe = family.build()
    for parameter in getattr(pipe, family.denoiser).parameters():
        parameter.data *= 1.2
    assert (samples_of(family) != family.call(pipe)).float().mean() > (0.1 if family.tokens else 0.5)


@families()
def test_every_matrix_of_the_denoiser_reaches_its_output(family):
    pipe = family.build()
    watch = Watch(family, pipe)
    family.call(pipe)
    (args, kwargs), _ = watch.calls[-1]
    network = getattr(pipe, family.denoiser)
    with torch.enable_grad():
        rows_of(network(*args, **kwargs)).square().sum().backward()
    matrices = {name: matrix for name, matrix in network.named_parameters() if matrix.ndim > 1}
    idle = {name for name, matrix in matrices.items() if matrix.grad is None or not matrix.grad.any()}
    assert idle == IDLE.get(family.name, set())


@families(lambda family: not family.tokens)
def test_an_image_does_not_depend_on_its_batch(family):
    pipe = family.build()
    both = family.call(pipe, batch=2, seed=3)
    alone = torch.cat([family.call(pipe, batch=1, seed=seed) for seed in (3, 4)])
    torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-4)
