import io
import json
import sys
import tarfile
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from zoo import ZOO

from fewstep.distill import encoder as encoder_module
from fewstep.distill import latents as latents_module
from fewstep.distill import pairs as pairs_module
from fewstep.distill.conditions import Condition
from fewstep.distill.encode import encode
from fewstep.distill.encoder import Encoder
from fewstep.distill.images import DatasetImages, open_images
from fewstep.distill.latents import Latents, encode_images, to_pixels
from fewstep.distill.pairs import Pairs
from fewstep.distill.row_trees import same
from fewstep.distill.sources import ConditionBatches, ImageBatches, Order, PairBatches
from fewstep.samplers import ExplicitGrid, InputError, Plan, attach
from fewstep.samplers.recording import clean_samples

PLAN = Plan(grid=ExplicitGrid(timesteps=(999.0, 500.0)))


def equal(one: Condition, other: Condition):
    return one.layout == other.layout and all(
        same(one.branch(name).inputs, other.branch(name).inputs) for name in one.layout.branches
    )


def prompted():
    """Stable Diffusion with a text encoder that makes random embeddings of each text."""
    pipe = ZOO["stable-diffusion"].build()

    def embed(texts):
        seeds = [zlib.crc32(text.encode()) for text in texts]
        return torch.stack([torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    def encode_prompt(prompt, device, count, guides, negative_prompt=None, **_):
        return embed(prompt), embed(negative_prompt or [""] * len(prompt)) if guides else None

    pipe.encode_prompt = encode_prompt
    return pipe


def dit():
    return ZOO["dit"].build()


def save_images(folder, names, size=(8, 8), mode="L"):
    draw = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return folder


def test_an_epoch_visits_every_item_once_and_another_epoch_in_another_order():
    order = Order(10, 4, seed=3)
    epochs = [[order.item(number) for number in range(start, start + 10)] for start in (0, 10)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert [order.item(number) for number in range(10)] == epochs[0]
    assert [Order(10, 4, seed=4).item(number) for number in range(10)] != epochs[0]
    assert order.numbers(2, range(1, 3)) == [9, 10]


def test_words_of_orders():
    with pytest.raises(InputError, match="got 0 items and a global batch of 4; give at least one of each"):
        Order(0, 4, 0)
    with pytest.raises(InputError, match="batch 1 has positions 0 to 3; got 3 to 4"):
        Order(9, 4, 0).numbers(1, range(3, 5))


def test_conditions_of_prompts_are_the_pipelines_and_come_from_files_unchanged(tmp_path):
    pipe, prompts = prompted(), ["a cat", "a dog", "a cat"]
    plain = Encoder(pipe, {"negative_prompt": "dull", "height": 16, "width": 16})
    kept = Encoder(pipe, plain.call_kwargs, tmp_path)
    call = {"prompt": prompts, "negative_prompt": ["dull"] * 3, "height": 16, "width": 16}
    direct = encode(pipe, call)
    assert equal(plain.encode(prompts), direct)
    assert equal(kept.encode(prompts), direct)
    assert len(list(tmp_path.iterdir())) == 2
    pipe.encode_prompt = None  # files only
    assert equal(Encoder(pipe, plain.call_kwargs, tmp_path)._row("a dog"), direct.rows([1]))


def test_making_conditions_resumes_and_is_shared_by_processes(tmp_path, monkeypatch):
    encoder = Encoder(dit(), folder=tmp_path)
    calls = []
    own = encoder_module.encode
    monkeypatch.setattr(encoder_module, "encode", lambda *args: calls.append(args[1]) or own(*args))
    for rank in (0, 1):
        encoder.make([1, 2, 3, 1], 1, rank, 2)
    labels = [call["class_labels"] for call in calls[1:]]  # the first one finds out the layout
    assert sorted(labels) == [[1], [2], [3]]
    encoder.make([1, 2, 3], 2)
    count = len(calls)
    encoder.make([1, 2, 3], 2)
    assert len(calls) == count
    assert encoder.disk_bytes([1, 2, 3, 3]) == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert encoder.encode([3, 1]).cond.inputs["class_labels"].tolist() == [3, 1]


def test_another_call_is_kept_in_another_file(tmp_path):
    pipe = prompted()
    assert Encoder(pipe, {"height": 16}, tmp_path).path("a") != Encoder(pipe, {"height": 32}, tmp_path).path("a")


def test_words_of_encoders(tmp_path):
    encoder = Encoder(dit())
    with pytest.raises(InputError, match="DiTPipeline takes class labels; got the prompt 'a cat'"):
        encoder.encode(["a cat"])
    with pytest.raises(InputError, match="DiTPipeline takes class labels; got the sample without a condition"):
        ConditionBatches([None], encoder, 2)
    with pytest.raises(InputError, match="StableDiffusionPipeline takes prompts; got the label 3"):
        ConditionBatches([3], Encoder(prompted()), 2)
    with pytest.raises(InputError, match="DDIMPipeline takes no condition; got the label 3"):
        ConditionBatches([3], Encoder(ZOO["ddim"].build()), 2)
    with pytest.raises(InputError, match=r"remembered as JSON .*; give plain values"):
        Encoder(dit(), {"guidance_scale": torch.ones(1)})
    with pytest.raises(InputError, match="written where a folder is given"):
        encoder.make([1], 1)
    with pytest.raises(
        InputError, match="StableVideoDiffusionPipeline takes neither class labels, prompts nor a batch"
    ):
        Encoder(ZOO["stable-video"].build())


def sources(tmp_path):
    """Each kind of source, made anew from what is on disk."""
    pipe = dit()
    encoder = Encoder(pipe, {"guidance_scale": 2.0}, tmp_path / "conditions")
    images = open_images(
        str(save_images(tmp_path / "images", [f"{label}/{n}.png" for label in "35" for n in range(4)]))
    )
    latents = Latents(encoder, images, tmp_path / "latents", (8, 8))
    latents.make(3)
    pairs = Pairs(encoder, PLAN, (3, 5), tmp_path / "pairs", 7, seed=11)
    pairs.make(4)
    return {
        "conditions": ConditionBatches([3, 5, 8], encoder, 4, 1),
        "images": ImageBatches(latents, 4, 1),
        "pairs": PairBatches(pairs, 4, 1),
    }


def assert_same_batch(one, other):
    assert equal(one.condition, other.condition)
    for name in ("numbers", "x0", "start"):
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["conditions", "images", "pairs"])
def test_a_batch_is_decided_by_its_number_alone(kind, tmp_path):
    source = sources(tmp_path)[kind]
    run = [source.batch(index, range(4)) for index in range(5)]
    resumed = sources(tmp_path)[kind]
    for index in (4, 3):
        assert_same_batch(resumed.batch(index, range(4)), run[index])
    parts = [resumed.batch(3, positions) for positions in (range(1), range(1, 3), range(3, 4))]
    assert torch.equal(torch.cat([part.numbers for part in parts]), run[3].numbers)
    assert equal(Condition.cat([part.condition for part in parts]), run[3].condition)
    for name in ("x0", "start"):
        if getattr(run[3], name) is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(run[3], name))
    assert run[0].numbers.tolist() == [0, 1, 2, 3]
    moved = run[0].to("cpu", torch.bfloat16)
    assert moved.condition.dtype == torch.bfloat16
    assert len(moved) == 4


def test_pairs_are_the_attached_plans_own_samples(tmp_path):
    pipe = dit()
    pairs = Pairs(Encoder(pipe, {"guidance_scale": 3.0}), PLAN, (4, 9), tmp_path, 3, seed=20)
    pairs.make(2)
    made = pairs.get(range(3))
    for item in range(3):
        call = {"class_labels": [(4, 9)[item % 2]], "guidance_scale": 3.0, "output_type": "np"}
        generators = [torch.Generator().manual_seed(20 + item)]
        (x0,) = clean_samples(pipe, PLAN, [call | {"generator": generators}])
        torch.testing.assert_close(made.x0[item], x0[0], rtol=1e-5, atol=1e-5)
        noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(20 + item))
        assert torch.equal(made.start[item], noise[0])
        with attach(pipe, PLAN):
            shown = pipe(**call, generator=[torch.Generator().manual_seed(20 + item)]).images
        decoded = pipe.vae.decode(made.x0[item : item + 1]).sample.detach()
        torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(shown))
    assert pairs.disk_bytes == 3 * pairs.pair_bytes == 3 * 2 * 4 * 64
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "pairs-00000.safetensors").values()) == pairs.disk_bytes


