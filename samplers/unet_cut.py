"""Where a U-Net of diffusers can be cut into an outer part and an inner one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from .errors import InputError

SAMPLERS = ("downsamplers", "upsamplers")


@dataclass(frozen=True)
class Cut:
    """The inner part of a U-Net, by the names of its outermost modules.

    Attributes:
        inside: modules that the outer part does without.
        gives: those of them that run last: the outputs of the last to run enter the outer part.
    """

    inside: tuple[str, ...]
    gives: tuple[str, ...]


def cut_unet(network: nn.Module, depth: int, layer: int | None) -> Cut:
    """Cuts below ``layer`` layers of level ``depth``.

    Level i goes down in ``down_blocks[i]`` and up in the i-th of ``up_blocks`` from the end. A layer is what the block
    does with one of its resnets; a level of n layers has n + 1 on the way up, which are joined to the level's input
    and to its n layers, the last one first.

    Args:
        network: any network.
        depth: level, 0 the outermost.
        layer: layers of that level that are outside; None for all.

    Raises:
        InputError: when the network has no such levels, or none that can be cut there.
    """
    name = type(getattr(network, "_orig_mod", network)).__name__
    down, up = (list(getattr(network, part, ())) for part in ("down_blocks", "up_blocks"))
    if not down or len(down) != len(up):
        raise InputError(f"{name} is no U-Net whose down_blocks and up_blocks are pairs of levels")
    if depth >= len(down):
        raise InputError(f"{name} has levels 0 to {len(down) - 1}; got depth {depth}")
    for below, above in zip(down, reversed(up), strict=True):
        _check_level(name, below, above)
    top = len(up) - 1 - depth
    deeper = [f"down_blocks.{index}" for index in range(depth + 1, len(down))]
    deeper += ["mid_block"] if getattr(network, "mid_block", None) is not None else []
    deeper += [f"up_blocks.{index}" for index in range(top)]
    layers = len(getattr(down[depth], "resnets", ()))
    if layer is None or (layer == layers and layers):
        if not deeper:
            raise InputError(f"{name} has nothing below all layers of level {depth}; lower depth or layer")
        return Cut((*_samplers(down[depth], f"down_blocks.{depth}"), *deeper), (deeper[-1],))
    if layer > layers or not layers:
        raise InputError(
            f"level {depth} of {name} has {layers} layers that can be cut; got layer {layer}; "
            f"{'give at most that' if layers else 'leave the level whole with layer null'}"
        )
    lower = _layers(name, down[depth], f"down_blocks.{depth}")
    upper = _layers(name, up[top], f"up_blocks.{top}")
    below = [module for modules in lower[layer:] for module in modules]
    above = [module for modules in upper[: layers - layer] for module in modules]
    samplers = _samplers(down[depth], f"down_blocks.{depth}")
    return Cut((*below, *samplers, *deeper, *above), tuple(upper[layers - layer - 1]))


def _check_level(name: str, below: Any, above: Any) -> None:
    """Refuses levels whose way up is not joined to their way down layer by layer, or at all."""
    kind = type(below).__name__
    if hasattr(below, "resnets_in") and hasattr(above, "resnets_in"):  # Kandinsky 3 joins whole levels
        return
    if hasattr(below, "skip_conv"):
        raise InputError(f"{name} carries the image past its levels in {kind}, which cannot be cut")
    plain = hasattr(below, "resnets") and hasattr(above, "resnets") and not kind.startswith(("KDown", "KCross"))
    if not plain or len(above.resnets) != len(below.resnets) + 1:
        raise InputError(
            f"{name} has levels of {kind} and {type(above).__name__}, whose layers are not joined in pairs"
        )


def _samplers(block: Any, name: str) -> list[str]:
    return [f"{name}.downsamplers.{index}" for index, _ in enumerate(getattr(block, "downsamplers", None) or ())]


def _layers(network: str, block: Any, name: str) -> list[list[str]]:
    """Of each layer of a block the modules, by name; one list of the block may hold several for each layer."""
    layers: list[list[str]] = [[] for _ in block.resnets]
    for part, modules in block.named_children():
        if not isinstance(modules, nn.ModuleList) or part in SAMPLERS:
            continue
        if len(modules) % len(layers):
            raise InputError(
                f"{name} of {network} has {len(modules)} {part} for {len(layers)} layers; "
                "leave the level whole with layer null"
            )
        for index, module in enumerate(modules):
            if module is not None:
                layers[index * len(layers) // len(modules)].append(f"{name}.{part}.{index}")
    return layers
