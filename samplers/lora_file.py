"""LoRA files of diffusers and PEFT, read to the last tensor."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError
from .files import read_json, read_tensors, refuse_pickle
from .part import Run

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"Entry of a header in which diffusers keeps the adapter's LoraConfig."

PEFT_PREFIX = "base_model.model"
DEFAULT = 8
"PEFT's rank and alpha, where its config leaves them out."

_KEY = re.compile(r"(?P<prefix>base_model\.model|[A-Za-z0-9_]+)\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")

_AGAIN = "load it with pipe.load_lora_weights and write it with save_lora_weights of diffusers"
_FOREIGN = (
    (r"^text_encoder", "weights of a text encoder, which no plan changes; write a file of the denoiser's layers only"),
    (r"lora_magnitude_vector|dora_scale", "a DoRA, which is not a sum; merge it into a student and give that"),
    (r"lokr_|hada_|oft_", "no LoRA but another kind of adapter; merge it into a student and give that"),
    (r"lora_[AB]\.bias$", "a LoRA with biases; train it with lora_bias=False, or merge it into a student"),
    (r"lora_embedding_", "a LoRA of an embedding; a plan adapts linear layers and convolutions"),
    (r"^lora_(unet|transformer|te)|\.(lora_down|lora_up)\.|\.alpha$", f"kohya's names of keys; {_AGAIN}"),
    (r"\.lora\.(down|up)\.|_lora\.(down|up)\.|\.processor\.", f"names of keys of old versions of diffusers; {_AGAIN}"),
)
"What keys that are not read tell, and the mend."

_SHAPE = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
"Entries of a LoraConfig that change nothing once the weights are there."


@dataclass(frozen=True)
class LoraLayer:
    """The low-rank weights of one layer.

    Attributes:
        down: A, (rank, inputs), with the size of the kernel after them for convolutions.
        up: B, (outputs, rank), with (1, 1) after them for convolutions.
        scaling: what the product is multiplied with: alpha / rank, or alpha / sqrt(rank) (arXiv:2312.03732).
    """

    down: Tensor
    up: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Rank of the product."""
        return self.down.shape[0]


@dataclass(frozen=True)
class LoraFile:
    """What a file holds.

    Attributes:
        component: name of the network that the file names; None where it names none (PEFT).
        layers: by their full names in the network.
    """

    component: str | None
    layers: dict[str, LoraLayer]


