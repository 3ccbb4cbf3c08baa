"""What a role of a distillation can be, and whether a set of roles is possible on a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..samplers.errors import InputError, unknown_name
from .lora import LoraSetting, adapted_layers, adapter_layers


@dataclass(frozen=True)
class FullCopy:
    """A role with all weights of its own: the base's, copied in float32, and trained."""


@dataclass(frozen=True)
class Adapter:
    """A role that is a trained adapter on the base, whose weights it shares.

    Attributes:
        lora: rank, scale and layers.
    """

    lora: LoraSetting


@dataclass(frozen=True)
class Base:
    """A role that is the base as it was given, with no adapter: a frozen teacher that costs no memory."""


@dataclass(frozen=True)
class Ema:
    """A role whose weights are the moving average of another's, in float32; ``Roles.update_ema`` moves them.

    Attributes:
        of: name of a trained role.
    """

    of: str


@dataclass(frozen=True)
class Extra:
    """A role that is a module of its own and trained: heads of a discriminator, a student of another architecture.

    Attributes:
        module: used as it is.
    """

    module: nn.Module


Kind = FullCopy | Adapter | Base | Ema | Extra


def lora_setting(kinds: Mapping[str, Kind], kind: Kind) -> LoraSetting | None:
    """What the adapter of a role was made with; None for roles that are neither adapters nor averages of one."""
    source = kinds[kind.of] if isinstance(kind, Ema) else kind
    return source.lora if isinstance(source, Adapter) else None


def checked_layers(base: nn.Module, kinds: Mapping[str, Kind]) -> dict[str, tuple[str, ...]]:
    """The layers that each adapter adapts, by role, after all checks.

    Raises:
        InputError: for a base that carries adapters, a name that is no identifier or that torch keeps for itself, an
            average of a role that is not trained, or layers that cannot be adapted.
    """
    if adapter_layers(base):
        raise InputError(f"{type(base).__name__} already carries adapters; fuse or unload them first")
    layers = {}
    for name, kind in kinds.items():
        if not name.isidentifier():
            raise InputError(f"a role's name is letters, digits and underscores; got {name!r}")
        if isinstance(kind, Ema):
            if kind.of not in kinds:
                raise unknown_name(f"role that {name!r} averages:", kind.of, kinds)
            if not isinstance(kinds[kind.of], FullCopy | Adapter | Extra):
                raise InputError(f"role {name!r} averages {kind.of!r}, which is not trained; average a trained role")
        setting = lora_setting(kinds, kind)
        if setting is not None:
            if hasattr(nn.ModuleDict(), name):
                raise InputError(f"torch does not let an adapter be called {name!r}; give the role another name")
            layers[name] = adapted_layers(base, setting)
    return layers
