"""Layers of a network that can be left out, and what stands for each: what it would give if it changed nothing.

A layer adds to what it is given. Left out, a whole layer gives that back, and a part of one gives the zeros that are
added then. What a layer returns is read from its code: it need not have run before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D, TemporalResnetBlock
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerSpatioTemporalModel, TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from torch import Tensor, nn

from .errors import InputError
from .mask import Target, is_block, targets_in
from .stacks import main_input, named_arguments, positional_names, returned_forms, sublayers

Layer = Literal["block", "attention", "cross-attention", "mlp", "resnet"]
"""Kinds of layers: in transformers whole blocks and what is in them, in U-Nets resnets and attentions."""

StandIn = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Any]
"""From a module, its positional arguments and the others to what it gives when it is left out."""

_RESNETS = (ResnetBlock2D, ResnetBlockCondNorm2D, TemporalResnetBlock)
_TRANSFORMERS = (
    Transformer2DModel,
    DualTransformer2DModel,
    TransformerTemporalModel,
    TransformerSpatioTemporalModel,
    AnimateDiffTransformer3D,
)
_ENCODED = "encoder_hidden_states"


def stand_ins(network: nn.Module, kinds: Sequence[Layer]) -> dict[str, StandIn]:
    """What stands for each layer of some kinds, by name: block after block, and within one in the order of ``kinds``.

    Raises:
        InputError: when the network has no such layer, or one that cannot be left out.
    """
    if isinstance(getattr(network, "up_blocks", None), nn.ModuleList):
        return _in_unet(network, kinds)
    targets: list[Target] = [kind for kind in kinds if kind != "resnet"]
    if not targets:
        raise InputError(f"{type(network).__name__} is no U-Net, and has no {' or '.join(kinds)}")
    names, mlps = targets_in(network, targets), sublayers(network)["mlp"]
    found: dict[str, StandIn] = {}
    for name in names:
        found[name] = pass_streams if is_block(name) else no_mlp if name in mlps else no_attention
        module = _inner(network.get_submodule(name))
        _CHECKS[found[name]](module)
    return found


def pass_streams(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Of a transformer's block the streams as they came in."""
    module = _inner(module)
    named, together = named_arguments(module, args, kwargs), _returned_streams(module)
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    alone = None in returned_forms(type(module).forward)
    if together is not None and (not alone or set(together) <= set(tensors)):
        return tuple(named[name] for name in together)
    return tensors[main_input(tensors) or ""]


