"""One network for some steps, another one for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from .call import CallHook
from .errors import InputError, unknown_name
from .files import read_json
from .models import MODELS
from .network import Evaluation, denoisers
from .part import Part, Run

SELF = "self"
"The pipeline's own network, by this name in a plan."

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


@MODELS.register("model-switch")
class ModelSwitch(Part):
    """Which network runs which steps: Hybrid SD (arXiv:2408.06646), big first, small for the rest.

    A network is ``self`` (the pipeline's own), one handed over with ``attach(..., resources={name: network})``, or a
    folder beside the plan. They share the scheduler, whose multistep history carries over, the autoencoder and the
    encoders. That all of them predict the same thing (epsilon, v, ...) is not written in a network and cannot be
    checked: a network of another prediction type gives noise.
    """

    type: Literal["model-switch"] = "model-switch"
    networks: tuple[str, ...] = Field(min_length=1, description="Names of networks, in the order in which they run.")
    steps: tuple[int, ...] = Field(
        default=(),
        description="Positions in the scheduler's timesteps, from 0, where the next network takes over.",
    )
    times: tuple[float, ...] = Field(
        default=(),
        description="Instead of steps: the next network takes over at the first step whose timestep is at most this.",
    )
    folders: dict[str, str] = Field(
        default_factory=dict, description="Folders of networks (config.json, safetensors) within the plan's, by name."
    )
    component: str | None = Field(
        default=None, description="Which denoiser of the pipeline is switched; null where it has one."
    )

    @model_validator(mode="after")
    def _consistent(self) -> ModelSwitch:
        if self.steps and self.times:
            raise ValueError("give steps or times, not both")
        borders = self.steps or self.times
        if len(borders) != len(self.networks) - 1:
            raise ValueError(
                f"{len(self.networks)} networks need {len(self.networks) - 1} steps or times; got {len(borders)}"
            )
        if any(after <= before for before, after in pairwise(self.steps)) or (self.steps and self.steps[0] < 0):
            raise ValueError(f"steps must increase from 0 or more; got {list(self.steps)}")
        if any(after >= before for before, after in pairwise(self.times)):
            raise ValueError(f"times must decrease; got {list(self.times)}")
        for name in self.folders:
            if name not in self.networks or name == SELF:
                raise ValueError(f"folder {name!r} is for no network of this part; it has {list(self.networks)}")
        return self

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return tuple(self.folders.values())

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Finds and checks the networks and adds the hook.

        Raises:
            InputError: when a network is missing, or does not fit where the pipeline's own one does.
        """
        component, own = self._own(run.pipe)
        device = getattr(run.pipe, "_execution_device", None) or next(own.parameters()).device
        found: dict[str, nn.Module] = {}
        for name in self.networks:
            if name == SELF:
                continue
            if name in self.folders:
                found[name] = _load(run, self.folders[name], own).to(device)
            else:
                found[name] = run.resource("model-switch", name)
            _check(name, found[name], own, torch.device(device))
        run.hooks.append(lambda: _Switch(self, component, found))

    def network_of(self, index: int, time: float) -> str:
        """The name of the network that runs a step.

        Args:
            index: the step's position in the scheduler's timesteps.
            time: its timestep.
        """
        passed = sum(index >= step for step in self.steps) + sum(time <= border for border in self.times)
        return self.networks[passed]

    def _own(self, pipe: Any) -> tuple[str, nn.Module]:
        candidates = denoisers(pipe)
        if self.component is not None:
            if self.component not in candidates:
                raise unknown_name("denoiser of the pipeline", self.component, candidates)
            return self.component, candidates[self.component]
        if len(candidates) > 1:
            raise InputError(
                f"{type(pipe).__name__} has the denoisers {', '.join(candidates)}; "
                "name one as component of the model-switch part"
            )
        return next(iter(candidates.items()))


@dataclass
class _Switch(CallHook):
    part: ModelSwitch
    component: str
    networks: dict[str, nn.Module]

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Has the network of this step evaluated."""
        name = self.part.network_of(evaluation.index, evaluation.time)
        if evaluation.component == self.component and name != SELF:
            evaluation = replace(evaluation, component=name, network=self.networks[name])
        return proceed(evaluation)


def _load(run: Run, folder: str, own: nn.Module) -> nn.Module:
    """The network in a folder beside the plan, of the class and dtype of ``own``."""
    config = run.file("model-switch", f"{folder}/config.json")
    for file in _files(config.parent):
        run.file("model-switch", f"{folder}/{file}")
    cls: Any = type(_inner(own))
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


def _inner(network: nn.Module) -> nn.Module:
    """The network that a compiled one wraps, or itself."""
    inner: nn.Module = getattr(network, "_orig_mod", network)
    return inner


def _check(name: str, other: Any, own: nn.Module, device: torch.device) -> None:
    """Raises ``InputError`` where ``other`` cannot stand in for ``own``."""
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
    for entry in MUST_AGREE:
        here, there = (getattr(_inner(network), "config", {}).get(entry) for network in (own, other))
        if here is not None and there is not None and here != there:
            raise InputError(f"network {name!r} has {entry}={there!r} and the pipeline's own {here!r}; they must agree")
    takes = inspect.signature(type(_inner(other)).forward).parameters
    wanted = inspect.signature(type(_inner(own)).forward).parameters
    for argument in wanted:
        if argument not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise InputError(f"network {name!r} takes no {argument!r}, which the pipeline's own one does")