def test_pairs_resume_at_the_file_and_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_module, "SHARD", 2)
    encoder = Encoder(dit())

    def of(folder, count):
        return Pairs(encoder, PLAN, (1, 2, 3), tmp_path / folder, count)

    whole, part, calls = of("whole", 5), of("part", 3), []
    whole.make(2)
    part.make(2)
    longer = of("part", 5)
    longer.make(2, progress=calls.append)
    assert sum(calls) == 3  # the second file is filled up, the first one stays
    longer.make(2, progress=calls.append)
    assert sum(calls) == 3
    for one, other in zip(longer.get(range(5)), whole.get(range(5)), strict=True):
        torch.testing.assert_close(one, other)
    shared = of("shared", 5)
    for rank in (1, 0):
        shared.make(2, rank, 2)
    assert torch.equal(shared.get([4, 0]).x0, whole.get([4, 0]).x0)


def test_words_of_pairs(tmp_path):
    encoder = Encoder(dit())
    pairs = Pairs(encoder, PLAN, (1,), tmp_path, 1)
    with pytest.raises(InputError, match=r"pairs-00000\.safetensors does not exist; make the pairs first"):
        pairs.get([0])
    pairs.make()
    with pytest.raises(InputError, match="was made by another teacher, plan or seed; delete it"):
        Pairs(encoder, PLAN, (1,), tmp_path, 1, seed=5).make()
    (tmp_path / "pairs-00000.safetensors").write_bytes(b"12345678")
    with pytest.raises(InputError, match=r"pairs-00000\.safetensors is corrupted"):
        pairs.get([0])
    with pytest.raises(InputError, match="got 0 pairs of 1 prompts or labels"):
        Pairs(encoder, PLAN, (1,), tmp_path, 0)
    with pytest.raises(InputError, match="takes class labels; got the prompt 'x'"):
        Pairs(encoder, PLAN, ("x",), tmp_path, 1)


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


