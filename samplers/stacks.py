"""The structure of transformers: stacks of residual blocks, what is in a block, and which output continues which input.

It is read from names, signatures and the modules themselves; there is no table of networks.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from .errors import InputError

Kind = Literal["attention", "cross-attention", "mlp"]
Streams = tuple[tuple[str, int], ...]
"""Of each stream of features through a block: the name of the input that it comes in by, and the position of the
output that it leaves by."""

_STACK = re.compile(r"(^|_)(blocks|layers)$")
_BESIDE = re.compile(r"refine|encode|adapt|perceiver|layerwise|vace|(^|[._])(text|txt|cond|context|mode)_")
"Stacks that work on conditions, or beside the samples."
_ATTENTION = re.compile(r"(^|_)(attn|attention)\d*$")
_CROSS = re.compile(r"cross|^attn2$")
_MLP = re.compile(r"(^|_)(ff|ffn|mlp|feed_forward|moe)(_|$)")
_DEEPEST = 3
"How many names deep a stack may lie: wrappers put a prefix before the network's own."


@dataclass(frozen=True)
class Stack:
    """Blocks of one kind that follow each other.

    Attributes:
        name: of the list in the network.
        blocks: full names of the blocks, in order.
    """

    name: str
    blocks: tuple[str, ...]


def block_stacks(network: nn.Module) -> tuple[Stack, ...]:
    """The stacks of residual blocks that the samples go through, in the order in which they run.

    A list of modules is one when its name ends in ``blocks`` or ``layers``, each of its elements has an attention, and
    it neither refines conditions nor runs beside the samples.

    Raises:
        InputError: when there is none: in U-Nets, and in networks that are no transformers.
    """
    lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
    kind = type(network).__name__
    if any(name.rpartition(".")[2] in ("down_blocks", "up_blocks") for name in lists):
        raise InputError(f"{kind} is a U-Net, which has no stack of equal blocks; use a cache of its levels")
    found: dict[int, list[Stack]] = {}
    for name, module in lists.items():
        depth = name.count(".") + 1
        last = name.rpartition(".")[2]
        if depth <= _DEEPEST and _STACK.search(last) and not _BESIDE.search(name) and _are_blocks(module):
            blocks = tuple(f"{name}.{index}" for index in range(len(module)))
            found.setdefault(depth, []).append(Stack(name, blocks))
    if not found:
        raise InputError(f"{kind} has no stack of transformer blocks that fewstep knows; its lists are {list(lists)}")
    return tuple(found[min(found)])


def block_names(network: nn.Module) -> tuple[str, ...]:
    """Names of the blocks of all stacks, in the order in which they run.

    A stack of temporal blocks takes turns with the one of the same length before it.

    Raises:
        InputError: when there is none.
    """
    names: list[tuple[str, ...]] = []
    for stack in block_stacks(network):
        if stack.name.rpartition(".")[2].startswith("temporal_") and names and len(names[-1]) == len(stack.blocks):
            names[-1] = tuple(name for pair in zip(names[-1], stack.blocks, strict=True) for name in pair)
        else:
            names.append(stack.blocks)
    return tuple(name for blocks in names for name in blocks)


def sublayers(network: nn.Module) -> dict[Kind, tuple[str, ...]]:
    """Full names of what the blocks are made of, in the order of the blocks.

    ``attention`` attends the samples, alone or joined with the text; ``cross-attention`` attends the text alone;
    ``mlp`` is any feed-forward network, each stream's. An MLP that is merged with an attention is not listed.

    Raises:
        InputError: when the network has no stack.
    """
    found: dict[Kind, list[str]] = {"attention": [], "cross-attention": [], "mlp": []}
    for block in block_names(network):
        inside: list[str] = []
        for name, module in network.get_submodule(block).named_modules():
            kind = _kind(name.rpartition(".")[2], module)
            if kind is not None and not any(name.startswith(f"{outer}.") for outer in inside):
                inside.append(name)
                found[kind].append(f"{block}.{name}")
    return {kind: tuple(names) for kind, names in found.items()}


def attention_of(block: nn.Module) -> str:
    """The name, in a block, of the attention that comes first in it: that of the samples, where it has one.

    Raises:
        InputError: when it has none.
    """
    kinds: dict[str, Kind | None] = {
        name: _kind(name.rpartition(".")[2], module) for name, module in block.named_modules()
    }
    for wanted in ("attention", "cross-attention"):
        for name, kind in kinds.items():
            if kind == wanted:
                return name
    raise InputError(f"{type(block).__name__} has no attention that fewstep knows")


def positional_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters of a module's forward that can be given by position."""
    cls: Any = type(module)
    return _positional_names(cls)


