"""Cross-attention that is frozen after some steps: what the text says about the image no longer changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from .cache import CACHES, CachePart
from .cache_call import CacheHook, Passing
from .errors import InputError
from .network import Evaluation
from .part import Run

NAMES = ("attn2", "audio_attn2", "cross_attn", "cross_attention")
"What diffusers' blocks call the attention that looks at another sequence."

TEXTS = ("encoder_hidden_states", "cap_feats", "context")
"Inputs of networks that hold such a sequence."


@CACHES.register("cross-attention-freeze")
class CrossAttentionFreeze(CachePart):
    """Outputs of cross-attention that are kept from one step on, after T-GATE (arXiv:2404.02747, Section 3.3).

    The outputs of cross-attention settle in the first steps: the text plans the image, and matters little while it is
    refined. The steps before ``after`` compute all of it; the outputs of the last of them serve all that follow.
    Steps are counted from the first one of the call.

    The paper keeps the mean of the outputs of both branches of guidance, and leaves the unconditional branch out from
    then on. Here each branch keeps its own outputs, so guidance stays what it was; a 'guidance' part whose window ends
    at the same step leaves the branch out.

    Works on U-Nets and on transformers whose blocks have an attention module of their own for the text. Transformers
    that attend to text and image in the same modules have nothing to freeze and are refused. Attention to a sequence of
    one token, as in Stable Video Diffusion, says the same in every step: freezing it costs nothing.
    """

    type: Literal["cross-attention-freeze"] = "cross-attention-freeze"
    after: int | None = Field(default=None, ge=1, description="How many steps compute.")
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="Instead of that: the fraction of the steps that compute, rounded up."
    )

    @model_validator(mode="after")
    def _one_limit(self) -> CrossAttentionFreeze:
        if (self.after is None) == (self.fraction is None):
            raise ValueError(f"give one of after and fraction; got after={self.after}, fraction={self.fraction}")
        return self

    @classmethod
    def suggest(cls, pipe: Any, steps: int) -> CrossAttentionFreeze:
        """Half of the steps compute.

        Raises:
            InputError: when no network of the pipeline has cross-attention.
        """
        part = cls(fraction=0.5)
        part.modules(pipe)
        return part

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        """The cross-attention modules.

        Raises:
            InputError: when there are none.
        """
        inner = getattr(network, "_orig_mod", network)
        found = tuple(name for name, module in inner.named_modules() if _is_cross_attention(name, module))
        if found:
            return found
        takes_text = any(name in inspect.signature(type(inner).forward).parameters for name in TEXTS)
        reason = "attends to text and image in the same modules" if takes_text else "attends to no text"
        raise InputError(f"{type(inner).__name__} has no cross-attention: it {reason}")

    def computes(self, steps: int) -> tuple[bool, ...]:
        """Of each of ``steps`` steps, whether its cross-attention runs."""
        limit = self.limit(steps)
        return tuple(index < limit for index in range(steps))

    def limit(self, steps: int) -> int:
        """How many of ``steps`` steps compute."""
        if self.after is not None:
            return self.after
        return math.ceil((self.fraction or 1.0) * steps - 1e-9)

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        """What the cache does in one call."""
        return _Freeze(modules, lambda first: self.limit(len(run.scheduler.timesteps) - first))


def _is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a module attends to another sequence alone; diffusers' own class says so, others by their name."""
    flag = getattr(module, "is_cross_attention", None)
    if name.rsplit(".", 1)[-1] in NAMES:
        return flag is not False
    return flag is True and getattr(module, "added_kv_proj_dim", None) is None


class _Freeze(CacheHook):
    def __init__(self, modules: Mapping[str, nn.Module], limit: Callable[[int], int]) -> None:
        super().__init__(modules)
        self.find_limit = limit
        self.first: int | None = None
        self.limit = 0
        self.asked: dict[str, int] = {}

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Counts from the first step of the call."""
        if self.first is None:
            self.first = evaluation.index
            self.limit = self.find_limit(self.first)
        self.asked = {}
        return proceed(evaluation)

    def pass_module(self, passing: Passing) -> Any:
        """Runs a module, or answers with what it gave in the last step that computed."""
        evaluation, count = passing.evaluation, passing.evaluation.index - (self.first or 0)
        if count < self.limit - 1:
            return passing.run()
        asked = self.asked.get(passing.name, 0)
        self.asked[passing.name] = asked + 1
        key = f"{passing.name} {asked}"
        if count >= self.limit:
            kept = self.memory.recall(key, evaluation)
            if kept is not None:
                return kept
        output = passing.run()
        self.memory.keep(key, output, evaluation)
        return output
