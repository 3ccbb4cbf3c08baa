"""A LoRA that ships with a plan, added while the pipeline runs and never put into its network."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers.models.attention_processor import Attention
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from .errors import InputError
from .lora_file import CONFIG, PEFT_FILE, LoraLayer, low_rank_shapes, read_lora
from .network import own_class
from .part import Part, Run
from .substitute import inner, own_network
from .weights import WEIGHTS


@WEIGHTS.register("lora")
class LoraWeights(Part):
    """Low-rank weights W + scale alpha / rank B A of some layers (arXiv:2106.09685, eq. 3), from beside the plan.

    ``file`` is what diffusers' ``save_lora_weights`` writes, or the ``adapter_model.safetensors`` of PEFT with its
    ``adapter_config.json``, or the folder of one of them. The outputs are those of ``pipe.load_lora_weights``, bit for
    bit, in the network's dtype (PEFT by itself keeps adapters of a network in half precision in float32). The modules
    of the network stay as they are: the products are added to the outputs of its layers while the pipeline runs, also
    on top of adapters that are loaded already. A scale of LoRAs in the call's own arguments does not reach them.
    Several of these parts add up.
    """

    type: Literal["lora"] = "lora"
    file: str = Field(
        default="pytorch_lora_weights.safetensors", min_length=1, description="File or folder within the plan's."
    )
    component: str | None = Field(
        default=None, description="Which denoiser of the pipeline it adapts; null for the one that the file names."
    )
    scale: float = Field(default=1.0, description="What the product is multiplied with, besides alpha / rank.")

    @field_validator("scale")
    @classmethod
    def _does_something(cls, scale: float) -> float:
        if scale == 0:
            raise ValueError("a scale of 0 adds nothing; leave the part out")
        return scale

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        folder, slash, name = self.file.rpartition("/")
        return (self.file, f"{folder}{slash}{CONFIG}") if name == PEFT_FILE else (self.file,)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Reads the file and checks it against the network.

        Raises:
            InputError: when a tensor of the file cannot be used, or the network's layers cannot be added to.
        """
        lora = read_lora(run, self.file)
        component, network = own_network(run.pipe, "lora", self.component or lora.component)
        if component in run.networks:
            raise InputError(
                f"a student part replaces {component}, and {self.file} is for the pipeline's own; keep one of them"
            )
        _refuse_fused(component, inner(network))
        additions = {}
        for name, layer in lora.layers.items():
            module = _layer(inner(network), name, self.file)
            if module in additions:
                raise InputError(
                    f"{self.file} adapts {name} twice, under two names of one layer; leave one of them out"
                )
            additions[module] = _low_rank(name, layer, module, self.scale)
        before = run.additions.setdefault(component, {})
        for module, addition in additions.items():
            before[module] = (*before.get(module, ()), addition)
        if _is_compiled(network):
            run.warnings.append(
                f"{component} is compiled: its graph breaks at each of the {len(additions)} layers of {self.file}, "
                "which fullgraph=True does not allow; for speed, load it with pipe.load_lora_weights before compiling"
            )
        run.notes.append(f"adapts {len(additions)} layers of {component} with {2 * len(additions)} tensors")


class _LowRank:
    """Adds scale alpha / rank B(A(x)) to the output of a linear layer or a convolution, as PEFT does.

    Args:
        down: A, (rank, inputs) and for convolutions the size of the kernel.
        up: B, (outputs, rank), and for convolutions (1, 1).
        scaling: scale alpha / rank.
        options: stride and padding of a convolution; None of a linear layer.
    """

    def __init__(self, down: Tensor, up: Tensor, scaling: float, options: dict[str, Any] | None) -> None:
        self.weights = (down, up)
        self.scaling = scaling
        self.options = options

    def __call__(self, output: Tensor, x: Tensor) -> Tensor:
        down, up = self.weights
        if down.device != output.device:  # the network was moved, or is moved here for each call
            down, up = self.weights = (down.to(output.device), up.to(output.device))
        x = x.to(output.device, down.dtype)
        if self.options is None:
            return output + functional.linear(functional.linear(x, down), up) * self.scaling
        return output + functional.conv2d(functional.conv2d(x, down, **self.options), up) * self.scaling


def _is_compiled(network: nn.Module) -> bool:
    return inner(network) is not network or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in network.modules()
    )


def _refuse_fused(component: str, network: nn.Module) -> None:
    """Raises ``InputError`` for a network that runs fused projections instead of its layers."""
    for name, module in network.named_modules():
        separate = isinstance(module, Attention) and not type(module.processor).__name__.startswith("Fused")
        if getattr(module, "fused_projections", False) is True and not separate:
            raise InputError(
                f"{component} has fused projections ({name or 'the whole network'}), which run instead of the layers "
                "of the LoRA; call pipe.unfuse_qkv_projections() first"
            )


def _layer(network: nn.Module, name: str, file: str) -> nn.Module:
    """The module called ``name``: a layer, or a layer with adapters of PEFT."""
    kind = own_class(network).__name__
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"{file} adapts {name!r}, which the pipeline's {kind} has not; it is for another network"
        ) from None


def _low_rank(name: str, layer: LoraLayer, module: nn.Module, scale: float) -> _LowRank:
    """What a layer of the file adds to the output of ``module``."""
    base: Any = module
    if hasattr(base, "get_base_layer"):  # of an adapter that PEFT put there
        base = base.get_base_layer()
    kind = own_class(base)
    if kind not in (nn.Linear, nn.Conv2d):
        raise InputError(f"{name} is a {kind.__name__}; a LoRA of a plan adapts plain linear layers and convolutions")
    weight = base.weight
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise InputError(f"{name} has {weight.dtype} weights; load the network in a wider dtype to add a LoRA to it")
    options = None
    if kind is nn.Conv2d:
        if base.groups != 1 or base.dilation != (1, 1) or base.padding_mode != "zeros":
            raise InputError(f"{name} is a convolution of groups, dilated or padded otherwise; no LoRA adapts it")
        options = {"stride": base.stride, "padding": base.padding}
    wanted = low_rank_shapes(weight.shape, layer.rank)
    if (tuple(layer.down.shape), tuple(layer.up.shape)) != wanted:
        raise InputError(
            f"the LoRA of {name} has A {tuple(layer.down.shape)} and B {tuple(layer.up.shape)}; a layer of "
            f"{tuple(weight.shape)} takes {wanted[0]} and {wanted[1]}: it is for another network"
        )
    device = torch.device("cpu") if weight.is_meta else weight.device
    down, up = (tensor.to(device, weight.dtype) for tensor in (layer.down, layer.up))
    return _LowRank(down, up, scale * layer.scaling, options)
