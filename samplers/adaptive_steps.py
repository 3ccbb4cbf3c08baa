"""As many steps as a sample needs, decided from what it is of."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema
from torch import Tensor

from .errors import InputError
from .explicit import grid_adapter
from .explicit_base import GridAdapter
from .grid import GRIDS
from .part import Part, Run, Sampling, Slot
from .samples import count_samples, merge_outputs, select_samples
from .step_policy import embedding_features, label_keys, policy_logits, read_policy, table_choices

NAME = "adaptive-steps"


class _InnerSlot(Slot):
    """A slot whose schema does not list the registry's parts, among which is the one that has the slot."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        names = [name for name in self.registry.names() if name != NAME]
        return {"type": "object", "properties": {"type": {"enum": names}}, "required": ["type"]}


@GRIDS.register(NAME)
class AdaptiveSteps(Part):
    """AdaDiff (arXiv:2311.14768): a policy picks one of several grids for each sample, by its condition.

    The samples of a batch that get the same grid run together. The policy is a table of logits by class (or by
    prompt), or a network over the mean of an embedding, in a file beside the plan; the likeliest choice runs
    (`fewstep.search.adaptive` trains both). With one grid there is nothing to decide, and no policy.
    """

    type: Literal["adaptive-steps"] = "adaptive-steps"
    grids: tuple[Annotated[Part, _InnerSlot(GRIDS)], ...] = Field(
        min_length=1, description="Grid parts, with more steps from one to the next."
    )
    table: dict[str, tuple[float, ...]] | None = Field(
        default=None, description="One logit for each grid, by class label (as text) or prompt."
    )
    policy: str | None = Field(
        default=None, description="Instead of a table: a safetensors file beside the plan with a policy network."
    )
    condition: str | None = Field(
        default=None,
        description="The call's argument that the policy looks at; null for class_labels (table) or prompt_embeds.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> AdaptiveSteps:
        for grid in self.grids:
            if not isinstance(getattr(grid, "nominal_steps", None), int):
                what = "null" if grid is None else f"a {grid.type!r} grid"
                raise ValueError(f"the policy picks from grids with a number of steps; got {what}")
        counts = self.counts
        if any(after <= before for before, after in pairwise(counts)):
            raise ValueError(f"the grids must have more steps from one to the next; got {list(counts)}")
        policies = [name for name in ("table", "policy") if getattr(self, name) is not None]
        if len(policies) != (1 if len(counts) > 1 else 0):
            raise ValueError(
                f"{len(counts)} grids need {'a table or a policy' if len(counts) > 1 else 'neither table nor policy'}; "
                f"got {' and '.join(policies) or 'neither'}"
            )
        for label, logits in (self.table or {}).items():
            if len(logits) != len(counts):
                raise ValueError(f"the table has {len(logits)} logits for {label!r} and there are {len(counts)} grids")
        if self.table == {}:
            raise ValueError("the table is empty; give logits for each class")
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """Steps of the grids."""
        return tuple(getattr(grid, "nominal_steps") for grid in self.grids)  # noqa: B009  not a field of Part

    @property
    def looks_at(self) -> str:
        """The call's argument that the policy looks at."""
        return self.condition or ("class_labels" if self.policy is None else "prompt_embeds")

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return () if self.policy is None else (self.policy,)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Prepares each grid on a scheduler of its own, and decides over the run's calls.

        Raises:
            InputError: when a grid does not run here, the grids need different schedulers, or there is no policy or
                nothing for it to look at.
        """
        prepared = [Run(run.pipe, copy.deepcopy(run.scheduler), folder=run.folder) for _ in self.grids]
        for grid, inner in zip(self.grids, prepared, strict=True):
            grid.prepare(inner, known_arguments)
            run.warnings.extend(sentence for sentence in inner.warnings if sentence not in run.warnings)
        first = prepared[0].scheduler
        for inner in prepared:
            for option, value in first.config.items():
                if not option.startswith("_") and inner.scheduler.config[option] != value:
                    raise InputError(
                        f"the grids of an adaptive-steps part share a scheduler, and need {option}={value!r} and "
                        f"{inner.scheduler.config[option]!r}; make them agree"
                    )
        run.scheduler = first
        tensors = None
        if len(self.grids) > 1 and self.looks_at not in inspect.signature(type(run.pipe).__call__).parameters:
            raise InputError(f"{type(run.pipe).__name__} takes no {self.looks_at!r} for the policy to look at")
        if self.policy is not None:
            tensors = read_policy(run.file(NAME, self.policy), len(self.grids))
        choices = [
            _Choice(inner.call_arguments, None if inner.timesteps is None else grid_adapter(first, inner.timesteps))
            for inner in prepared
        ]
        run.arounds.append(_Buckets(self, choices, tensors))

    def choose(self, values: Any, tensors: Mapping[str, Tensor] | None) -> list[int]:
        """Which grid each sample gets.

        Args:
            values: the condition of the samples: labels, prompts or embeddings.
            tensors: the policy network, where there is one.

        Raises:
            InputError: when the policy does not know a condition.
        """
        if tensors is None:
            return table_choices(self.table or {}, label_keys(values))
        features = embedding_features(values)
        if features.shape[1] != len(tensors["mean"]):
            raise InputError(
                f"the policy looks at {len(tensors['mean'])} features; {self.looks_at} has {features.shape[1]}"
            )
        chosen: list[int] = policy_logits(tensors, features).argmax(1).tolist()
        return chosen


@dataclass(frozen=True)
class _Choice:
    """How one grid runs: what it sets in the call, and the explicit grid if it is one."""

    arguments: dict[str, Any]
    grid: GridAdapter | None


@dataclass(frozen=True)
class _Buckets:
    part: AdaptiveSteps
    choices: list[_Choice]
    tensors: Mapping[str, Tensor] | None

    def __call__(self, arguments: dict[str, Any], sampling: Sampling) -> Any:
        for name in ("num_inference_steps", "timesteps", "sigmas"):
            if arguments.get(name) is not None:
                raise InputError(f"the plan picks the steps; got {name} in the call as well; leave it out")
        if len(self.choices) == 1:
            return self._run(arguments, 0, sampling)
        count = count_samples(NAME, arguments)
        values = arguments.get(self.part.looks_at)
        if values is None:
            raise InputError(f"the adaptive-steps policy looks at {self.part.looks_at}; give it in the call")
        select_samples(NAME, arguments, range(count), count)  # refused whatever the policy says, or never
        chosen = self.part.choose(values, self.tensors)
        if len(chosen) != count:
            raise InputError(f"{self.part.looks_at} has {len(chosen)} entries for {count} samples")
        buckets = {choice: [row for row in range(count) if chosen[row] == choice] for choice in sorted(set(chosen))}
        if len(buckets) == 1:
            return self._run(arguments, chosen[0], sampling)
        outputs = [
            (rows, self._run(select_samples(NAME, arguments, rows, count), choice, sampling))
            for choice, rows in buckets.items()
        ]
        return merge_outputs(outputs, count)

    def _run(self, arguments: dict[str, Any], choice: int, sampling: Sampling) -> Any:
        made = self.choices[choice]
        return sampling.run(arguments | made.arguments, made.grid)
