"""Recipes as schedulers of stock diffusers pipelines of tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from diffusers import AmusedPipeline, BlockRefinementScheduler, LLaDA2Pipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_amused import AmusedSchedulerOutput
from diffusers.schedulers.scheduling_block_refinement import BlockRefinementSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..errors import InputError
from .denoiser import CallableDenoiser, DenoiserSpec
from .loop import choose, commit, enter_blocks, propose, wanted_by
from .recipe import RECIPES, Recipe
from .slots import Choice, Exit
from .state import DecodeState

_SETTINGS = (
    "temperature",
    "top_p",
    "top_k",
    "sampling_method",
    "threshold",
    "editing_threshold",
    "minimal_topk",
)
"""Arguments of a pipeline's call that its own scheduler reads and a recipe says otherwise."""


class TokenScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A recipe's policies in the place of the scheduler of `LLaDA2Pipeline` or `AmusedPipeline`.

        pipe.scheduler = TokenScheduler(recipe, block_length=32)                    # LLaDA2Pipeline
        pipe.scheduler = TokenScheduler(recipe, mask_token_id=8255)                 # AmusedPipeline

    Unmask and remask policies, logits processors without further evaluations, exits that commit everything, and the
    proposal work as in `decode`, row by row; seeds of the rows are drawn from the call's ``generator``. The pipeline
    owns the network, the blocks and the end: caches, block schedules, guidance by the recipe, early ends, constraints
    and scorers are refused. It still evaluates everything before the end of the block in every step; `decode` need not.

    ``num_inference_steps`` is the most steps (per block, for LLaDA2); the last one commits everything that is left.
    A block or a picture that is complete earlier takes no further steps.

    Args:
        recipe: how to decode, its name, or its data.
        block_length: positions in a block, where the pipeline asks for it.
        mask_token_id: the mask's id, where the pipeline asks for it.
        eos_token_id: the id that ends an answer, for policies that look at it.

    Raises:
        InputError: when the recipe has something that the pipeline owns.
    """

    order = 1
    config_name: ClassVar[str] = "scheduler_config.json"
    check_eos_finished = staticmethod(BlockRefinementScheduler.check_eos_finished)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        recipe: Any = "fast-dllm",
        block_length: int = 32,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
    ) -> None:
        if isinstance(recipe, str):
            recipe = RECIPES[recipe].replace(blocks={"type": "whole"})
        elif not isinstance(recipe, Recipe):
            recipe = Recipe.from_json(recipe, "the scheduler's recipe")
        self.recipe: Recipe = recipe
        _check(self.recipe)
        self.register_to_config(recipe=self.recipe.to_json(), _use_default_values=[])
        self.num_inference_steps = 1
        self.timesteps: _WhileMasked = _WhileMasked(self, 1, None)
        self._state: DecodeState | None = None

    def set_timesteps(
        self, num_inference_steps: int, temperature: Any = None, device: Any = None, block_length: int | None = None
    ) -> None:
        """Takes the most steps; the pipelines call this.

        Args:
            num_inference_steps: of a call, or of each block.
            temperature: of aMUSEd's choice of masks; only its default, as the recipe says how to choose.
            device: of the timesteps.
            block_length: not needed.

        Raises:
            InputError: when a temperature is given, or no steps are left.
        """
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps counts steps; got {num_inference_steps}")
        if temperature is not None:
            _check_settings(AmusedPipeline, {"temperature": temperature})
        self.num_inference_steps = num_inference_steps
        self.timesteps = _WhileMasked(self, num_inference_steps, device)
        self._state = None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        prompt_mask: Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """One step of the recipe.

        Args:
            model_output: logits, (B, b, V) of a block or (B, V, height, width) of a picture.
            timestep: counts steps of a block from 0 up (LLaDA2), or of the call down to 0 (aMUSEd).
            sample: int64, (B, b) or (B, height, width).
            mask_token_id: the mask's id; that of the scheduler by default.
            generator: seeds of the rows are drawn from it when a block or a picture begins.
            return_dict: False for a tuple.
            prompt_mask: not needed: what is no mask when a block begins is left alone.
            settings: further arguments of `LLaDA2Pipeline`, which have to be at their defaults.

        Returns:
            diffusers' output of the scheduler that this one stands for.

        Raises:
            InputError: when a setting of the call contradicts the recipe, or no mask is known.
        """
        _check_settings(LLaDA2Pipeline, settings)
        picture = sample.ndim == 3
        x, logits = (sample.flatten(1), model_output.flatten(2).transpose(1, 2)) if picture else (sample, model_output)
        mask_id = self.config.mask_token_id if mask_token_id is None else mask_token_id
        if mask_id is None:
            raise InputError("the scheduler needs the mask's id; make it with mask_token_id=...")
        step = self.num_inference_steps - 1 - int(timestep) if picture else int(timestep)
        ends = () if self.config.eos_token_id is None else (self.config.eos_token_id,)
        spec = DenoiserSpec(mask_id=int(mask_id), vocab_size=logits.shape[-1], eos_ids=ends)
        state = self._enter(x, spec, step, generator)
        before = state.x
        committed, rewritten, proposed = self._advance(state, logits, last=step + 1 >= self.num_inference_steps)
        if picture:
            clean = torch.where(before == mask_id, proposed, before)
            shown = state.x.view_as(sample), clean.view_as(sample)
            return AmusedSchedulerOutput(*shown) if return_dict else shown
        chosen = logits.softmax(-1).gather(-1, proposed.clamp(max=logits.shape[-1] - 1)[..., None])[..., 0]
        output = (state.x, committed, rewritten, proposed, chosen, model_output)
        return BlockRefinementSchedulerOutput(*output) if return_dict else output

    def check_block_should_continue(self, step_idx: int, finished: Tensor, **unused: Any) -> bool:
        """Whether a row that has not ended has masks left; `LLaDA2Pipeline` asks."""
        return self._state is not None and bool((self._state.alive & ~finished.to(self._state.alive.device)).any())

    def add_noise(self, *arguments: Any, **unused: Any) -> Tensor:
        """Not for recipes, which start from masks.

        Raises:
            InputError: always.
        """
        raise InputError("a recipe fills in masks from the first step on; to start midway use the pipeline's scheduler")

    def _enter(self, x: Tensor, spec: DenoiserSpec, step: int, generator: torch.Generator | None) -> DecodeState:
        """The state of this block or picture, with the tokens that the pipeline kept."""
        state = self._state
        if step == 0 or state is None or state.x.shape != x.shape:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**62, (x.shape[0],), generator=generator, device=device).tolist()
            state = DecodeState(
                spec=spec, recipe=self.recipe, x=x, first=torch.zeros_like(x[:, 0]), answer=0, seeds=tuple(seeds)
            )
            self.recipe.suits(CallableDenoiser(_owned, spec, x.device))
            for policy in self.recipe.policies:
                policy.begin(state)
            self._state = state
        state.x = x.clone()
        state.alive = state.masked.any(1) | (state.alive & state.held)
        return state

    def _advance(self, state: DecodeState, logits: Tensor, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Positions (B, b) that are committed, and rewritten, and the proposed tokens."""
        before = state.x
        if not bool(state.alive.any()):
            return torch.zeros_like(before, dtype=torch.bool), torch.zeros_like(before, dtype=torch.bool), before
        enter_blocks(state)
        state.known = wanted_by(state)
        rows, columns = state.known.nonzero(as_tuple=True)
        state.at = rows, columns
        state.raw = logits[state.at].float() if logits.dtype in (torch.float16, torch.bfloat16) else logits[state.at]
        propose(state)
        proposed = state.x0
        commit(state, Choice(state.candidates, state.x0) if last else choose(state))
        masks = before == state.spec.mask_id
        return masks & state.changed, ~masks & state.changed, torch.where(state.changed, state.x, proposed)