def input_names(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    """The name of each argument of a call, those by position first; ``*0``, ``*1`` for what has no name."""
    names = positional_names(module)[: len(args)]
    rest = tuple(f"*{index}" for index in range(len(args) - len(names)))
    return (*names, *rest, *kwargs)


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as `input_names` has it."""
    return dict(zip(input_names(module, args, kwargs), (*args, *kwargs.values()), strict=True))


def with_arguments(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call with some arguments replaced, each given the way it was: by position, or by name.

    Args:
        module: what is called.
        args: positional arguments.
        kwargs: the others.
        changes: new values by name, of arguments that are given.

    Returns:
        The positional arguments and the others.
    """
    names = input_names(module, args, kwargs)
    positional = tuple(changes.get(name, value) for name, value in zip(names, args, strict=False))
    return positional, {name: changes.get(name, value) for name, value in kwargs.items()}


def main_input(inputs: Mapping[str, Tensor]) -> str | None:
    """Which of the tensors that a block takes is the stream that it works on; None when it takes none."""
    return "hidden_states" if "hidden_states" in inputs else next(iter(inputs), None)


def streams_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Streams:
    """Which outputs of a block continue which of its inputs.

    A tensor continues ``hidden_states``, or else the first tensor that the block takes. In a tuple the names that the
    block returns tell, then diffusers' own registry of blocks, then shapes that fit one way only.

    Args:
        module: the block.
        args: positional arguments of one call.
        kwargs: the others.
        output: what it gave.

    Raises:
        InputError: when it cannot be told.
    """
    inputs = {name: value for name, value in named_arguments(module, args, kwargs).items() if isinstance(value, Tensor)}
    outputs = (output,) if isinstance(output, Tensor) else output
    kind = type(module).__name__
    if not isinstance(outputs, tuple | list):
        raise InputError(f"{kind} returns {type(output).__name__}; a block returns a tensor or a tuple of them")
    tensors = {position: value for position, value in enumerate(outputs) if isinstance(value, Tensor)}
    main = main_input(inputs)
    if isinstance(output, Tensor) and main is not None:
        streams: Streams = ((main, 0),)
    else:
        streams = _of_tuple(module, inputs, tensors)
    streams = tuple((name, position) for name, position in streams if position in tensors and name in inputs)
    unlike = [(name, position) for name, position in streams if inputs[name].shape != tensors[position].shape]
    if unlike or len(streams) != len(tensors):
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        given = [tuple(value.shape) for value in tensors.values()]
        raise InputError(f"{kind} turns {shapes} into {given}; fewstep cannot tell which output continues which input")
    return streams


@functools.lru_cache(maxsize=256)
def returned_forms(function: Any) -> frozenset[tuple[str, ...] | None]:
    """What a function returns, in each of its return statements: of a tuple the names in it, else None.

    What has no name in a tuple is called by the empty string; nothing is known where there is no source.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    found: set[tuple[str, ...] | None] = set()
    left: list[ast.AST] = list(ast.iter_child_nodes(tree.body[0]))
    while left:
        node = left.pop()
        if isinstance(node, ast.Return):
            items = node.value.elts if isinstance(node.value, ast.Tuple) else None
            names = (item.id if isinstance(item, ast.Name) else "" for item in items or ())
            found.add(None if items is None else tuple(names))
        elif not isinstance(node, ast.FunctionDef | ast.Lambda):
            left.extend(ast.iter_child_nodes(node))
    return frozenset(found)


def _are_blocks(modules: nn.ModuleList) -> bool:
    return len(modules) > 0 and all(_attends(block) for block in modules)


def _attends(block: nn.Module) -> bool:
    if isinstance(block, nn.ModuleList):
        return False
    kinds = (_kind(name.rpartition(".")[2], module) for name, module in block.named_modules())
    return any(kind in ("attention", "cross-attention") for kind in kinds)


def _kind(name: str, module: nn.Module) -> Kind | None:
    """What a module is by its own name; what has no parts is a norm, an activation or a matrix."""
    if "norm" in name or next(module.children(), None) is None:
        return None
    if _ATTENTION.search(name):
        crosses = getattr(module, "is_cross_attention", None)
        if not isinstance(crosses, bool):
            crosses = _CROSS.search(name) is not None
        return "cross-attention" if crosses else "attention"
    return "mlp" if _MLP.search(name) else None


@functools.lru_cache(maxsize=256)
def _positional_names(cls: Any) -> tuple[str, ...]:
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind in by_position)


def _of_tuple(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[int, Tensor]) -> Streams:
    cls: Any = type(module)
    returned = _returned_names(cls)
    if returned and set(returned) <= set(positional_names(module)):
        return tuple((name, position) for position, name in enumerate(returned))
    registered = _registered(cls)
    if registered:
        return registered
    fits = {
        position: [name for name, value in inputs.items() if value.shape == output.shape]
        for position, output in outputs.items()
    }
    if all(len(names) == 1 for names in fits.values()):
        return tuple((names[0], position) for position, names in fits.items())
    return ()


def _returned_names(cls: Any) -> tuple[str, ...]:
    """Names of the variables in the tuple that a forward returns, where it returns one tuple of names."""
    tuples = [form for form in returned_forms(cls.forward) if form is not None]
    return tuples[0] if len(tuples) == 1 else ()


def _registered(cls: type[nn.Module]) -> Streams:
    """What diffusers' registry of blocks says about a class, or about one that it derives from."""
    from diffusers.hooks._helpers import TransformerBlockRegistry

    for base in cls.__mro__:
        try:
            data = TransformerBlockRegistry.get(base)
        except ValueError:
            continue
        positions = {
            data.hidden_states_argument_name: data.return_hidden_states_index,
            data.encoder_hidden_states_argument_name: data.return_encoder_hidden_states_index,
        }
        return tuple((name, position) for name, position in positions.items() if position is not None)
    return ()
