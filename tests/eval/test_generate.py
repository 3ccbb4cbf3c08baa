import multiprocessing
import os
import socket
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny_dit, tiny_unet

from fewstep.eval import generate as module
from fewstep.eval.conditions import Conditions
from fewstep.eval.generate import ImageSet, generate, sample_images
from fewstep.samplers import InputError, Plan
from fewstep.samplers.files import read_tensors, write_tensors

LABELS = Conditions("labels", tuple(range(10)))
GUIDED = Plan.from_json(
    {
        "fewstep_plan": 1,
        "grid": {"type": "spacing", "steps": 2},
        "guidance": {"type": "constant", "scale": 1.5},
    }
)
PLAIN = Plan.from_json({"fewstep_plan": 1, "grid": {"type": "spacing", "steps": 2}})


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_SIZE", 4)


def image_set(folder, n=10, conditions=LABELS, first=0, config_hash="abc"):
    return ImageSet(folder, config_hash, conditions, range(first, first + n))


def make(folder, n=10, *, pipe=None, plan=GUIDED, batch_size=3, conditions=LABELS, first=0, **options):
    images = image_set(folder, n, conditions, first)
    generate(pipe or tiny_dit(), plan, images, call_kwargs={}, batch_size=batch_size, **options)
    return images


def pixels(images):
    return torch.cat([shard.images for shard in images.shards()])


def test_one_image_is_what_the_stock_pipeline_makes(tmp_path):
    """Identity with a direct call of diffusers, for each image alone."""
    images = pixels(make(tmp_path, 5))
    for seed in range(5):
        output = tiny_dit()(
            class_labels=[seed % 10],
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=2,
            guidance_scale=1.5,
            output_type="np",
        ).images
        expected = torch.from_numpy(output).permute(0, 3, 1, 2).mul(255).round().to(torch.uint8)
        difference = (images[seed].int() - expected[0].int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() <= 0.01


@pytest.mark.parametrize(
    ("make_pipe", "conditions", "plan"), [(tiny_dit, LABELS, GUIDED), (tiny_unet, Conditions("none"), PLAIN)]
)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_does_not_matter(tmp_path, make_pipe, conditions, plan, batch_size):
    first = pixels(make(tmp_path / "a", pipe=make_pipe(), conditions=conditions, plan=plan, batch_size=2))
    other = pixels(make(tmp_path / "b", pipe=make_pipe(), conditions=conditions, plan=plan, batch_size=batch_size))
    assert len(first) == 10
    difference = (first.int() - other.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() <= 0.01


def test_two_processes_make_the_shards_of_one(tmp_path):
    alone = make(tmp_path / "alone")
    for rank in (1, 0):
        shared = make(tmp_path / "shared", rank=rank, world=2)
        if rank == 1:
            assert not shared.path(0).exists()
            assert shared.path(1).exists()
    assert torch.equal(pixels(alone), pixels(shared))


def test_larger_n_extends_what_is_there(tmp_path):
    whole = pixels(make(tmp_path / "whole", 10, batch_size=4))
    small = make(tmp_path / "grown", 6, batch_size=4)
    full_shard = small.path(0).stat().st_mtime_ns
    grown = make(tmp_path / "grown", 10, batch_size=4)
    assert small.path(0).stat().st_mtime_ns == full_shard
    difference = (pixels(grown).int() - whole.int()).abs()
    assert difference.max() <= 1
    assert torch.equal(pixels(small), pixels(grown)[:6])


def test_finished_shards_are_kept_and_only_the_missing_ones_made(tmp_path):
    images = make(tmp_path, 10)
    before = pixels(images)
    images.path(1).unlink()
    assert images.missing() == 4
    counts = []
    make(tmp_path, 10, progress=counts.append)
    assert sum(counts) == 4
    assert torch.equal(pixels(images), before)


def test_other_first_seed_makes_the_same_images_of_the_same_seeds(tmp_path):
    whole = pixels(make(tmp_path / "a", 8))
    later = pixels(make(tmp_path / "b", 5, first=3))
    difference = (whole[3:].int() - later.int()).abs()
    assert difference.max() <= 1


def test_shards_say_what_they_hold(tmp_path):
    images = make(tmp_path, 6, first=7)
    tensors, header = read_tensors(images.path(0))
    assert tensors["images"].dtype == torch.uint8
    assert tensors["images"].shape == (4, 1, 8, 8)
    assert tensors["seeds"].tolist() == [7, 8, 9, 10]
    assert tensors["conditions"].tolist() == [7, 8, 9, 0]
    assert header["config_hash"] == "abc"
    assert [shard.nfe for shard in images.shards()] == [4.0, 4.0]


def test_foreign_shard_is_refused(tmp_path):
    make(tmp_path, 4)
    foreign = image_set(tmp_path, 4, config_hash="other")
    with pytest.raises(
        InputError, match=r"belongs to another configuration \(config_hash abc, here other\); delete it"
    ):
        generate(tiny_dit(), GUIDED, foreign, call_kwargs={}, batch_size=4)


def test_corrupted_shard_is_refused(tmp_path):
    images = make(tmp_path, 4)
    data = images.path(0).read_bytes()
    images.path(0).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"shard-00000.safetensors is corrupted .*; delete it"):
        make(tmp_path, 4)


@pytest.mark.parametrize("change", ["seeds", "conditions", "dtype", "missing"])
def test_shard_with_other_content_is_refused(tmp_path, change):
    images = make(tmp_path, 4)
    tensors, header = read_tensors(images.path(0))
    if change == "dtype":
        tensors["images"] = tensors["images"].float()
    elif change == "missing":
        del tensors["seeds"]
    else:
        tensors[change] = tensors[change] + 1
    write_tensors(images.path(0), tensors, header)
    with pytest.raises(InputError, match="delete it and run again"):
        images.read(0)


def test_incomplete_set_cannot_be_scored(tmp_path):
    images = make(tmp_path, 10)
    images.path(2).unlink()
    with pytest.raises(InputError, match="is missing or incomplete; run the same command again"):
        pixels(images)


def test_interrupted_call_leaves_whole_shards_and_no_plan(tmp_path):
    pipe = tiny_dit()
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, 10, pipe=pipe, batch_size=2)
    hook.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]
    resumed = pixels(make(tmp_path, 10, pipe=pipe, batch_size=2))
    assert torch.equal(resumed, pixels(make(tmp_path / "other", 10, batch_size=2)))


