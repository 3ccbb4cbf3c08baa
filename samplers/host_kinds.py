"""Which caches diffusers has, where each of them works, and when it computes."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import diffusers.hooks
import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import JointTransformerBlock
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from .errors import InputError, unknown_name
from .host_call import REGISTRY, Hooks, HostHook
from .host_faster import FasterHook

LEAST = {
    "threshold": 0,
    "max_skip_steps": 0,
    "retention_ratio": 0,
    "num_inference_steps": 1,
    "cache_interval": 1,
    "disable_cache_before_step": 1,
    "max_order": 0,
    "unconditional_batch_skip_range": 1,
    "spatial_attention_block_skip_range": 1,
    "temporal_attention_block_skip_range": 1,
    "cross_attention_block_skip_range": 1,
}
"Smallest values of options that diffusers does not check: with a smaller one its hooks fail, or do what nobody asked."

ATTENTIONS = ("spatial", "temporal", "cross")

ELSEWHERE = "the 'gate' cache works on any blocks"


def _anywhere(network: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuses no network."""


def _within(network: nn.Module, options: Mapping[str, Any], hooks: Hooks) -> None:
    """Refuses a network on which diffusers hooks nothing but the whole."""
    if not any(hooks):
        raise InputError(f"it does nothing on {type(network).__name__}: it finds no module there that it knows")


def _not_known(options: Mapping[str, Any], steps: int) -> tuple[bool, ...] | None:
    return None


@dataclass(frozen=True)
class Kind:
    """One of diffusers' caches.

    Attributes:
        apply: name of the function in ``diffusers.hooks`` that registers its hooks.
        check: raises InputError for options that lack something, and for a network where it does not work.
        check_hooks: raises InputError for a network where the hooks that were registered do not work.
        computes: of each of a number of steps, whether it computes everything; None where that is not known.
        hook: what runs its hooks.
        by_batch: whether it decides for a batch as a whole.
    """

    apply: str
    check: Callable[[nn.Module, Mapping[str, Any]], None] = _anywhere
    check_hooks: Callable[[nn.Module, Mapping[str, Any], Hooks], None] = _within
    computes: Callable[[Mapping[str, Any], int], tuple[bool, ...] | None] = _not_known
    hook: type[HostHook] = HostHook
    by_batch: bool = False


