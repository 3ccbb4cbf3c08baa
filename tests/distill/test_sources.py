"""Batches of conditions, images and pairs, and the files that conditions and pairs are kept in."""

import zlib

import pytest
import torch
from image_folders import dit, save_images
from safetensors.torch import load_file
from zoo import ZOO

from fewstep.distill import encoder as encoder_module
from fewstep.distill import pairs as pairs_module
from fewstep.distill.conditions import Condition
from fewstep.distill.encode import encode
from fewstep.distill.encoder import Encoder
from fewstep.distill.images import open_images
from fewstep.distill.latents import Latents
from fewstep.distill.pairs import Pairs
from fewstep.distill.row_trees import same
from fewstep.distill.sources import ConditionBatches, ImageBatches, Order, PairBatches
from fewstep.samplers import (
    AdaptiveSteps,
    AnalyticInit,
    DiffusersSolver,
    ExplicitGrid,
    InputError,
    Plan,
    SpacingGrid,
    StartStatistics,
    attach,
)
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


def decoded_as_shown(pipe, plan, x0, seed, label=4):
    """Whether a clean sample is what the attached plan shows."""
    with attach(pipe, plan):
        call = {"class_labels": [label], "output_type": "np", "generator": torch.Generator().manual_seed(seed)}
        shown = pipe(**call).images
    seen = (pipe.vae.decode(x0).sample.detach() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return torch.allclose(seen, torch.from_numpy(shown), atol=1e-4)


@pytest.mark.parametrize("solver", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("first", [999.0, 700.0])
@pytest.mark.parametrize("early", [False, True])
def test_pairs_begin_as_the_student_will_wherever_the_teacher_begins(solver, first, early, tmp_path):
    """The scheduler's scale of the noise, a late first time and a start part are the teacher's own affair."""
    pipe, noise = dit(), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(7))
    plan = Plan(solver=DiffusersSolver(scheduler=solver), grid=ExplicitGrid(timesteps=(first, 400.0)))
    if early:
        StartStatistics(torch.full((4, 4, 4), 0.5), 0.3, 8).save(tmp_path / "start.safetensors")
        plan.model_copy(update={"start": AnalyticInit()}).save(tmp_path / "plan.json")
        plan = Plan.load(tmp_path / "plan.json")
    pairs = Pairs(Encoder(pipe), plan, (4,), tmp_path, 1, seed=7)
    pairs.make()
    start, x0 = pairs.get([0])
    torch.testing.assert_close(start, noise)
    assert decoded_as_shown(pipe, plan, x0, 7)
    if early:
        StartStatistics(torch.zeros(4, 4, 4), 0.3, 8).save(tmp_path / "start.safetensors")
        with pytest.raises(InputError, match="was made by another teacher"):
            Pairs(Encoder(pipe), plan, (4,), tmp_path, 1, seed=7).get([0])


def test_pairs_do_not_follow_from_noise_that_is_drawn_later(tmp_path):
    pipe = dit()
    plan = Plan(solver=DiffusersSolver(scheduler="DDPMScheduler"), grid=ExplicitGrid(timesteps=(999.0, 500.0)))
    with pytest.raises(InputError, match=r"the teacher draws noise in its steps \(DDPMScheduler\): .* deterministic"):
        Pairs(Encoder(pipe), plan, (4,), tmp_path, 1).make()
    assert not list(tmp_path.iterdir())
    data = Pairs(Encoder(pipe), plan, (4,), tmp_path, 1, coupled=False)
    data.make()
    assert decoded_as_shown(pipe, plan, data.get([0]).x0, 0)
    with pytest.raises(InputError, match="was made by another teacher"):
        Pairs(Encoder(pipe), plan, (4,), tmp_path, 1).get([0])


def test_pairs_are_of_one_pass(tmp_path):
    grids = [{"type": "spacing", "steps": steps} for steps in (1, 2)]
    adaptive = Plan(grid=AdaptiveSteps(grids=grids, table={"4": (1, 0), "9": (0, 1)}))
    with pytest.raises(InputError, match="the teacher's plan runs a batch in several passes"):
        Pairs(Encoder(dit()), adaptive, (4, 9), tmp_path, 2).make()
    one = Pairs(Encoder(dit()), adaptive, (9,), tmp_path, 2)
    one.make()
    assert decoded_as_shown(dit(), Plan(grid=SpacingGrid(steps=2)), one.get([0]).x0, 0, label=9)


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
