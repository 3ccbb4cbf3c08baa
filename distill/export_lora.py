"""LoRA weights as files that stock libraries load to the last tensor.

Diffusers looks at the first key of a file to tell its format, and at the rank of the tensors to guess alpha. So the
keys are those of PEFT throughout, ``COMPONENT.LAYER.lora_A.weight``, and the header says rank, alpha and layers.
Some networks cannot load adapters in diffusers (``DiTTransformer2DModel``, ``UNet2DModel`` and PixArt's among them);
theirs are written as a folder of PEFT's, which loads into any network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..samplers.errors import InputError
from ..samplers.files import write_json, write_tensors
from ..samplers.network import denoisers
from .lora import Lora

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
KOHYA_FILE = "kohya_lora.safetensors"


@dataclass(frozen=True)
class LoraFiles:
    """What an export wrote.

    Attributes:
        paths: the files.
        imports: the line of Python that the loading needs before it, or nothing.
        load: the line of Python that loads them into a pipeline ``pipe``; FOLDER stands for where they are.
    """

    paths: tuple[Path, ...]
    imports: str
    load: str


def export_lora(
    pipe: Any, component: str, lora: Lora, folder: Path, *, dtype: torch.dtype | None = None, kohya: bool = False
) -> LoraFiles:
    """Writes an adapter of one of a pipeline's networks.

    What is loaded from the files gives the outputs of the adapter they were written from, bit for bit, unless
    ``dtype`` rounds it.

    Args:
        pipe: a pipeline of the class that is to load them.
        component: name of the network in it.
        lora: the weights.
        folder: where the files go; made when it is not there.
        dtype: what the weights are stored as; as they are when None.
        kohya: whether to write ``kohya_lora.safetensors`` as well, for ComfyUI and Automatic1111.

    Returns:
        The files, and how they are loaded.

    Raises:
        InputError: when the pipeline has no such network, the weights are none or not finite, or cannot be written.
    """
    if component not in denoisers(pipe):
        names = ", ".join(denoisers(pipe))
        raise InputError(f"{type(pipe).__name__} has no network {component!r} to export; its networks are {names}")
    tensors = _stored(lora, dtype)
    kind = _kind(pipe, component)
    if kind == "peft":
        paths = _write_peft(lora, tensors, folder)
    else:
        paths = [_write_diffusers(component, lora, tensors, folder)]
    if kohya:
        paths.append(_write_kohya(component, lora, tensors, folder))
    imports, load = _LOADING[kind]
    return LoraFiles(tuple(paths), imports, load.format(component))


_LOADING = {
    "pipeline": ("", 'pipe.load_lora_weights("FOLDER")'),
    "network": ("", f'pipe.{{0}}.load_lora_adapter("FOLDER", weight_name="{DIFFUSERS_FILE}", prefix="{{0}}")'),
    "peft": ("from peft import PeftModel", 'PeftModel.from_pretrained(pipe.{0}, "FOLDER")'),
}
"Of each kind of loading the imports and the call; {0} is the network's name in the pipeline."


def _kind(pipe: Any, component: str) -> str:
    """What loads the adapter in the user's program: the pipeline, its network, or PEFT."""
    network: nn.Module = getattr(pipe, component)
    if not hasattr(network, "load_lora_adapter"):
        return "peft"
    main = {getattr(pipe, name, None) for name in ("unet_name", "transformer_name")}
    return "pipeline" if hasattr(pipe, "load_lora_weights") and component in main else "network"


def _stored(lora: Lora, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if not lora.tensors:
        raise InputError("the LoRA adapts no layer; there is nothing to export")
    tensors = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in lora.tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} of the LoRA is not finite; export an earlier checkpoint, or a wider dtype")
    return tensors


def _config(lora: Lora) -> dict[str, Any]:
    """The part of PEFT's LoraConfig that shapes the adapter; the rest are its defaults."""
    setting = lora.setting
    return {"r": setting.rank, "lora_alpha": setting.alpha, "target_modules": list(lora.layers)}


def _write_diffusers(component: str, lora: Lora, tensors: dict[str, Tensor], folder: Path) -> Path:
    config = {f"{component}.{key}": value for key, value in _config(lora).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    path = folder / DIFFUSERS_FILE
    write_tensors(path, {f"{component}.{name}": tensor for name, tensor in tensors.items()}, header)
    return path


def _write_peft(lora: Lora, tensors: dict[str, Tensor], folder: Path) -> list[Path]:
    path, config = folder / PEFT_FILE, folder / PEFT_CONFIG
    write_tensors(path, {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, {"format": "pt"})
    write_json(config, {"peft_type": "LORA", "inference_mode": True} | _config(lora))
    return [path, config]


def _write_kohya(component: str, lora: Lora, tensors: dict[str, Tensor], folder: Path) -> Path:
    """Names with underscores for dots, and one alpha per layer; U-Nets as kohya names them, the rest as OneTrainer."""
    prefix = "lora_unet" if component == "unet" else "lora_transformer"
    written = {}
    for layer in lora.layers:
        name = f"{prefix}_{layer.replace('.', '_')}"
        written[f"{name}.lora_down.weight"] = tensors[f"{layer}.lora_A.weight"]
        written[f"{name}.lora_up.weight"] = tensors[f"{layer}.lora_B.weight"]
        written[f"{name}.alpha"] = torch.tensor(lora.setting.alpha)
    path = folder / KOHYA_FILE
    write_tensors(path, written, {"format": "pt"})
    return path
