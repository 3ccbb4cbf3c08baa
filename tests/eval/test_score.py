import json

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.eval import generate
from fewstep.eval.conditions import Conditions
from fewstep.eval.distances import frechet_distance, frechet_jackknife, kernel_distance
from fewstep.eval.feature_files import features_of
from fewstep.eval.features import FeatureStats
from fewstep.eval.generate import ImageSet, Shard
from fewstep.eval.jackknife import block_slices
from fewstep.eval.metrics import KINDS
from fewstep.eval.reference import RealImages, folder_images, stored_images
from fewstep.eval.score import Scorer
from fewstep.samplers import InputError

N = 30
LABELS = Conditions("labels", (0, 1, 2))
PRINT = "a" * 64


class ToyNet:
    """The first four pixels; the class is the one of the brightest of the first three."""

    name, dim, channels, preprocess, fingerprint = "toy", 4, (1, 3), "none", PRINT

    def __init__(self):
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return images[:, 0].flatten(1)[:, :4].float() / 255

    def logits_from_features(self, features):
        return features[:, :3]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(generate, "SHARD_SIZE", 8)


def pictures(seed, n=N):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 12, 12), generator=draw, dtype=torch.uint8)


def image_set(out, name, pixels, first=0):
    images = ImageSet(out / "shards" / name, name, LABELS, range(first, first + len(pixels)))
    for index in images.indices:
        seeds = list(images.seeds_of(index))
        part = pixels[seeds[0] - first : seeds[-1] - first + 1]
        shard = Shard(index, part, torch.tensor(seeds), torch.tensor(LABELS.codes(seeds)), 4.0, ("noted",))
        generate._write(images, shard)
    return images


def real_images(net, n=50):
    features = net(pictures(99, n))
    return RealImages("real", "key", FeatureStats.from_features(features, fingerprint=PRINT), features, {})


def scorer(out, net=None, *, real=True, n=N, wanted=()):
    net = net or ToyNet()
    return Scorer(net, real_images(net) if real else None, None, None, LABELS, out, n, wanted)


def test_scores_are_those_of_the_numeric_core(tmp_path):
    judge = scorer(tmp_path)
    pixels = pictures(1)
    scores = judge.score(image_set(tmp_path, "a", pixels), None)
    features = pixels[:, 0].flatten(1)[:, :4].float() / 255
    blocks = [FeatureStats.from_features(features[cut], fingerprint=PRINT) for cut in block_slices(N, 15)]
    expected = frechet_jackknife(blocks, judge.real.stats)
    assert scores.metrics["fd_toy"].value == pytest.approx(expected.value, rel=1e-9)
    assert scores.metrics["fd_toy"].se == pytest.approx(expected.se, rel=1e-9)
    whole = FeatureStats.from_features(features, fingerprint=PRINT)
    assert scores.jackknives["fd_toy"].plain == pytest.approx(frechet_distance(whole, judge.real.stats), rel=1e-9)
    kernel = kernel_distance(features, judge.real.features)
    assert scores.metrics["kd_toy"].value == pytest.approx(kernel.value, rel=1e-9)
    right = features[:, :3].argmax(1) == torch.arange(N) % 3
    assert scores.metrics["class_accuracy"].value == pytest.approx(right.double().mean().item())
    assert scores.nfe == 4.0
    assert "noted" in scores.warnings


def test_reference_row_has_no_paired_metrics(tmp_path):
    scores = scorer(tmp_path).score(image_set(tmp_path, "a", pictures(1)), None)
    assert not {"psnr", "ssim", "feature_distance"} & set(scores.metrics)
    assert scores.differences == {}
    assert scores.worst == ()


def test_paired_metrics_and_worst_are_against_the_same_seed(tmp_path):
    judge = scorer(tmp_path)
    pixels, changed = pictures(1), pictures(1)
    changed[17] = 255 - changed[17]
    changed[4, 0, 0, 0] ^= 255
    reference = judge.score(image_set(tmp_path, "a", pixels, first=100), None)
    scores = judge.score(image_set(tmp_path, "b", changed, first=100), reference)
    distances = (changed.double() - pixels.double())[:, 0].flatten(1)[:, :4].norm(dim=1) / 255
    assert scores.metrics["feature_distance"].value == pytest.approx(distances.mean().item(), rel=1e-6)
    assert {item.seed for item in scores.worst[:2]} == {117, 104}
    assert len(scores.worst) == 8
    squares = (changed.double() - pixels.double()).square().flatten(1).mean(1).clamp(min=1 / 144)
    expected = 10 * torch.log10(255**2 / squares).mean().item()
    assert scores.metrics["psnr"].value == pytest.approx(expected, rel=1e-6)
    assert scores.metrics["ssim"].value < 1


def test_a_row_like_the_reference_differs_by_nothing(tmp_path):
    judge = scorer(tmp_path)
    reference = judge.score(image_set(tmp_path, "a", pictures(1)), None)
    scores = judge.score(image_set(tmp_path, "b", pictures(1)), reference)
    assert set(scores.differences) == set(reference.metrics)
    for name, pair in scores.differences.items():
        assert (pair.difference, pair.se) == (0.0, 0.0), name
    assert scores.metrics["ssim"].value == pytest.approx(1.0)


