"""Decoders and encoders of transformers as denoisers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .denoiser import Denoiser, DenoiserSpec, Query, at_least_float32

_MASKS = {"sdpa": "bool", "eager": "additive"}
"""How an implementation of attention reads a mask of four dimensions."""


class TransformersDenoiser(Denoiser):
    """A transformers model whose forward takes a mask of four dimensions and position ids.

    The mask is always handed over: without one, or with one of two dimensions, a decoder is causal and says nothing.
    Eager attention adds the mask to its scores, so it gets 0 and the lowest number instead of True and False. A mask
    that is handed over also takes the place of a model's attention in windows, so a canvas has to fit into one.

    Args:
        model: in evaluation mode; its forward takes ``input_ids``, ``attention_mask`` and ``position_ids``.
        spec: what it is.
        keeps_kv: whether its forward takes ``past_key_values``; found out from its signature by default.
        time_argument: the argument of its forward that takes the time, for a time-conditioned one.

    Raises:
        InputError: when the model cannot be asked in this way.
    """

    def __init__(
        self, model: nn.Module, spec: DenoiserSpec, keeps_kv: bool | None = None, time_argument: str = "timesteps"
    ) -> None:
        name = type(model).__name__
        taken = inspect.signature(model.forward).parameters
        for argument in ("input_ids", "attention_mask", "position_ids"):
            if argument not in taken:
                raise InputError(
                    f"{name} takes no argument {argument!r}; write a Denoiser of your own, or wrap a function with "
                    "CallableDenoiser"
                )
        config = getattr(model, "config", None)
        attention = getattr(config, "_attn_implementation", "sdpa")
        if attention not in _MASKS:
            raise InputError(
                f"{name} runs {attention} attention, which takes no mask of four dimensions; load it with "
                "attn_implementation='sdpa'"
            )
        if model.training:
            raise InputError(f"{name} is in training mode, where dropout is random; call model.eval() first")
        self.model = model
        self.spec = spec
        self.keeps_kv = "past_key_values" in taken if keeps_kv is None else keeps_kv
        self._additive = _MASKS[attention] == "additive"
        self._takes_keep = "logits_to_keep" in taken
        self._takes_use_cache = "use_cache" in taken
        self._time_argument = time_argument
        self._window: int | None = getattr(config, "sliding_window", None)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def forward(self, query: Query) -> Tensor:
        """Logits at the wanted entries."""
        keys = query.attend.shape[2]
        if self._window is not None and keys > self._window:
            raise InputError(
                f"{type(self.model).__name__} attends in windows of {self._window} positions, and the canvas has "
                f"{keys}; decode at most {self._window} positions, prompt and answer together"
            )
        arguments: dict[str, Any] = dict(query.cond)
        if query.time is not None:
            arguments[self._time_argument] = query.time.to(next(self.model.parameters()).dtype)
        if query.store is not None:
            arguments["past_key_values"] = query.store
        if self._takes_use_cache:
            arguments["use_cache"] = query.store is not None
        wanted = query.wanted
        if self._takes_keep:
            kept = wanted.any(0).nonzero()[:, 0]
            arguments["logits_to_keep"] = kept
            wanted = wanted[:, kept]
        output = self.model(
            input_ids=query.tokens,
            attention_mask=self._mask(query.attend),
            position_ids=query.positions,
            **arguments,
        )
        return at_least_float32(output.logits[wanted][:, : self.spec.vocab_size])

    def _mask(self, attend: Tensor) -> Tensor:
        """(R, 1, Q, K), as the model's attention reads it."""
        if not self._additive:
            return attend[:, None]
        dtype = next(self.model.parameters()).dtype
        return torch.zeros(attend.shape, dtype=dtype, device=attend.device).masked_fill_(
            ~attend, torch.finfo(dtype).min
        )[:, None]
