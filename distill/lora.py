"""Low-rank adapters: which layers they adapt, and how they are put on a network."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..samplers.errors import InputError, unknown_name
from ..samplers.stacks import block_names

UNET_LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"The layers of a U-Net that latent consistency LoRAs adapt (arXiv:2311.05556): all but the first and the last."

_MODULATION = re.compile(r"norm|ada|modul|scale_shift")
_EMBEDDING = re.compile(r"emb")


@dataclass(frozen=True)
class LoraSetting:
    """A low-rank adapter W + alpha / rank B A of some layers (arXiv:2106.09685, eq. 3).

    Attributes:
        rank: of the product B A, at least 1.
        alpha: scale of the product, times the rank; above 0.
        targets: names of layers, each the end of a full name (``to_q``, ``blocks.0.attn1.to_q``); none for those of
            ``default_targets``.
        dropout: share of an adapter's inputs that are dropped in training, in [0, 1).

    Raises:
        InputError: for a number out of its range.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"the rank of a LoRA is at least 1; got {self.rank}")
        if not self.alpha > 0:
            raise InputError(f"alpha of a LoRA is above 0; got {self.alpha:g}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the dropout of a LoRA lies in [0, 1); got {self.dropout:g}")


@dataclass(frozen=True)
class Lora:
    """The weights of one adapter.

    Attributes:
        setting: what it was made with.
        tensors: ``LAYER.lora_A.weight`` (rank, inputs) and ``LAYER.lora_B.weight`` (outputs, rank) of each adapted
            layer, with the sizes of the kernel after them for convolutions.
    """

    setting: LoraSetting
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> tuple[str, ...]:
        """Full names of the adapted layers."""
        return tuple(name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight"))


def default_targets(network: nn.Module, modulation: bool = False) -> tuple[str, ...]:
    """The layers that an adapter of ``network`` adapts when none are named, by their full names.

    Of a U-Net those of ``UNET_LAYERS``, less those that AnimateDiff calls as adapters cannot be called; of a
    transformer the layers of attention and feed-forward networks in its blocks, and with ``modulation`` those that
    scale and shift by the condition.

    Raises:
        InputError: when it is neither.
    """
    if isinstance(getattr(network, "up_blocks", None), nn.ModuleList):
        layers = (name for name, module in network.named_modules() if _ends(name, UNET_LAYERS) and _plain(module))
        refused = _by_keyword(network)
        return tuple(name for name in layers if name not in refused)
    found = []
    for block in block_names(network):
        for name, module in network.get_submodule(block).named_modules():
            if _plain(module) and not _EMBEDDING.search(name) and (modulation or not _MODULATION.search(name)):
                found.append(f"{block}.{name}")
    return tuple(found)


def adapted_layers(network: nn.Module, setting: LoraSetting) -> tuple[str, ...]:
    """Full names of the layers that an adapter of this setting adapts, in the order of the network.

    Raises:
        InputError: when a target is in no name, a layer is neither linear nor a convolution of one group, or is called
            as adapters cannot be.
    """
    targets = setting.targets or default_targets(network)
    modules = {name: module for name, module in network.named_modules() if _ends(name, targets)}
    for target in targets:
        if not any(_ends(name, (target,)) for name in modules):
            plain = {name.rpartition(".")[2] for name, module in network.named_modules() if _plain(module)}
            raise unknown_name(f"layer of {type(network).__name__}", target, plain)
    for name, module in modules.items():
        if not _plain(module):
            raise InputError(
                f"a LoRA cannot adapt {name}, a {type(module).__name__}; "
                "name linear layers and convolutions of one group"
            )
    refused = [name for name in _by_keyword(network) if name in modules]
    if refused:
        raise InputError(
            f"a LoRA cannot adapt {refused[0]}, which AnimateDiff calls with input=, an argument that adapters do not "
            "take; name layers by more of their names, or none at all"
        )
    return tuple(modules)


def add_adapter(network: nn.Module, name: str, setting: LoraSetting, layers: tuple[str, ...]) -> None:
    """Puts an adapter on ``layers``, in float32; it changes nothing yet, because its B is zero.

    Any network will do, also one that diffusers cannot load adapters into.
    """
    config = LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        lora_dropout=setting.dropout,
        target_modules=list(layers),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(config, network, name)
    for parameter in adapter_parameters(network, name).values():
        parameter.data = parameter.data.float()


def adapter_parameters(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one adapter, by the names of ``Lora.tensors``."""
    found = {}
    for layer_name, layer in network.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            found[f"{layer_name}.lora_A.weight"] = layer.lora_A[name].weight
            found[f"{layer_name}.lora_B.weight"] = layer.lora_B[name].weight
    return found


def adapter_layers(network: nn.Module) -> tuple[BaseTunerLayer, ...]:
    """The layers of a network that carry adapters."""
    return tuple(module for module in network.modules() if isinstance(module, BaseTunerLayer))


def _by_keyword(network: nn.Module) -> tuple[str, ...]:
    """Layers that are called as ``layer(input=x)``, where PEFT's know ``x``: the projections of motion modules."""
    modules = [name for name, module in network.named_modules() if isinstance(module, AnimateDiffTransformer3D)]
    return tuple(f"{name}.{layer}" for name in modules for layer in ("proj_in", "proj_out"))


def _ends(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _plain(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