def no_attention(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Zeros for what an attention adds to the samples, and to the text where it attends to both."""
    module = _inner(module)
    named = named_arguments(module, args, kwargs)
    main = main_input({name: value for name, value in named.items() if isinstance(value, Tensor)}) or ""
    pair, other = _returned_pair(module), named.get(_ENCODED)
    if pair is None or (other is None and None in returned_forms(_attends(module))):
        return torch.zeros_like(named[main])
    by_name = {main: named[main], _ENCODED: other}
    order = pair if set(pair) == set(by_name) else tuple(by_name)
    return tuple(value if value is None else torch.zeros_like(value) for value in map(by_name.get, order))


def no_mlp(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Zeros for what an MLP adds."""
    named = named_arguments(_inner(module), args, kwargs)
    return torch.zeros_like(next(value for value in named.values() if isinstance(value, Tensor)))


def shortcut(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Of a resnet its input, resampled and with as many channels as it gives."""
    resnet: Any = _inner(module)
    x_BCHW: Tensor = named_arguments(resnet, args, kwargs)["input_tensor"]
    resample = getattr(resnet, "upsample", None) or getattr(resnet, "downsample", None)
    if resample is not None:
        x_BCHW = resample(x_BCHW)
    if resnet.conv_shortcut is not None:
        x_BCHW = resnet.conv_shortcut(x_BCHW)
    scale: float = getattr(resnet, "output_scale_factor", 1.0)
    return x_BCHW / scale


def residual(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Of an attention that adds its input itself the input, scaled as it does."""
    attention: Any = _inner(module)
    x: Tensor = named_arguments(attention, args, kwargs)["hidden_states"]
    scale: float = attention.rescale_output_factor
    return x / scale


def same(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Of a transformer within a U-Net its input."""
    module = _inner(module)
    x = named_arguments(module, args, kwargs)["hidden_states"]
    return (x,) if "return_dict" in positional_names(module) else x


def _in_unet(network: nn.Module, kinds: Sequence[Layer]) -> dict[str, StandIn]:
    found = {
        f"{level}.{name}": stand_in
        for level, block in _levels(network)
        for kind in kinds
        if kind in _UNET_KINDS
        for name, stand_in in _UNET_KINDS[kind](block).items()
    }
    if not found:
        raise InputError(
            f"{type(network).__name__} is a U-Net, of which resnet and attention layers can be left out where they are "
            f"diffusers' own; it has no {' or '.join(kinds)} of that sort"
        )
    return found


def _levels(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a U-Net by name, in the order in which they run."""
    for part in ("down_blocks", "mid_block", "up_blocks"):
        module = getattr(network, part, None)
        if isinstance(module, nn.ModuleList):
            yield from ((f"{part}.{index}", block) for index, block in enumerate(module))
        elif isinstance(module, nn.Module):
            yield part, module


def _resnets(block: nn.Module) -> dict[str, StandIn]:
    return {name: shortcut for name, module in block.named_modules() if isinstance(_inner(module), _RESNETS)}


def _attentions(block: nn.Module) -> dict[str, StandIn]:
    found: dict[str, StandIn] = {}
    for name, module in block.named_modules():
        inner: Any = _inner(module)
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(inner, _TRANSFORMERS):
            found[name] = same
        elif isinstance(inner, Attention) and inner.residual_connection:
            found[name] = residual
    return found


def _returned_streams(block: nn.Module) -> tuple[str, ...] | None:
    """The streams in the tuple that a block returns, None where it returns no tuple."""
    returned = _tuple_of(block, type(block).forward)
    if returned is not None and not set(returned) <= set(positional_names(block)):
        raise InputError(
            f"{type(block).__name__} returns ({', '.join(returned)}), which are not all called as inputs of it are; "
            "fewstep cannot tell what it gives when it is left out"
        )
    return returned


def _returned_pair(attention: nn.Module) -> tuple[str, ...] | None:
    """What an attention calls its two outputs, None where it has one."""
    returned = _tuple_of(attention, _attends(attention))
    if returned is not None and len(returned) != 2:
        raise InputError(
            f"{type(attention).__name__} returns ({', '.join(returned)}); fewstep cannot tell what it gives when it is "
            "left out"
        )
    return returned


def _returned_tensor(mlp: nn.Module) -> None:
    if _tuple_of(mlp, type(mlp).forward) is not None:
        raise InputError(f"{type(mlp).__name__} returns a tuple; fewstep cannot tell what it gives when it is left out")


def _tuple_of(module: nn.Module, function: Any) -> tuple[str, ...] | None:
    """The names in the tuple that a function returns, None where it returns none.

    Raises:
        InputError: when it returns tuples of several sorts, or has no source.
    """
    forms = returned_forms(function)
    tuples = [form for form in forms if form is not None]
    if not forms or len(tuples) > 1:
        reason = "returns several things" if forms else "has no source that can be read"
        raise InputError(f"{type(module).__name__} {reason}; fewstep cannot tell what it gives when it is left out")
    return tuples[0] if tuples else None


def _attends(attention: Any) -> Any:
    """The code that decides what an attention returns."""
    processor = getattr(attention, "processor", None)
    return type(attention).forward if processor is None else type(processor).__call__


def _inner(module: nn.Module) -> nn.Module:
    """A module, without the one that ``torch.compile`` put around it."""
    inner: nn.Module = getattr(module, "_orig_mod", module)
    return inner


_CHECKS: dict[StandIn, Callable[[nn.Module], Any]] = {
    pass_streams: _returned_streams,
    no_attention: _returned_pair,
    no_mlp: _returned_tensor,
}
"""What refuses a module that a stand-in does not fit."""

_UNET_KINDS: dict[Layer, Callable[[nn.Module], dict[str, StandIn]]] = {"resnet": _resnets, "attention": _attentions}
