"""Token models in folders: safetensors, transformers' ``config.json``, and what the decode loop must know."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import nn

from ..document import Document
from ..errors import InputError
from ..files import read_json
from .causal import TransformersCausal
from .denoiser import DenoiserSpec
from .transformers_denoiser import TransformersDenoiser

SPEC_FILE = "fewstep.json"
"""Beside ``config.json``: a `TokenModel`."""


class CausalSpec(BaseModel):
    """What scorers must know of an autoregressive model; see `TransformersCausal`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(ge=2, description="Tokens that it predicts.")
    bos_id: int | None = Field(default=None, ge=0, description="Token that it reads first.")


class TokenModel(Document):
    """What a folder holds: a denoiser or an autoregressive model."""

    noun = "model"
    field_noun = "field"

    version: Literal[1] = Field(default=1, alias="fewstep_model", description="Version of this format.")
    denoiser: DenoiserSpec | None = Field(default=None, description="Of a network that predicts masked tokens.")
    causal: CausalSpec | None = Field(default=None, description="Of a network that predicts the next token.")


def save_denoiser(folder: str | Path, model: Any, spec: DenoiserSpec) -> None:
    """Writes a transformers model as a denoiser that `load_denoiser` reads.

    Args:
        folder: to write into.
        model: with ``save_pretrained``; its weights are written as they are.
        spec: what it is.
    """
    _save(Path(folder), model, TokenModel(denoiser=spec))


def save_causal(folder: str | Path, model: Any, vocab_size: int, bos_id: int | None = None) -> None:
    """Writes a transformers causal model that `load_causal` reads; arguments as of `TransformersCausal`."""
    _save(Path(folder), model, TokenModel(causal=CausalSpec(vocab_size=vocab_size, bos_id=bos_id)))


def load_denoiser(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TransformersDenoiser:
    """The denoiser in a folder; nothing but JSON and safetensors is read, and no code.

    Args:
        folder: that `save_denoiser` wrote.
        dtype: to compute in.
        device: to compute on.

    Raises:
        InputError: when the folder holds something else, or something that cannot be read.
    """
    spec = _spec(Path(folder)).denoiser
    if spec is None:
        raise InputError(f"{folder} holds an autoregressive model; read it with load_causal")
    model = _model(Path(folder), dtype, device, spec.vocab_size, spec.mask_id)
    return TransformersDenoiser(model, spec)


def load_causal(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TransformersCausal:
    """The autoregressive model in a folder, for ``resources={"ar": ...}``; see `load_denoiser`."""
    spec = _spec(Path(folder)).causal
    if spec is None:
        raise InputError(f"{folder} holds a denoiser; read it with load_denoiser")
    model = _model(Path(folder), dtype, device, spec.vocab_size, spec.bos_id or 0)
    return TransformersCausal(model, spec.vocab_size, spec.bos_id)


def _save(folder: Path, model: Any, spec: TokenModel) -> None:
    model.save_pretrained(folder)
    spec.save(folder / SPEC_FILE)


def _spec(folder: Path) -> TokenModel:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that save_denoiser or save_causal wrote")
    spec = TokenModel.load(folder / SPEC_FILE)
    if (spec.denoiser is None) == (spec.causal is None):
        raise InputError(f"{folder / SPEC_FILE} describes one model, as 'denoiser' or as 'causal'")
    return spec


def _model(folder: Path, dtype: torch.dtype, device: torch.device | str, vocab_size: int, special: int) -> nn.Module:
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise InputError(
            f"{folder} is a model with code of its own, which is not run; load it yourself and wrap it with "
            "TransformersDenoiser or CallableDenoiser"
        )
    architecture = _architecture(folder, config)
    if config["vocab_size"] < max(vocab_size, special + 1):
        raise InputError(
            f"{folder} embeds {config['vocab_size']} tokens, and {SPEC_FILE} speaks of {max(vocab_size, special + 1)}"
        )
    try:
        model, info = architecture.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise InputError(f"cannot read the weights in {folder}: {str(error).splitlines()[0]}") from error
    absent = sorted([*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])])
    if absent:
        raise InputError(f"the weights in {folder} lack {absent[0]} and {len(absent) - 1} others; save them again")
    loaded: nn.Module = model.eval().requires_grad_(False).to(device)
    return loaded


def _architecture(folder: Path, config: dict[str, Any]) -> Any:
    name = (config.get("architectures") or ["none"])[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise InputError(f"{folder} holds a model of architecture {name!r}, which transformers does not have")
    return found
