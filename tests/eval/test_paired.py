from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity, peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure

from fewstep.eval import Lpips, feature_distance, psnr, ssim
from fewstep.samplers.errors import InputError


def pair(channels: int = 3, side: int = 32, n: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (n, channels, side, side), generator=g, dtype=torch.uint8)
    noise = torch.randint(-20, 21, a.shape, generator=g)
    return a, (a.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_torchmetrics(channels: int) -> None:
    a, b = pair(channels)
    metric = StructuralSimilarityIndexMeasure(data_range=255.0, reduction="none")
    for i in range(len(a)):
        x, y = a[i : i + 1], b[i : i + 1]
        theirs = peak_signal_noise_ratio(y.double(), x.double(), data_range=255.0)
        torch.testing.assert_close(psnr(a, b)[i], theirs, rtol=1e-6, atol=0, check_dtype=False)
        metric.reset()
        metric.update(y.double(), x.double())
        torch.testing.assert_close(ssim(b, a)[i], metric.compute(), rtol=1e-6, atol=0, check_dtype=False)


def test_equal_images_are_best_and_finite() -> None:
    a, _ = pair(n=1)
    one_off = a.clone()
    one_off[0, 0, 0, 0] = a[0, 0, 0, 0] ^ 1
    two_off = one_off.clone()
    two_off[0, 0, 0, 1] = a[0, 0, 0, 1] ^ 1
    assert psnr(a, a).item() == psnr(a, one_off).item() > psnr(a, two_off).item()
    assert ssim(a, a).item() == pytest.approx(1)


def test_feature_distance_is_euclidean() -> None:
    x, y = torch.tensor([[0.0, 3.0], [1.0, 1.0]]), torch.tensor([[4.0, 0.0], [1.0, 1.0]])
    assert feature_distance(x, y).tolist() == [5.0, 0.0]


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_torchmetrics_on_the_same_backbone(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[net]
    torch.manual_seed(0)
    backbone = getattr(torchvision.models, builder)(weights=None)
    save_file(backbone.state_dict(), tmp_path / "backbone.safetensors")
    monkeypatch.setattr(torchvision.models, builder, lambda weights=None: backbone)
    a, b = pair(side=64)
    theirs = learned_perceptual_image_patch_similarity(
        a.float() / 127.5 - 1, b.float() / 127.5 - 1, net_type=net, reduction="none"
    )
    monkeypatch.undo()
    ours = Lpips(tmp_path / "backbone.safetensors", net)(a, b)
    assert ours.min() > 0
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)


def test_lpips_repeats_grey(tmp_path: Path) -> None:
    save_file(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "alex.safetensors")
    lpips = Lpips(tmp_path / "alex.safetensors")
    a, b = pair(channels=1, side=64)
    assert torch.equal(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))
    assert lpips(a, a).tolist() == [0.0, 0.0, 0.0]


def test_lpips_refuses_other_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs the weights of its backbone; give the path"):
        Lpips(None)
    with pytest.raises(InputError, match="looks like a pickle"):
        Lpips(tmp_path / "alexnet.pth")
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="does not hold torchvision's alex network"):
        Lpips(tmp_path / "other.safetensors")
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.safetensors")
    with pytest.raises(InputError, match="does not hold torchvision's alex network"):
        Lpips(tmp_path / "squeeze.safetensors")


def test_refuses() -> None:
    a, b = pair()
    with pytest.raises(InputError, match="equal shapes"):
        psnr(a, b[:2])
    with pytest.raises(InputError, match="only uint8 images are scored"):
        ssim(a.float(), b.float())
    with pytest.raises(InputError, match="at least 11 pixels"):
        ssim(a[..., :8, :8], b[..., :8, :8])
    with pytest.raises(InputError, match="paired features must have equal shapes"):
        feature_distance(torch.zeros(2, 3), torch.zeros(3, 3))
