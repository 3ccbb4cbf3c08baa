"""DINOv2 and CLIP as feature nets, from local ``transformers`` folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...samplers.errors import InputError
from ...samplers.files import read_json
from ..features import FEATURE_NETS
from .module_net import IMAGENET_MEAN, IMAGENET_STD, ModuleNet, bicubic

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@FEATURE_NETS.register("dinov2")
def load_dinov2(path: Path | None, download: bool = False) -> ModuleNet:
    """DINOv2 (arXiv:2304.07193) for ``fd_dinov2`` (arXiv:2306.04675): the class token of 224x224 images."""
    model = load_local("dinov2", path, ("dinov2", "dinov2_with_registers"))
    prepare, words = bicubic(224, IMAGENET_MEAN, IMAGENET_STD)
    return ModuleNet(
        "dinov2", model.config.hidden_size, (1, 3), words, model, prepare, lambda net, x: net(x).pooler_output
    )


@FEATURE_NETS.register("clip")
def load_clip(path: Path | None, download: bool = False) -> ModuleNet:
    """The image embedding of any CLIP, not normalised, at the size it was trained on."""
    model = load_local("clip", path, ("clip",))
    prepare, words = bicubic(model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
    return ModuleNet(
        "clip",
        model.config.projection_dim,
        (1, 3),
        words,
        model,
        prepare,
        lambda net, x: embedding(net.get_image_features(pixel_values=x)),  # type: ignore[operator]
    )


def load_local(name: str, path: Path | None, kinds: tuple[str, ...]) -> Any:
    """The model of a local ``transformers`` folder, float32, from safetensors alone, never downloaded.

    Args:
        name: what it is called in error messages.
        path: its folder.
        kinds: the ``model_type`` that its ``config.json`` may name.

    Raises:
        InputError: when the folder is missing, is of another model, or holds no safetensors.
    """
    import torch
    from transformers import AutoModel

    if path is None or not path.is_dir():
        raise InputError(
            f"{name} needs a local transformers folder; got {path}: save one with "
            "AutoModel.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    kind = read_json(path / "config.json").get("model_type")
    if kind not in kinds:
        raise InputError(f"{path} holds a model of type {kind!r}, not {' or '.join(map(repr, kinds))}")
    if not any(path.glob("*.safetensors")):
        raise InputError(
            f"{path} holds no safetensors; a pickle is not read: save the model again with save_pretrained"
        )
    return AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True, dtype=torch.float32).eval()


def embedding(output: Any) -> Tensor:
    """The tensor of ``get_image_features`` or ``get_text_features``, which transformers 5 wraps in an object."""
    result: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return result