def read_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a configuration as diffusers wants them.

    Args:
        name: class name of the configuration.
        options: as JSON has them.

    Raises:
        InputError: for an unknown option, one that is a function, and a value that it cannot have.
    """
    cls = getattr(diffusers.hooks, name)
    hints = typing.get_type_hints(cls)
    known = [field.name for field in fields(cls) if not field.name.startswith("_")]
    read: dict[str, Any] = {}
    for option, value in options.items():
        if option not in known:
            raise unknown_name(f"option of {name}", option, known)
        if option.endswith("_callback"):
            raise InputError(f"option {option!r} of {name} is a function, which a plan cannot hold; leave it out")
        read[option] = _read(f"option {option!r} of {name}", option, hints[option], value)
    return read


def _read(place: str, option: str, hint: Any, value: Any) -> Any:
    if option == "taylor_factors_dtype":
        dtype = getattr(torch, str(value).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"{place} is the name of a type such as 'bfloat16'; got {value!r}")
        return dtype
    if option == "mag_ratios":
        hint = list[float]
    try:
        read = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        raise InputError(f"{place}: {error.errors()[0]['msg']}; got {value!r}") from None
    if read is not None and option in LEAST and read < LEAST[option]:
        raise InputError(f"{place} is at least {LEAST[option]}; got {value!r}")
    return read


def refuse_shared(network: nn.Module) -> None:
    """Refuses a network that has one of diffusers' caches already, or is compiled as a whole.

    Raises:
        InputError: what to do instead.
    """
    cls = type(network).__name__
    if getattr(network, "_cache_config", None) is not None:
        name = type(network._cache_config).__name__
        raise InputError(f"a {name} is enabled on {cls} already; call its disable_cache() first")
    homes = {getattr(diffusers.hooks, name).__module__ for name in KINDS}
    for name, module in network.named_modules():
        registry = vars(module).get(REGISTRY)
        if registry and any(type(hook).__module__ in homes for hook in registry.hooks.values()):
            raise InputError(f"hooks of a diffusers cache are on {name or cls} already; remove them first")
        if hasattr(module, "_orig_mod"):
            raise InputError(f"{name or cls} is wrapped by torch.compile; compile it in place with .compile() instead")


def refuse_compiled(network: nn.Module, hooks: Hooks) -> None:
    """Refuses to hook what is within a compiled module: nobody outside hears it run.

    Raises:
        InputError: which module that is.
    """
    for name in filter(None, hooks):
        above = ["", *(name[:at] for at, letter in enumerate(name) if letter == ".")]
        for outer in above:
            if getattr(network.get_submodule(outer), "_compiled_call_impl", None) is not None:
                raise InputError(
                    f"{outer or type(network).__name__} is compiled, with {name} in it; compile {name} alone"
                )


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, which diffusers finds by the names of their lists.

    Raises:
        InputError: when there are none, one is of a class that is not registered, or they run in another order.
    """
    name = type(network).__name__
    lists = {
        child: blocks
        for child, blocks in network.named_children()
        if child in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(blocks, nn.ModuleList)
    }
    blocks = [block for each in lists.values() for block in each]
    if not blocks:
        raise InputError(f"it finds no list of transformer blocks in {name}")
    if len(lists) > 1 and not lists.keys().isdisjoint(_TEMPORAL_TRANSFORMER_BLOCK_IDENTIFIERS):
        raise InputError(f"it takes the lists of blocks one after the other, and those of {name} run in alternation")
    for cls in map(type, blocks):
        if _known(cls) is None:
            raise InputError(
                f"it does not know the {cls.__name__} of {name}, which is not in diffusers' TransformerBlockRegistry; "
                f"{ELSEWHERE}"
            )
    return blocks


def _known(block: type[nn.Module]) -> Any:
    """What diffusers' registry says of a class of blocks, or None."""
    try:
        return TransformerBlockRegistry.get(block)
    except ValueError:
        return None


def _check_arguments(blocks: list[nn.Module], hidden: str | None, encoder: str | None) -> None:
    """Refuses blocks without the arguments that diffusers reads; None stands for the name in its registry."""
    for block in blocks:
        metadata = _known(type(block))
        wanted = [hidden or metadata.hidden_states_argument_name]
        if metadata.return_encoder_hidden_states_index is not None:
            wanted.append(encoder or metadata.encoder_hidden_states_argument_name)
        for name in wanted:
            if name not in inspect.signature(block.forward).parameters:
                cls = type(block).__name__
                raise InputError(f"it reads the argument {name!r}, which {cls} does not have; {ELSEWHERE}")


def _check_first_block(network: nn.Module, options: Mapping[str, Any]) -> None:
    blocks = _blocks(network)
    if len(blocks) < 2:
        raise InputError(f"it needs two blocks or more, and {type(network).__name__} has one")
    _check_arguments(blocks, "hidden_states", "encoder_hidden_states")
    pair = [_known(type(block)).return_encoder_hidden_states_index is None for block in (blocks[0], blocks[-1])]
    dropped = isinstance(blocks[-1], JointTransformerBlock) and blocks[-1].context_pre_only  # then it gives no text
    if pair[0] != pair[1] or dropped:
        raise InputError(
            "it subtracts what the first block gives from what the last one gives, and in "
            f"{type(network).__name__} these are different things; {ELSEWHERE}"
        )


def _check_mag(network: nn.Module, options: Mapping[str, Any]) -> None:
    if options.get("calibrate"):
        raise InputError("with calibrate it skips nothing; calibrate with diffusers, and give the mag_ratios")
    if not options.get("mag_ratios"):
        raise InputError("it needs the mag_ratios of this model; calibrate them once with diffusers' calibrate=True")
    _check_arguments(_blocks(network), None, "encoder_hidden_states")