def test_nan_images_are_refused(tmp_path):
    pipe = tiny_dit()
    torch.nn.init.constant_(pipe.transformer.proj_out_2.bias, float("nan"))
    with pytest.raises(InputError, match="NaN"):
        make(tmp_path, 4, pipe=pipe)
    assert not tmp_path.exists() or list(tmp_path.iterdir()) == []


def test_noise_outside_the_generators_is_noticed_and_leaves_the_global_generator_alone():
    """DiTPipeline gives its scheduler no generator, so an ancestral solver draws from torch's global one."""
    pipe = tiny_dit(DDPMScheduler())
    state = torch.get_rng_state()
    first, seeded = sample_images(pipe, LABELS, [1, 2], {"num_inference_steps": 2})
    again, _ = sample_images(pipe, LABELS, [1, 2], {"num_inference_steps": 2})
    assert not seeded
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample_images(tiny_unet(), Conditions("none"), [1], {"num_inference_steps": 2})[1]


def test_unseeded_noise_is_a_warning_of_the_shard(tmp_path):
    (shard,) = make(tmp_path / "seeded", 2, pipe=tiny_dit(DDPMScheduler())).shards()
    assert not shard.warnings, "with a plan attached the solver's noise comes from the images' generators"
    pipe = tiny_dit()
    pipe.transformer.proj_out_2.register_forward_hook(lambda module, given, output: output + torch.randn_like(output))
    (shard,) = make(tmp_path / "unseeded", 2, pipe=pipe).shards()
    assert any("depend on the batch size" in warning for warning in shard.warnings)


def test_killed_process_leaves_only_whole_shards(tmp_path):
    """SIGKILL after the third batch; the child is forked, so it starts at once."""
    context = multiprocessing.get_context("fork")
    counts, sender = context.Pipe(duplex=False)
    options = {"batch_size": 2, "progress": sender.send}
    process = context.Process(target=make, args=(tmp_path / "out", 12), kwargs=options)
    process.start()
    sender.close()
    for _ in range(3):
        counts.recv()
    process.kill()
    process.join()
    images = image_set(tmp_path / "out", 12)
    assert 0 < images.missing() < 12
    resumed = pixels(make(tmp_path / "out", 12, batch_size=2))
    assert torch.equal(resumed, pixels(make(tmp_path / "whole", 12, batch_size=2)))


def launch(arguments, world):
    """Runs ``fewstep.eval`` in ``world`` processes that a launcher's environment joins into one group.

    ``accelerate launch --cpu --num_processes 2`` starts one process on a machine without MPI, so the environment is
    set here as its GPU launcher sets it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "fewstep.eval", *arguments]
    ranks = [group | {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(world)} for r in range(world)]
    processes = [subprocess.Popen(command, env=os.environ | rank, stderr=subprocess.DEVNULL) for rank in ranks]
    assert [process.wait(timeout=300) for process in processes] == [0] * world


@pytest.mark.slow
def test_two_launched_processes_make_the_table_of_one(tmp_path):
    """The whole bench, with shards spread over two processes."""
    tiny_dit().save_pretrained(tmp_path / "dit")
    arguments = ["--pipe", str(tmp_path / "dit"), "--class_labels", "0", "1", "--n", "300", "--steps", "2"]
    arguments += ["--reference_steps", "3", "--device", "cpu", "--timing_repeats", "1"]
    for world in (1, 2):
        launch([*arguments, "--out", str(tmp_path / str(world))], world)
    shards = sorted((tmp_path / "1").rglob("shards/*/*.safetensors"))
    assert len(shards) == 5 * 3
    for shard in shards:
        tensors, header = read_tensors(shard)
        others, other_header = read_tensors(tmp_path / "2" / shard.relative_to(tmp_path / "1"))
        assert header == other_header
        assert all(torch.equal(value, others[key]) for key, value in tensors.items())