def test_values_of_a_folder(tmp_path):
    names = open_images(str(save_images(tmp_path / "names", ["cat/a.png", "ant/b.jpg"])))
    assert [names.example(index).value for index in range(2)] == [0, 1]
    assert [names.name(index) for index in range(2)] == ["ant/b.jpg", "cat/a.png"]
    texts = save_images(tmp_path / "texts", ["a.png", "b.png"])
    (texts / "a.txt").write_text("a cat\n")
    assert [open_images(str(texts)).example(index).value for index in range(2)] == ["a cat", None]
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "label": 7}]
    (texts / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [open_images(str(texts)).example(index).value for index in range(2)] == ["one", 7]


def test_words_of_folders(tmp_path):
    with pytest.raises(InputError, match=r"missing does not exist; give a folder of images, a \.tar shard"):
        open_images(str(tmp_path / "missing"))
    with pytest.raises(InputError, match=r"holds no images; fewstep reads \.png"):
        open_images(str(tmp_path))
    folder = save_images(tmp_path / "images", ["a.png"])
    with pytest.raises(InputError, match=r"a\.png is a file; give a folder"):
        open_images(str(folder / "a.png"))
    (folder / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "x"}')
    with pytest.raises(InputError, match=r"metadata\.jsonl says nothing about a\.png; add a line"):
        open_images(str(folder)).example(0)
    (folder / "metadata.jsonl").write_text("nothing")
    with pytest.raises(InputError, match=r"metadata\.jsonl line 1 is no JSON object with a file_name"):
        open_images(str(folder))


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    folder = save_images(tmp_path / "images", ["a.png", "b.jpg", "c.png", "d.png"], mode="RGB")
    shards = tmp_path / "shards"
    shards.mkdir()
    extras = [("a.txt", b"a cat\n"), ("b.cls", b"4"), ("c.json", b'{"caption": "a dog"}'), ("d.cls", b"four")]
    for number, names in enumerate((("a.png", "b.jpg"), ("c.png", "d.png"))):
        with tarfile.open(shards / f"{number}.tar", "w") as tar:
            for name in names:
                add(tar, name, (folder / name).read_bytes())
                add(tar, *next(extra for extra in extras if extra[0][0] == name[0]))
    images = open_images(str(shards))
    assert [images.name(index) for index in range(4)] == ["0.tar/a", "0.tar/b", "1.tar/c", "1.tar/d"]
    assert [images.example(index).value for index in range(3)] == ["a cat", 4, "a dog"]
    assert np.array_equal(np.asarray(images.example(2).image), np.asarray(Image.open(folder / "c.png")))
    with pytest.raises(InputError, match=r"label of .*1\.tar/d\.png cannot be read"):
        images.example(3)
    assert len(open_images(str(shards / "1.tar"))) == 2
    (shards / "2.tar").write_bytes(b"nothing" * 200)
    with pytest.raises(InputError, match=r"2\.tar is no tar file that can be read"):
        open_images(str(shards))


def test_a_data_set_needs_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"somebody/cats is read by .* pip install 'fewstep\[data\]'"):
        open_images("somebody/cats")


class Rows(list):
    column_names = ("image", "label")


def test_a_data_set_gives_images_with_values(monkeypatch):
    rows = Rows([{"image": Image.new("L", (8, 8), 9), "label": 3}])
    asked = []
    library = types.SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", library)
    images = open_images("somebody/cats", "test")
    assert asked == [("somebody/cats", "test")]
    assert (len(images), images.example(0).value, images.name(0)) == (1, 3, "somebody/cats[test]/0")
    monkeypatch.setattr(Rows, "column_names", ("text",))
    with pytest.raises(InputError, match=r"cats\[train\] has no column of images; it has text"):
        DatasetImages("somebody/cats")

    def fail(name, split):
        raise ValueError("no such split")

    library.load_dataset = fail
    with pytest.raises(InputError, match=r"datasets cannot load somebody/cats\[train\]: no such split"):
        DatasetImages("somebody/cats")