class _WhileMasked:
    """Timesteps of a picture, n - 1 down to 0, which end when no mask is left."""

    def __init__(self, scheduler: TokenScheduler, steps: int, device: Any) -> None:
        self._scheduler = scheduler
        self._steps = torch.arange(steps, device=device).flip(0)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Tensor]:
        for step in self._steps:
            yield step
            state = self._scheduler._state
            if state is not None and not bool(state.alive.any()):
                return


def _check(recipe: Recipe) -> None:
    """Refuses what a pipeline owns.

    Raises:
        InputError: with the reason.
    """
    refused = {
        f"the {recipe.cache.type} cache": (recipe.cache.type != "none", "the pipeline evaluates everything itself"),
        f"the {recipe.blocks.type} block schedule": (
            recipe.blocks.type != "whole",
            "the pipeline walks through the blocks; use blocks whole, and the pipeline's block_length",
        ),
        "guidance": (bool(recipe.branches), "the pipeline owns the evaluations; use its own guidance_scale"),
        f"the {recipe.exit.type} exit": (type(recipe.exit).ends is not Exit.ends, "the pipeline ends rows itself"),
        f"the {recipe.constraint.type} constraint": (
            recipe.constraint.type != "none",
            "a scheduler does not see the whole answer",
        ),
        f"the {recipe.scorer.type} scorer": (recipe.scorer.type != "none", "a scheduler does not see the prompt"),
    }
    for what, (present, reason) in refused.items():
        if present:
            raise InputError(f"{what} cannot work as a scheduler: {reason}; decode() runs the whole recipe")


def _check_settings(pipeline: Any, settings: dict[str, Any]) -> None:
    """Refuses arguments of a call that a recipe says otherwise, where they are not the pipeline's defaults.

    Raises:
        InputError: when one is not.
    """
    defaults = inspect.signature(pipeline.__call__).parameters
    for name, value in settings.items():
        if name not in _SETTINGS or name not in defaults:
            raise InputError(f"the scheduler takes no {name}={value!r}; a recipe fills in masks from the first step on")
        if value != defaults[name].default:
            raise InputError(f"{name}={value!r} contradicts the recipe of the scheduler; say it in the recipe")


def _owned(tokens: Tensor, **unused: Any) -> Tensor:
    raise NotImplementedError("the pipeline evaluates the network")
