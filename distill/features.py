"""Features of a network at some of its blocks, while it runs as a role: for discriminators and discrepancies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..samplers.errors import InputError
from ..samplers.stacks import block_names, main_input, named_arguments, streams_of
from .conditions import Condition
from .predict import predict
from .team import Team

#: State (B, ...) and times (B,) to features of some blocks, each (B, tokens, channels), in the order of the blocks.
Features = Callable[[Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Tap:
    """A block whose output is looked at.

    Attributes:
        name: of the block in the network.
        channels: of its output.
    """

    name: str
    channels: int


def blocks_to_tap(network: nn.Module, count: int) -> tuple[Tap, ...]:
    """Blocks that are spread evenly over the depth of a network; of one, the middle.

    They are transformer blocks in the order in which they run, or the blocks of a U-Net: down, middle and up.

    Args:
        network: of any family.
        count: how many; all blocks where there are not as many.

    Raises:
        InputError: when the count is below 1, or the network has no blocks that fewstep knows.
    """
    if count < 1:
        raise InputError(f"features are taken at 1 block or more; got {count}")
    unet = _unet_blocks(network)
    names = unet or block_names(network)
    count = min(count, len(names))
    places = (((2 * index + 1) * len(names)) // (2 * count) for index in range(count))
    chosen = [names[place] for place in places]
    return tuple(Tap(name, _width(network.get_submodule(name), bool(unet))) for name in chosen)


@contextmanager
def tapped(network: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keeps what some blocks of a network give while the context lasts; of several calls, what the last one gave.

    Args:
        network: that holds them.
        names: of the blocks.

    Yields:
        By name, the samples' features from each block that ran, as tokens (rows, tokens, channels).
    """
    kept: dict[str, Tensor] = {}
    unet = _unet_blocks(network)

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            value = _stream(module, args, kwargs, output)
            kept[name] = value.flatten(2).transpose(1, 2) if name in unet else value.flatten(1, -2)

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def features_of(team: Team, role: str, condition: Condition, count: int, *, grad: bool = True) -> Features:
    """The features of a role at `blocks_to_tap` of its network, told the condition, without guidance.

    The role is frozen: a loss through the features reaches only what made the state.

    Args:
        team: the networks.
        role: whose features.
        condition: of the samples.
        count: of blocks.
        grad: whether operations are recorded.

    Returns:
        From (B, ...) states and (B,) times to the features of each block, (B, tokens, channels). Frames or patches
        that the network puts in rows of their own are tokens of their sample.

    Raises:
        InputError: as `blocks_to_tap`.
    """

    def features(x: Tensor, t: Tensor) -> list[Tensor]:
        with team.roles.use(role, grad=grad, frozen=True) as network:
            names = [tap.name for tap in blocks_to_tap(network, count)]
            with tapped(network, names) as kept:
                predict(network, team.process, x, t, condition)
            return [kept[name].reshape(len(x), -1, kept[name].shape[2]) for name in names]

    return features


def _unet_blocks(network: nn.Module) -> tuple[str, ...]:
    """The blocks of a U-Net from its input to its output; none of other networks."""
    for name, module in network.named_modules():
        outer, _, last = name.rpartition(".")
        if last == "down_blocks" and isinstance(module, nn.ModuleList):
            unet = network.get_submodule(outer)
            prefix = f"{outer}." if outer else ""
            down, up = ([f"{part}.{i}" for i in range(len(getattr(unet, part)))] for part in (last, "up_blocks"))
            middle = ["mid_block"] if getattr(unet, "mid_block", None) is not None else []
            return tuple(prefix + block for block in (*down, *middle, *up))
    return ()


def _width(block: nn.Module, unet: bool) -> int:
    """Channels of a block's output: what most of its matrices take or give, or most convolutions of a U-Net's give.

    Attention, modulation and feed-forward networks each begin or end at the residual stream, so that its width is the
    most common one; a U-Net's resnets join the skipped features in their first convolution only.
    """
    if unet:
        widths = [module.out_channels for module in block.modules() if isinstance(module, _ConvNd)]
    else:
        matrices = [module for module in block.modules() if isinstance(module, nn.Linear)]
        widths = [width for matrix in matrices for width in (matrix.in_features, matrix.out_features)]
    if not widths:
        raise InputError(f"{type(block).__name__} has no matrices, so the width of its features is not known")
    return Counter(widths).most_common(1)[0][0]


def _stream(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """The samples' features in what a block gives: alone, before the skips of a U-Net, or beside the text's."""
    if isinstance(output, Tensor):
        return output
    if len(output) > 1 and not isinstance(output[1], Tensor):
        first: Tensor = output[0]
        return first
    inputs = {name: value for name, value in named_arguments(module, args, kwargs).items() if isinstance(value, Tensor)}
    main = main_input(inputs)
    places = [place for name, place in streams_of(module, args, kwargs, output) if name == main]
    stream: Tensor = output[places[0]]
    return stream
