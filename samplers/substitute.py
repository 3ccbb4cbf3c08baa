"""Networks that stand in for one of a pipeline's own: which one, loaded from beside the plan, and checked."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import InputError, unknown_name
from .files import read_json
from .network import denoisers, own_class
from .part import Run

MUST_AGREE = (
    "in_channels",
    "out_channels",
    "cross_attention_dim",
    "joint_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
    "encoder_hid_dim",
    "addition_embed_type",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
    "num_embeds_ada_norm",
)
"Entries of a network's config that say what it takes and gives."


def own_network(pipe: Any, part: str, component: str | None) -> tuple[str, nn.Module]:
    """The denoiser of a pipeline that a part is about.

    Args:
        pipe: the pipeline.
        part: the part that asks, as the user knows it.
        component: its name, or None where the pipeline has one denoiser.

    Returns:
        Its name and the network.

    Raises:
        InputError: when there is none of this name, or there are several and none is named.
    """
    candidates = denoisers(pipe)
    if component is not None:
        if component not in candidates:
            raise unknown_name("denoiser of the pipeline", component, candidates)
        return component, candidates[component]
    if len(candidates) > 1:
        raise InputError(
            f"{type(pipe).__name__} has the denoisers {', '.join(candidates)}; name one as component of the {part} part"
        )
    return next(iter(candidates.items()))


def device_of(pipe: Any, own: nn.Module) -> torch.device:
    """Where a pipeline runs its denoiser ``own``."""
    return torch.device(getattr(pipe, "_execution_device", None) or next(own.parameters()).device)


def load_network(run: Run, part: str, folder: str, own: nn.Module) -> nn.Module:
    """The network in a folder beside the plan, of the class and dtype of ``own``.

    Args:
        run: knows the plan's folder.
        part: the part that asks, as the user knows it.
        folder: name of a folder that ``save_pretrained`` wrote, within the plan's.
        own: the network that it stands in for.

    Raises:
        InputError: when the folder is not beside the plan, or does not hold such a network in safetensors, complete.
    """
    config = run.file(part, f"{folder}/config.json")
    for file in _files(config.parent):
        run.file(part, f"{folder}/{file}")
    cls: Any = own_class(inner(own))
    saved = read_json(config).get("_class_name")
    if saved != cls.__name__:
        raise InputError(f"{config.parent} holds a {saved}, and the pipeline runs a {cls.__name__}; give one of those")
    try:
        network, info = cls.from_pretrained(
            config.parent,
            torch_dtype=next(own.parameters()).dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load {config.parent}: {' '.join(str(error).split())}") from error
    if info["missing_keys"]:
        raise InputError(
            f"{config.parent} lacks {len(info['missing_keys'])} tensors, such as {info['missing_keys'][0]!r}"
        )
    if info["unexpected_keys"]:
        raise InputError(
            f"{config.parent} has {len(info['unexpected_keys'])} tensors that a {cls.__name__} of its config has not, "
            f"such as {info['unexpected_keys'][0]!r}; save the network again with save_pretrained"
        )
    loaded: nn.Module = network
    return loaded


def _files(folder: Path) -> set[str]:
    """Names of everything that loading the network in ``folder`` can read, shards that an index names included."""
    shards = {
        str(shard)
        for index in folder.glob("*.index.json")
        for shard in dict(read_json(index).get("weight_map", {})).values()
    }
    return shards | {file.name for file in folder.iterdir() if file.is_file()}


def inner(network: nn.Module) -> nn.Module:
    """The network that a compiled one wraps, or itself."""
    wrapped: nn.Module = getattr(network, "_orig_mod", network)
    return wrapped


def check_network(
    name: str, other: Any, own: nn.Module, device: torch.device, agree: tuple[str, ...] = MUST_AGREE
) -> None:
    """Looks for what keeps a network from standing in for another one.

    Args:
        name: what error messages call it.
        other: the network.
        own: the one that it stands in for.
        device: where it is to run.
        agree: entries of the config that must be equal where both have them.

    Raises:
        InputError: when it cannot stand in.
    """
    if not isinstance(other, nn.Module):
        raise InputError(f"network {name!r} is a {type(other).__name__}; give a torch module")
    if other.training:
        raise InputError(f"network {name!r} is in training mode; call .eval() on it first")
    theirs, mine = (next(network.parameters()) for network in (other, own))
    if theirs.dtype != mine.dtype:
        raise InputError(
            f"network {name!r} has {theirs.dtype} weights and the pipeline's own {mine.dtype}; convert one of them"
        )
    offloaded = any(hasattr(module, "_hf_hook") for module in other.modules())
    if theirs.device.type != device.type and not offloaded:
        raise InputError(f"network {name!r} is on {theirs.device} and the pipeline on {device}; move it there")
    for entry in agree:
        here, there = (getattr(inner(network), "config", {}).get(entry) for network in (own, other))
        if here is not None and there is not None and here != there:
            raise InputError(f"network {name!r} has {entry}={there!r} and the pipeline's own {here!r}; they must agree")
    takes = inspect.signature(type(inner(other)).forward).parameters
    wanted = inspect.signature(type(inner(own)).forward).parameters
    for argument in wanted:
        if argument not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise InputError(f"network {name!r} takes no {argument!r}, which the pipeline's own one does")
