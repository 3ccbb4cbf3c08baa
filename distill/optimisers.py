"""One optimiser per role: made, stepped, and its state as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..samplers.errors import InputError
from .gradients import average_gradients, clip_gradients, spread_overflow
from .loop_options import LoopOptions
from .shards import Share, cpu_copy, own_part

_COUNT = "#"


class RoleOptimiser:
    """The optimiser of one role's parameters.

    Args:
        role: its name.
        parameters: by name, in float32.
        options: of the run.

    Raises:
        InputError: when the role trains nothing, or half-precision parameters, or bitsandbytes is missing.
    """

    def __init__(self, role: str, parameters: Mapping[str, nn.Parameter], options: LoopOptions) -> None:
        if not parameters:
            raise InputError(f"the role {role!r} has no parameter to train; the method updates it")
        for name, parameter in parameters.items():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                kind = str(parameter.dtype).removeprefix("torch.")
                raise InputError(f"{role}: {name} is {kind}; train float32 weights and set --mixed_precision")
        self.role = role
        self.parameters = dict(parameters)
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Forgets all moments."""
        options = self._options
        self.optimiser = optimiser_class(options)(
            list(self.parameters.values()),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.adam_weight_decay,
            **({"fused": True} if self._fusible() else {}),
        )

    def _fusible(self) -> bool:
        """Whether torch's AdamW can go over weights and moments once, in a third of the time on a CPU.

        It goes by memory, so that gradients have to lie as their weights do: backward passes and averages over
        processes leave those of contiguous weights so.
        """
        options = self._options
        return (
            options.optimizer == "adamw"
            and not options.use_8bit_adam
            and all(
                value.is_contiguous() and value.device.type in ("cpu", "cuda") and not isinstance(value, Share)
                for value in self.parameters.values()
            )
        )

    def gather(self, accelerator: Accelerator) -> Tensor:
        """Makes the gradients ready for `step`: averaged over the processes, unscaled, clipped.

        Returns:
            Their norm before clipping, a scalar.
        """
        parameters = list(self.parameters.values())
        cut = [parameter for parameter in parameters if isinstance(parameter, Share)]
        average_gradients([parameter for parameter in parameters if not isinstance(parameter, Share)], accelerator)
        if accelerator.scaler is not None:
            spread_overflow(cut)
            accelerator.scaler.unscale_(self.optimiser)
        limit = self._options.max_grad_norm or math.inf
        if cut:
            return clip_gradients(parameters, limit)
        return nn.utils.clip_grad_norm_(parameters, limit).detach()

    def step(self, rate: float, scaler: torch.amp.GradScaler | None) -> None:
        """One update with the learning rate ``rate``; the gradients are gone then."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if scaler is None:
            self.optimiser.step()
        else:
            scaler.step(self.optimiser)
        self.optimiser.zero_grad(set_to_none=True)

    def broken(self, accelerator: Accelerator) -> str | None:
        """The name of a parameter that is not finite in some process, if there is one; all processes ask."""
        bad = torch.stack([1.0 - torch.isfinite(value).all().float() for value in self.parameters.values()])
        anywhere = accelerator.reduce(bad, "sum").tolist()
        return next((name for name, flag in zip(self.parameters, anywhere, strict=True) if flag), None)

    def state(self) -> dict[str, Tensor]:
        """The moments on the CPU, ``<parameter>/<moment>``; plain numbers become float64 scalars.

        All processes ask for them where parameters are cut over them (`shards.cpu_copy`).
        """
        tensors = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = cpu_copy(value, parameter)
                else:
                    tensors[f"{name}/{key}{_COUNT}"] = torch.tensor(value, dtype=torch.float64)
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave for the same parameters."""
        places = {name: place for place, name in enumerate(self.parameters)}
        moments: dict[int, dict[str, Any]] = {}
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("/")
            value = int(tensor) if key.endswith(_COUNT) else own_part(tensor, self.parameters[parameter])
            moments.setdefault(places[parameter], {})[key.removesuffix(_COUNT)] = value
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})


def optimiser_class(options: LoopOptions) -> Any:
    """The class of all optimisers of a run.

    Raises:
        InputError: when bitsandbytes is needed and missing, or has no such optimiser.
    """
    if not options.use_8bit_adam:
        return {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[options.optimizer]
    if options.optimizer != "adamw":
        raise InputError(f"--use_8bit_adam is for --optimizer adamw, not {options.optimizer}; leave one of them out")
    try:
        return import_module("bitsandbytes").optim.AdamW8bit
    except ImportError:
        raise InputError("--use_8bit_adam needs the package bitsandbytes; install it or leave the flag out") from None