def _check_sea(network: nn.Module, options: Mapping[str, Any]) -> None:
    _check_arguments(_blocks(network), None, None)


def _check_sea_hooks(network: nn.Module, options: Mapping[str, Any], hooks: Hooks) -> None:
    (root,) = hooks[""]
    if root.raw_vision_callback is None or root.use_stack_boundary:
        raise InputError(
            "it reads the samples of Wan's text-to-video networks, and cannot do so here for "
            f"{type(network).__name__}; {ELSEWHERE}"
        )


def _check_taylor_hooks(network: nn.Module, options: Mapping[str, Any], hooks: Hooks) -> None:
    zeroing = [hook.state_manager._init_kwargs["is_inactive"] for several in hooks.values() for hook in several]
    if not all(zeroing):
        return
    if options.get("use_lite_mode"):
        raise InputError(f"with use_lite_mode it forecasts 'proj_out', which {type(network).__name__} does not have")
    raise InputError(
        f"it forecasts nothing of {type(network).__name__}, no whole name of a module there fits its patterns; give "
        "cache_identifiers such as 'blocks[.][0-9]+[.]attn1'"
    )


def _check_pyramid(network: nn.Module, options: Mapping[str, Any]) -> None:
    names = [f"{kind}_attention_block_skip_range" for kind in ATTENTIONS]
    if not any(options.get(name) for name in names):
        raise InputError(f"it needs one of {', '.join(names)}; set it to 2 or more")


def _taylor_computes(options: Mapping[str, Any], steps: int) -> tuple[bool, ...]:
    config = diffusers.hooks.TaylorSeerCacheConfig(**options)
    before, after, interval = config.disable_cache_before_step, config.disable_cache_after_step, config.cache_interval
    end = math.inf if after is None else after
    return tuple(step < before or (step - before - 1) % interval == 0 or step >= end for step in range(steps))


def _pyramid_computes(options: Mapping[str, Any], steps: int) -> tuple[bool, ...] | None:
    """Known where all times are within the ranges: those of diffusers' schedulers are from 0 to 1000."""
    config = diffusers.hooks.PyramidAttentionBroadcastConfig(**options)
    intervals = []
    for kind in ATTENTIONS:
        interval = getattr(config, f"{kind}_attention_block_skip_range")
        low, high = getattr(config, f"{kind}_attention_timestep_skip_range")
        if interval is not None and (low >= 0 or high <= 1000):
            return None
        intervals.append(interval or 1)
    return tuple(all(step % interval == 0 for interval in intervals) for step in range(steps))


def _mag_computes(options: Mapping[str, Any], steps: int) -> tuple[bool, ...] | None:
    wanted = options.get("num_inference_steps", steps)
    if wanted != steps:
        raise InputError(
            f"MagCacheConfig has num_inference_steps {wanted}; the run has {steps} timesteps; leave it out"
        )
    return None


_ALL = {
    "FasterCacheConfig": Kind("apply_faster_cache", hook=FasterHook),
    "FirstBlockCacheConfig": Kind("apply_first_block_cache", _check_first_block, by_batch=True),
    "MagCacheConfig": Kind("apply_mag_cache", _check_mag, computes=_mag_computes),
    "PyramidAttentionBroadcastConfig": Kind(
        "apply_pyramid_attention_broadcast", _check_pyramid, computes=_pyramid_computes
    ),
    "SeaCacheConfig": Kind("apply_sea_cache", _check_sea, _check_sea_hooks, by_batch=True),
    "TaylorSeerCacheConfig": Kind("apply_taylorseer_cache", check_hooks=_check_taylor_hooks, computes=_taylor_computes),
    "TextKVCacheConfig": Kind("apply_text_kv_cache"),
}

KINDS = {name: kind for name, kind in _ALL.items() if hasattr(diffusers.hooks, name)}
"The caches of the diffusers that is installed, by the name of their configuration."
