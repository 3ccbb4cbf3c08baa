"""The caches that diffusers has, named in a plan, safe for branches of guidance, threads and aborted calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import diffusers.hooks
from pydantic import Field, model_validator
from torch import nn

from .cache import CACHES, CachePart
from .errors import InputError, unknown_name
from .host_call import Clock, Hooks, HostHook, hooks_of, outline
from .host_faster import BranchOrder
from .host_kinds import KINDS, Kind, read_options, refuse_compiled, refuse_shared
from .network import denoisers
from .part import Run
from .schedules import FlowSchedule, InvertedFlowSchedule

SUGGESTED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("FirstBlockCacheConfig", {"threshold": 0.1}),
    (
        "PyramidAttentionBroadcastConfig",
        {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [-1, 1001]},
    ),
)
"Settings that need no knowledge of the network, the first choice first."


@CACHES.register("host")
class HostCache(CachePart):
    """One of diffusers' caches, by the class name of its configuration.

    First-block cache and its kin, TaylorSeer (arXiv:2503.06923), MagCache (arXiv:2506.09045), SeaCache
    (arXiv:2602.18993), FasterCache (arXiv:2410.19355), pyramid attention broadcast (arXiv:2408.12588) and the text
    K/V cache run as diffusers wrote them, with these differences:

    * Nothing is installed on the network. What they keep belongs to one call, also when it raises.
    * Each branch of guidance has its own state, whether or not the pipeline sets a cache context, and starts anew
      where a guidance window left evaluations out.
    * They are told the time and the step of the call, and MagCache the number of steps.
    * A network on which diffusers would do nothing, or fail, is refused with the reason.

    First-block cache and SeaCache decide for a batch as a whole: a sample depends on its batch mates.
    """

    type: Literal["host"] = "host"
    config: str = Field(description="Class of diffusers' configuration, such as FirstBlockCacheConfig.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Its fields that differ from the defaults; types by name, no functions."
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.config not in KINDS:
            raise unknown_name("cache of diffusers", self.config, KINDS)
        read_options(self.config, self.options)
        return self

    @property
    def kind(self) -> Kind:
        """The cache of diffusers."""
        return KINDS[self.config]

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> Self:
        """The first setting that works on a pipeline without knowledge of it.

        Raises:
            InputError: when none does.
        """
        reasons = []
        for config, options in SUGGESTED:
            part = cls(config=config, options=options)
            try:
                part.modules(pipe)
            except InputError as error:
                reasons.append(str(error))
                continue
            return part
        raise InputError("; ".join(reasons))

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """Names of the modules that diffusers hooks.

        Raises:
            InputError: when it cannot work on this network, would do nothing there, or a cache is there already.
        """
        options = read_options(self.config, self.options)
        steps = options.get("num_inference_steps", 1)
        return tuple(filter(None, self._hooks(network, Clock(), steps)))

    def computes(self, steps: int) -> tuple[bool, ...] | None:
        """Known for TaylorSeer, and for pyramid broadcast where its ranges hold all times.

        Raises:
            InputError: when MagCache is for another number of steps.
        """
        return self.kind.computes(read_options(self.config, self.options), steps)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Finds the modules and adds the hook; FasterCache also looks at what the scheduler is given.

        Raises:
            InputError: when the cache works on no network of the pipeline, for another number of steps, or with
                another kind of process.
        """
        super().prepare(run, known_arguments)
        if self.config == "SeaCacheConfig":
            schedule = run.process.schedule
            if not isinstance(schedule, FlowSchedule) or isinstance(schedule, InvertedFlowSchedule):
                raise InputError(
                    f"SeaCacheConfig filters by the noise level of flow matching; {type(run.scheduler).__name__} is of "
                    "another process; use another cache"
                )
        if self.config == "FasterCacheConfig" and not self.options.get("is_guidance_distilled"):
            run.hooks.append(BranchOrder)
        if self.kind.by_batch:
            run.warnings.append(
                f"{self.config} decides for a batch as a whole: a sample depends on its batch mates; the 'gate' cache "
                "decides for each sample"
            )

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> HostHook:
        """Diffusers' hooks, made anew for one call."""
        reached = {name.partition(".")[0] for name in modules}
        networks = {component: network for component, network in denoisers(run.pipe).items() if component in reached}
        return self.kind.hook(self.config, modules, networks, run.scheduler, self._hooks)

    def _hooks(self, network: nn.Module, clock: Clock, steps: int) -> Hooks:
        """The hooks that diffusers registers for a network, on an outline of it.

        Raises:
            InputError: as ``reach`` and ``computes`` do.
        """
        self.computes(steps)
        refuse_shared(network)
        options = read_options(self.config, self.options)
        copy = outline(network)
        cls = getattr(diffusers.hooks, self.config)
        told = {
            "num_inference_steps": steps,
            "current_timestep_callback": clock.read,
            "attention_weight_callback": _half,
        }
        try:
            self.kind.check(copy, options)
            config = cls(**options | {name: told[name] for name in told.keys() & cls.__dataclass_fields__})
            getattr(diffusers.hooks, self.kind.apply)(copy, config)
            hooks = hooks_of(copy)
            self.kind.check_hooks(copy, options, hooks)
        except ValueError as error:
            raise InputError(f"{self.config}: {error}") from None
        refuse_compiled(network, hooks)
        return hooks


def _half(module: nn.Module) -> float:
    """The weight of FasterCache's attention that diffusers falls back to, and warns about in every call."""
    return 0.5
