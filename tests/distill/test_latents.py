"""Latents of images: what encoding directly gives, in files that resume."""

import numpy as np
import pytest
import torch
from image_folders import dit, save_images
from PIL import Image
from safetensors.torch import load_file
from zoo import ZOO

from fewstep.distill import latents as latents_module
from fewstep.distill.encode import encode
from fewstep.distill.encoder import Encoder
from fewstep.distill.images import open_images
from fewstep.distill.latents import Latents, encode_images, to_pixels
from fewstep.distill.row_trees import same
from fewstep.samplers import InputError


def test_latents_are_what_encoding_directly_gives(tmp_path):
    pipe = dit()
    folder = save_images(tmp_path / "images", ["1/a.png", "2/b.png", "2/c.png"], size=(12, 8))
    latents = Latents(Encoder(pipe), open_images(str(folder)), tmp_path / "latents", (8, 8), "mean")
    latents.make(2)
    x0, values = latents.get([2, 0], [0, 0])
    assert values == [2, 1]
    for row, name in zip(x0, ["2/c.png", "1/a.png"], strict=True):
        pixels = torch.from_numpy(np.asarray(Image.open(folder / name))[:, 2:10] / 127.5 - 1).float()[None, None]
        with torch.no_grad():
            wanted = pipe.vae.encode(pixels).latent_dist.mode()[0] * pipe.vae.config.scaling_factor
        torch.testing.assert_close(row, wanted)
    assert latents.disk_bytes == 3 * latents.image_bytes == 3 * 4 * 64
    stored = load_file(tmp_path / "latents" / "latents-00000.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == latents.disk_bytes


def test_each_visit_draws_from_the_posterior(tmp_path):
    pipe = dit()
    images = open_images(str(save_images(tmp_path / "images", ["1/a.png"])))
    latents = Latents(Encoder(pipe), images, tmp_path / "latents", (8, 8))
    latents.make()
    draws = latents.get([0] * 400, range(400))[0]
    moments = encode_images(pipe, latents.encoder.layout, to_pixels(images.example(0).image, (8, 8), 1)[None])
    torch.testing.assert_close(draws.mean(0), moments.mean[0], rtol=0, atol=0.3 * float(moments.std.max()))
    torch.testing.assert_close(draws.std(0), moments.std[0], rtol=0.2, atol=0)
    assert torch.equal(latents.get([0], [7])[0][0], draws[7])
    assert latents.image_bytes == 2 * 4 * 64


@pytest.mark.parametrize("name", ["stable-diffusion", "sd3", "pixart-sigma", "sana", "flux", "ddim"])
def test_latents_have_the_layout_of_the_denoiser(name):
    family = ZOO[name]
    pipe = family.build()
    layout = encode(pipe, family.arguments(pipe, 1, 0)).layout
    side = {"sana": 32, "ddim": 8}.get(name, 16)
    pixels = torch.rand(2, latents_module.channels(pipe), side, side) * 2 - 1
    moments = encode_images(pipe, layout, pixels)
    assert tuple(moments.mean.shape) == (2, *layout.shape)
    if name == "ddim":
        assert torch.equal(moments.mean, pixels)
    if name == "flux":
        mean = pipe.vae.encode(pixels).latent_dist.mode().detach()
        shifted = (mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        assert torch.equal(pipe._unpack_latents(moments.mean, side, side, pipe.vae_scale_factor), shifted)


def test_latents_are_normalised_by_channel_where_the_autoencoder_says_how():
    pipe = dit()
    layout = encode(pipe, {"class_labels": [1]}).layout
    pixels = torch.rand(2, 1, 8, 8)
    plain = encode_images(pipe, layout, pixels)
    mean, std = torch.arange(4.0).view(1, 4, 1, 1), torch.arange(1.0, 5.0).view(1, 4, 1, 1)
    pipe.vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    normal = encode_images(pipe, layout, pixels)
    torch.testing.assert_close(normal.mean, (plain.mean - mean) / std)
    torch.testing.assert_close(normal.std, plain.std / std)


def test_autoencoders_of_video_take_no_images():
    family = ZOO["qwen-image"]
    pipe = family.build()
    layout = encode(pipe, family.arguments(pipe, 1, 0)).layout
    with pytest.raises(InputError, match=r"takes no images of shape \(3, 32, 32\) .*; distil from prompts or pairs"):
        encode_images(pipe, layout, torch.zeros(1, 3, 32, 32))


def test_an_autoencoder_in_half_precision_runs_in_float32_and_stays_half(tmp_path):
    pipe = dit()
    pixels = torch.rand(1, 1, 8, 8)
    layout = encode(pipe, {"class_labels": [1]}).layout
    pipe.vae.to(torch.bfloat16)
    half = encode_images(pipe, layout, pixels)
    assert half.mean.dtype == torch.float32
    assert next(pipe.vae.parameters()).dtype == torch.bfloat16
    pipe.vae.float()
    assert torch.equal(half.mean, encode_images(pipe, layout, pixels).mean)


def test_latents_resume_at_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "SHARD", 2)
    images = open_images(str(save_images(tmp_path / "images", [f"1/{n}.png" for n in range(5)])))
    encoder = Encoder(dit())
    whole = Latents(encoder, images, tmp_path / "whole", (8, 8))
    whole.make()
    stopped, done = Latents(encoder, images, tmp_path / "stopped", (8, 8)), []

    def stop(count):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.make(2, progress=stop)
    stopped.make(2, progress=done.append)
    assert sum(done[2:]) == 3
    for one, other in zip(stopped.get(range(5), range(5)), whole.get(range(5), range(5)), strict=True):
        assert same(one, other) or torch.allclose(one, other)


def test_words_of_latents(tmp_path):
    folder = save_images(tmp_path / "images", ["1/a.png", "1/b.png"])
    encoder = Encoder(dit())

    def of(size=(8, 8), where="latents", **options):
        return Latents(encoder, open_images(str(folder)), tmp_path / where, size, **options)

    with pytest.raises(InputError, match=r"become \(4, 8, 8\) and DiTPipeline steps samples of shape \(4, 4, 4\)"):
        of((16, 16))
    with pytest.raises(InputError, match=r"latents-00000\.safetensors does not exist; make the latents first"):
        of().get([0], [0])
    of().make()
    with pytest.raises(InputError, match="made of other images, another size, or another autoencoder; delete it"):
        of(posterior="mean").make()
    (folder / "1" / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.png is no image that can be read \(of no known format\); remove it"):
        of(where="other").make()
    Image.new("L", (8, 8)).save(folder / "1" / "b.png")
    (folder / "1" / "b.txt").write_text("a cat")
    with pytest.raises(InputError, match=r"takes class labels; got the prompt 'a cat' of .*b\.png"):
        of(where="other").make()
    more = save_images(tmp_path / "more", ["3/a.png", "1001/b.png"])
    foreign = Latents(encoder, open_images(str(more)), tmp_path / "foreign", (8, 8))
    with pytest.raises(InputError, match=r"a table of 1001 labels, 0 to 1000; got the label 1001 of .*b\.png"):
        foreign.make()
    with pytest.raises(InputError, match="images have 4 channels; fewstep reads images of 1 or 3"):
        to_pixels(Image.new("L", (8, 8)), (8, 8), 4)


def test_pixels_are_cropped_around_the_centre_in_their_range():
    image = Image.new("RGB", (20, 10), (255, 0, 0))
    pixels = to_pixels(image, (5, 5), 3)
    assert pixels.shape == (3, 5, 5)
    assert torch.equal(pixels[0], torch.ones(5, 5))
    assert torch.equal(pixels[1:], -torch.ones(2, 5, 5))
    gradient = Image.fromarray(np.arange(12, dtype=np.uint8)[None].repeat(4, 0))
    assert ((to_pixels(gradient, (4, 4), 1)[0, 0] + 1) * 127.5).tolist() == pytest.approx([4, 5, 6, 7], abs=1e-4)