def low_rank_shapes(weight: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a layer: that of the inputs at this rank, and of the outputs, over one pixel.

    Args:
        weight: shape of the layer's weight, (outputs, inputs) and for convolutions the size of the kernel.
        rank: of the update.
    """
    outputs, *inputs = weight
    return (rank, *inputs), (outputs, rank, *(1,) * (len(inputs) - 1))


def read_lora(run: Run, name: str) -> LoraFile:
    """Reads a LoRA from beside the plan.

    Args:
        run: knows the plan's folder.
        name: of a file, or of a folder with a file of diffusers or PEFT.

    Raises:
        InputError: when it is missing, a pickle, or has a tensor or a setting that is not known or makes no sense.
    """
    refuse_pickle(Path(name))
    name = _file_in(run, name)
    tensors, header = read_tensors(run.file("lora", name))
    prefix, pairs = _pairs(name, tensors)
    if prefix != PEFT_PREFIX:
        return LoraFile(prefix, _layers(name, pairs, _metadata(name, header, prefix)))
    folder, slash, file = name.rpartition("/")
    if file != PEFT_FILE:
        raise InputError(f"{name} has keys of PEFT; name it {PEFT_FILE}, with {CONFIG} beside it")
    config = read_json(run.file("lora", f"{folder}{slash}{CONFIG}"))
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{folder}{slash}{CONFIG} is not the config of a LoRA; its peft_type must be LORA")
    return LoraFile(None, _layers(name, pairs, config))


def _file_in(run: Run, name: str) -> str:
    """``name``, or the file that the folder ``name`` holds."""
    if run.folder is None or not (run.folder / name).is_dir():
        return name
    held = [file for file in (DIFFUSERS_FILE, PEFT_FILE) if (run.folder / name / file).is_file()]
    if len(held) != 1:
        raise InputError(f"the folder {name!r} must hold either {DIFFUSERS_FILE} or {PEFT_FILE}; name the file")
    return f"{name}/{held[0]}"


def _pairs(file: str, tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """The prefix of all keys, and A and B of each layer."""
    pairs: dict[str, dict[str, Tensor]] = {}
    prefixes = set()
    for key, tensor in tensors.items():
        for pattern, what in _FOREIGN:
            if re.search(pattern, key):
                raise InputError(f"{file} has the key {key!r}: {what}")
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(
                f"{file} has the key {key!r}; keys are NETWORK.LAYER.lora_A.weight and NETWORK.LAYER.lora_B.weight, as "
                "save_lora_weights of diffusers writes them"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise InputError(f"{key} of {file} is not finite, or no floating point; export another checkpoint")
        prefixes.add(match["prefix"])
        pairs.setdefault(match["layer"], {})[match["side"]] = tensor
    if len(prefixes) != 1:
        found = " and ".join(sorted(prefixes)) or "nothing"
        raise InputError(f"{file} adapts {found}; give a file for each network, and a part for each file")
    return prefixes.pop(), pairs


def _metadata(file: str, header: Mapping[str, str], prefix: str) -> dict[str, Any] | None:
    """The LoraConfig in a header, or None where there is none."""
    if METADATA not in header:
        return None
    try:
        config = json.loads(header[METADATA])
    except json.JSONDecodeError as error:
        raise InputError(f"the {METADATA} of {file} is not valid JSON ({error.msg}); write the file again") from None
    if not isinstance(config, dict):
        raise InputError(f"the {METADATA} of {file} is a {type(config).__name__}; it must be an object")
    own = {key: value for key, value in config.items() if key.startswith(f"{prefix}.")}
    if not own:
        raise InputError(f"the {METADATA} of {file} says nothing of {prefix!r}, which its keys are for; write it again")
    return {key.removeprefix(f"{prefix}."): value for key, value in own.items()}


def _layers(
    file: str, pairs: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any] | None
) -> dict[str, LoraLayer]:
    """The layers, scaled as ``config`` says; alpha is the rank where there is none."""
    if config is not None:
        _check_config(file, config, pairs)
    found = {}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise InputError(f"{file} has no lora_{'B' if 'A' in pair else 'A'}.weight of {name}; write it again")
        down, up = pair["A"], pair["B"]
        if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1]:
            raise InputError(f"A {tuple(down.shape)} and B {tuple(up.shape)} of {name} in {file} are of unequal rank")
        found[name] = LoraLayer(down, up, 1.0 if config is None else _scaling(file, name, down.shape[0], config))
    return found


def _check_config(file: str, config: Mapping[str, Any], layers: Iterable[str]) -> None:
    """Raises ``InputError`` for settings that make it something else than a plain LoRA of these layers."""
    for option, value in config.items():
        if option not in _SHAPE | _WITHOUT_EFFECT and value and value != "none":
            raise InputError(
                f"{file} was made with {option}={value!r}, which a plan cannot add; merge it into a student"
            )
    start = config.get("init_lora_weights", True)
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        raise InputError(
            f"{file} was made with init_lora_weights={start!r}, which changes the network too; convert it to a plain "
            "LoRA when saving (path_initial_model_for_weight_conversion of PEFT)"
        )
    targets = config.get("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(_is_end(str(target), layer) for layer in layers):
            raise InputError(f"{file} has no weights of its target {target!r}; it is not complete, write it again")


def _scaling(file: str, name: str, rank: int, config: Mapping[str, Any]) -> float:
    said = _of_layer(file, "rank_pattern", name, config, config.get("r", DEFAULT))
    if said != rank:
        raise InputError(f"{name} in {file} is of rank {rank}, and its config says {said!r}; write it again")
    alpha = _of_layer(file, "alpha_pattern", name, config, config.get("lora_alpha", DEFAULT))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"alpha of {name} in {file} is {alpha!r}; it must be a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(file: str, table: str, name: str, config: Mapping[str, Any], otherwise: Any) -> Any:
    """What a table of exceptions says of a layer: the first entry whose name is the end of the layer's."""
    entries = config.get(table) or {}
    if not isinstance(entries, dict):
        raise InputError(f"the {table} of {file} is {entries!r}; it must be an object of layers")
    for pattern, value in entries.items():
        literal = pattern.removeprefix("^")
        if not re.fullmatch(r"[A-Za-z0-9_.]+", literal):
            raise InputError(f"the {table} of {file} has the pattern {pattern!r}; write names of layers")
        if name == literal or (literal == pattern and _is_end(literal, name)):
            return value
    return otherwise


def _is_end(end: str, name: str) -> bool:
    return name == end or name.endswith(f".{end}")
