"""Token models in a folder: denoisers, perhaps their autoregressive twin, and the tokenizer they share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ...samplers import fingerprint
from ...samplers.errors import InputError
from ...samplers.tokens import (
    Recipe,
    TransformersCausal,
    TransformersDenoiser,
    load_causal,
    load_denoiser,
)
from ...samplers.tokens.folder import SPEC_FILE, TokenModel
from ..assets import DEMO, DEMO_TOKENS, PREFIX, Dtype, torch_dtype


def token_folder(spec: str) -> Path | None:
    """The folder of token models that ``--pipe`` names, None when it names something else."""
    folder = DEMO / spec.removeprefix(PREFIX) if spec == DEMO_TOKENS else Path(spec)
    return folder if any(_model_folders(folder)) else None


def _model_folders(folder: Path) -> list[Path]:
    """The folder itself where it holds a model, else those in it that do, in order of their names."""
    if (folder / SPEC_FILE).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{SPEC_FILE}"))


@dataclass(frozen=True)
class TokenModels:
    """Models over the same tokens.

    Attributes:
        spec: how the user named them.
        tokenizer: transformers' own.
        denoisers: by the name of their folder, those that attend both ways first; at least one.
        causal: the autoregressive twin, if there is one.
    """

    spec: str
    tokenizer: Any
    denoisers: Mapping[str, TransformersDenoiser]
    causal: TransformersCausal | None

    @property
    def resources(self) -> dict[str, Any]:
        """What `decode` hands to policies."""
        return {} if self.causal is None else {"ar": self.causal}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The networks, by the name of their folder; the twin is called ``ar``."""
        found = {name: denoiser.model for name, denoiser in self.denoisers.items()}
        return found if self.causal is None else found | {"ar": self.causal.model}

    @cached_property
    def prints(self) -> dict[str, str]:
        """Their fingerprints."""
        return {name: fingerprint(module) for name, module in self.modules.items()}

    def denoiser_for(self, recipe: Recipe) -> str:
        """The name of the first denoiser that a recipe works with.

        Raises:
            InputError: when it works with none; the reason of the first.
        """
        problems = []
        for name, denoiser in self.denoisers.items():
            try:
                recipe.suits(denoiser)
            except InputError as error:
                problems.append(error)
            else:
                return name
        raise problems[0]

    def ids(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def text(self, ids: Tensor) -> str:
        """The text of an answer (n,) up to its first end; special tokens are left out."""
        ends = {end for denoiser in self.denoisers.values() for end in denoiser.spec.eos_ids}
        kept = ids.tolist()
        stop = next((place for place, token in enumerate(kept) if token in ends), len(kept))
        decoded: str = self.tokenizer.decode(kept[:stop], skip_special_tokens=True)
        return decoded


def load_token_models(spec: str, *, dtype: Dtype = "float32", device: str = "cpu") -> TokenModels:
    """Reads all models of a folder; nothing but JSON and safetensors is read, and no code.

    Args:
        spec: ``demo:tokens``, a folder that `save_denoiser` wrote, or a folder of such folders; the tokenizer lies
            beside one of the models.
        dtype: of the weights and of the computation.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        InputError: when the folder holds no denoiser, several autoregressive models, or no tokenizer.
    """
    folder = token_folder(spec)
    if folder is None:
        raise InputError(f"--pipe {spec} holds no token model; give a folder that save_denoiser wrote")
    folders = _model_folders(folder)
    kinds = {path: "ar" if TokenModel.load(path / SPEC_FILE).causal else "denoiser" for path in folders}
    causal = [path for path, kind in kinds.items() if kind == "ar"]
    if len(causal) > 1:
        raise InputError(f"--pipe {spec} holds {len(causal)} autoregressive models; keep one")
    if len(causal) == len(folders):
        raise InputError(f"--pipe {spec} holds no denoiser; give a folder that save_denoiser wrote")
    settings: dict[str, Any] = {"dtype": torch_dtype(dtype), "device": device}
    with _no_bars():
        loaded = {path.name: load_denoiser(path, **settings) for path, kind in kinds.items() if kind == "denoiser"}
        twin = load_causal(causal[0], **settings) if causal else None
    return TokenModels(
        spec=spec,
        tokenizer=_tokenizer(folders),
        denoisers=dict(sorted(loaded.items(), key=lambda item: (item[1].spec.attention != "full", item[0]))),
        causal=twin,
    )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' bars, for the block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _tokenizer(folders: list[Path]) -> Any:
    holding = [path for path in folders if (path / "tokenizer.json").is_file()]
    if not holding:
        raise InputError(f"{folders[0]} holds no tokenizer.json; save the tokenizer beside the model")
    vocabularies = {Tokenizer.from_file(str(path / "tokenizer.json")).to_str() for path in holding}
    if len(vocabularies) > 1:
        raise InputError(f"the models in {holding[0].parent} have different tokenizers; a bench needs one")
    return AutoTokenizer.from_pretrained(holding[0], local_files_only=True, trust_remote_code=False)