def test_features_are_computed_once_and_grow_with_the_set(tmp_path):
    net = ToyNet()
    images = image_set(tmp_path, "a", pictures(1, 20))
    first = features_of(images, net, tmp_path)
    assert net.seen == 20
    assert torch.equal(features_of(images, net, tmp_path), first)
    assert net.seen == 20
    grown = features_of(image_set(tmp_path, "a", pictures(1, 30)), net, tmp_path)
    assert net.seen == 20 + 8 + 6  # the shard that was incomplete, and the new one
    assert torch.equal(grown[:16], first[:16])
    assert torch.equal(features_of(image_set(tmp_path, "b", pictures(1, 30)), net, tmp_path), grown)


def test_damaged_features_are_refused(tmp_path):
    images = image_set(tmp_path, "a", pictures(1, 8))
    features_of(images, ToyNet(), tmp_path)
    path = next((tmp_path / "features").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match="is corrupted"):
        features_of(images, ToyNet(), tmp_path)


def test_every_kind_is_computed_or_says_why_not(tmp_path):
    judge = scorer(tmp_path)
    for kind in KINDS:
        need = judge.unmet(kind)
        assert (kind in judge.kinds()) == (need is None)
    assert judge.unmet("lpips") == "lpips"
    assert judge.unmet("clip_score") == "clip"
    assert scorer(tmp_path, n=7).unmet("fd") == "moments"
    assert scorer(tmp_path, real=False).unmet("precision") == "real"
    with pytest.raises(InputError, match="--metrics fd_toy cannot be computed: it needs real images"):
        scorer(tmp_path, real=False, wanted=("fd_toy",)).kinds()


def save_pictures(folder, pixels, suffix="png"):
    folder.mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture[0].numpy()).save(folder / f"{index:03d}.{suffix}")


def test_statistics_of_a_folder_are_those_of_its_pictures(tmp_path):
    net, pixels = ToyNet(), pictures(5, 70)
    save_pictures(tmp_path / "real", pixels)
    real = folder_images(tmp_path / "real", net, tmp_path / "out")
    expected = FeatureStats.from_features(ToyNet()(pixels), fingerprint=PRINT)
    torch.testing.assert_close(real.stats.mean, expected.mean)
    torch.testing.assert_close(real.stats.cov, expected.cov)
    assert torch.equal(real.features, ToyNet()(pixels))
    assert net.seen == 70
    again = folder_images(tmp_path / "real", net, tmp_path / "out")
    assert net.seen == 70
    assert again.key == real.key
    (kept,) = (tmp_path / "out" / "reference").iterdir()
    assert stored_images(kept, net).key == real.key


def test_folder_that_changed_is_looked_at_again(tmp_path):
    net = ToyNet()
    save_pictures(tmp_path / "real", pictures(5, 10))
    first = folder_images(tmp_path / "real", net, tmp_path / "out")
    (tmp_path / "real" / "000.png").unlink()
    assert folder_images(tmp_path / "real", net, tmp_path / "out").key != first.key


def test_lossy_pictures_are_a_warning_and_bad_ones_an_error(tmp_path):
    save_pictures(tmp_path / "real", pictures(5, 10), "jpg")
    assert "10 of 10 real images are stored lossily" in folder_images(tmp_path / "real", ToyNet(), tmp_path).warnings[0]
    (tmp_path / "real" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"bad\.png cannot be read as a picture"):
        folder_images(tmp_path / "real", ToyNet(), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds 0 pictures; give a folder of real images"):
        folder_images(tmp_path / "empty", ToyNet(), tmp_path)


def test_moments_of_other_tools(tmp_path):
    stats = real_images(ToyNet()).stats
    np.savez(tmp_path / "m.npz", mu=stats.mean.numpy(), sigma=stats.cov.numpy())
    real = stored_images(tmp_path / "m.npz", ToyNet())
    torch.testing.assert_close(real.stats.cov, stats.cov)
    assert real.features is None
    assert "does not say which network" in real.warnings[0]
    np.savez(tmp_path / "m.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(InputError, match=r"holds statistics of \(3,\) features, toy has 4"):
        stored_images(tmp_path / "m.npz", ToyNet())
    np.savez(tmp_path / "m.npz", mu=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="holds no mu and sigma"):
        stored_images(tmp_path / "m.npz", ToyNet())


def test_statistics_of_another_network_are_refused(tmp_path):
    FeatureStats.from_features(torch.rand(9, 4), fingerprint="b" * 64).save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="holds statistics of the feature net bbbb"):
        stored_images(tmp_path / "s.safetensors", ToyNet())


def test_key_moves_with_everything_a_score_depends_on(tmp_path):
    keys = [scorer(tmp_path), scorer(tmp_path, real=False), scorer(tmp_path, wanted=("kd_toy",))]
    assert len({json.dumps(judge.key) for judge in keys}) == 3
