"""A student that begins with the weights of another student, and not with its teacher's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..eval.assets import plan_file
from ..samplers import LoraWeights, Plan, Run, StudentWeights
from ..samplers.errors import InputError
from ..samplers.lora_file import low_rank_shapes, read_lora
from ..samplers.substitute import load_network, own_network
from .lora import LoraSetting
from .method import Method
from .role_kinds import Ema, checked_layers
from .shards import own_part
from .team import Cast, Team


def read_beginning(pipe: Any, path: Path, method: Method, cast: Cast, lora: LoraSetting | None) -> dict[str, Tensor]:
    """The weights of a student, as those of one that is to go on from there.

    Args:
        pipe: the teacher's pipeline.
        path: a plan of the student: with a network beside it for one with all weights, with a LoRA for an adapter.
        method: that goes on.
        cast: its roles, before they are made.
        lora: the adapter that is to begin; None where all weights are trained.

    Returns:
        Parameters by the names that `Team.trainable` has for them.

    Raises:
        InputError: when the plan has no weights of this kind and shape, or the method has several students.
    """
    if len(method.students) > 1:
        raise InputError(f"{method.type} trains {len(method.students)} students at once; leave --student out")
    plan = Plan.load(plan_file(path))
    if len(plan.weights) != 1:
        raise InputError(f"--student {path} has {len(plan.weights)} parts of weights; give the plan of one student")
    run, part = Run(pipe, copy.deepcopy(pipe.scheduler), folder=plan.folder), plan.weights[0]
    found = _adapter(run, part, path, lora) if isinstance(part, LoraWeights) else _network(run, part, path, lora)
    there, here = _sizes(found), _shapes(cast, lora)
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise InputError(
                f"--student {path} has {name} as {there.get(name)}, and this student as {here.get(name)}; give one of "
                "the same network, and of an adapter the same --lora_rank and --lora_targets"
            )
    return found


@torch.no_grad()
def begin(team: Team, tensors: Mapping[str, Tensor]) -> None:
    """Puts weights in the student of a team, and in the averages of it.

    Args:
        team: of the cast that the tensors were read for.
        tensors: of `read_beginning`.
    """
    for name, parameter in team.trainable("student").items():
        parameter.copy_(own_part(tensors[name], parameter))
    for name, kind in team.roles.kinds.items():
        if isinstance(kind, Ema) and kind.of == "student":
            team.update_ema(name, 0.0)


def _network(run: Run, part: Any, path: Path, lora: LoraSetting | None) -> dict[str, Tensor]:
    """All weights of a student."""
    if not isinstance(part, StudentWeights):
        raise InputError(f"--student {path} has weights of type {part.type}; give a student's or a LoRA's plan")
    if lora is not None:
        raise InputError(f"--student {path} has all weights, and this one is an adapter; give --lora_rank 0")
    _, own = own_network(run.pipe, "student", part.component)
    return dict(load_network(run, "student", part.folder, own).named_parameters())


def _adapter(run: Run, part: LoraWeights, path: Path, lora: LoraSetting | None) -> dict[str, Tensor]:
    """The adapter of a student, for one of another alpha as well."""
    if lora is None:
        raise InputError(f"--student {path} is an adapter, and this student has all weights; give its --lora_rank")
    found = {}
    for name, layer in read_lora(run, part.file).layers.items():
        found[f"{name}.lora_A.weight"] = layer.down
        found[f"{name}.lora_B.weight"] = layer.up * (part.scale * layer.scaling * lora.rank / lora.alpha)
    return found


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _shapes(cast: Cast, lora: LoraSetting | None) -> dict[str, tuple[int, ...]]:
    """Of the parameters that the student of a cast will train, by name."""
    if lora is None:
        return _sizes(dict(cast.network.named_parameters()))
    shapes: dict[str, tuple[int, ...]] = {}
    for name in checked_layers(cast.network, cast.kinds)["student"]:
        weight: Any = cast.network.get_submodule(name).weight
        shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = low_rank_shapes(weight.shape, lora.rank)
    return shapes
