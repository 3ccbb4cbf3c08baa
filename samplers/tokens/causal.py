"""An autoregressive model beside the loop: what scorers ask a second opinion of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .denoiser import CallableDenoiser, DenoiserSpec, Query
from .kv import PositionCache
from .state import DecodeState
from .transformers_denoiser import TransformersDenoiser

RESOURCE = "ar"
"""Name under which `decode` is handed the model: ``resources={"ar": TransformersCausal(model)}``."""


class CausalModel(ABC):
    """A model that predicts each token from those before it, over the denoiser's tokens.

    Attributes:
        vocab_size: number of tokens that it predicts: the denoiser's, or those without a mask whose id is the last.
        bos_id: token that it reads before everything else; None for a model that has none, which cannot say what a row
            without a prompt begins with.
        keeps_kv: whether it works from keys and values of a store.
    """

    vocab_size: int
    bos_id: int | None = None
    keeps_kv: bool = False

    @abstractmethod
    def forward(self, query: Query) -> Tensor:
        """One forward pass; ``query.attend`` is causal.

        Returns:
            (N, vocab_size) logits of the tokens that follow the ``wanted`` entries, row by row.
        """


class CallableCausal(CausalModel):
    """Any function from tokens to the logits of what follows each of them.

    Args:
        function: from ids (R, n) int64, all real, to logits (R, n, vocab_size).
        vocab_size: number of tokens that it predicts.
        bos_id: token that it reads first, if any.
    """

    def __init__(self, function: Callable[..., Tensor], vocab_size: int, bos_id: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self._asked = CallableDenoiser(function, DenoiserSpec(mask_id=vocab_size, vocab_size=vocab_size))

    def forward(self, query: Query) -> Tensor:
        """Calls the function on whole sequences."""
        return self._asked.forward(query)


class TransformersCausal(CausalModel):
    """A transformers causal language model, with its keys and values kept by position in a transformers cache.

    What it read of a row stays valid up to the first token that has changed since, so that nothing has to be cropped.

    Args:
        model: in evaluation mode; see `TransformersDenoiser`.
        vocab_size: how many of its tokens count, where it has spare ones; all by default.
        bos_id: token that it reads first, if any.
    """

    def __init__(self, model: nn.Module, vocab_size: int | None = None, bos_id: int | None = None) -> None:
        config: Any = model.config
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.bos_id = bos_id
        spec = DenoiserSpec(mask_id=self.vocab_size, vocab_size=self.vocab_size)
        self._asked = TransformersDenoiser(model, spec)
        self.model = model
        self.keeps_kv = self._asked.keeps_kv

    def forward(self, query: Query) -> Tensor:
        """Logits after the wanted entries."""
        return self._asked.forward(query)


class CausalReader:
    """A causal model that reads the rows of one decoding, and counts.

    Slot s of a row holds the token of column s - 1, so that the output there predicts column s; the slot of the row's
    first column holds the token that the model reads first.

    Args:
        model: that reads.
        state: of the decoding.
        copies: sequences that are read for each row.
    """

    def __init__(self, model: CausalModel, state: DecodeState, copies: int = 1) -> None:
        self.model = model
        self.copies = copies
        self.first = state.first.repeat_interleave(copies)
        batch, slots = self.first.shape[0], state.x.shape[1] + 1
        self.slots = torch.arange(slots, device=state.x.device)
        self.store = PositionCache(batch, slots, state.x.device) if model.keeps_kv else None
        self.seen = torch.full((batch, slots), -1, dtype=torch.long, device=state.x.device)

    def read(self, state: DecodeState, tokens: Tensor, wanted: Tensor) -> Tensor:
        """What the model expects at some positions, given the tokens before each.

        Args:
            state: whose count of costs goes up.
            tokens: (B * copies, L) int64, the copies of a row one after the other; no masks before a wanted position.
            wanted: (B * copies, L) bool.

        Returns:
            (N, V) logits, row by row; minus infinity at the mask's id.

        Raises:
            InputError: when it is asked what a row begins with, and has nothing to read before that.
        """
        begin = (self.first + (self.model.bos_id is None))[:, None]
        exists = self.slots >= begin
        asked = torch.nn.functional.pad(wanted, (0, 1))
        if bool((asked & ~exists).any()):
            raise InputError(
                "the autoregressive model cannot say what a row without a prompt begins with; give it a bos_id"
            )
        ids = torch.nn.functional.pad(tokens, (1, 0))
        if self.model.bos_id is not None:
            ids = torch.where(self.slots == self.first[:, None], self.model.bos_id, ids)
        query = exists & (self.slots <= torch.where(asked, self.slots, -1).amax(1, keepdim=True))
        if self.store is not None:
            valid = ((ids == self.seen) | ~exists).long().cumprod(1).bool()
            query = query & (~valid | asked) & asked.any(1, keepdim=True)
            self.seen = torch.where(valid | query, ids, -1)
        spent = query.sum(1).view(-1, self.copies)
        state.scorer_nfe += (spent > 0).sum(1)
        state.scorer_token_forwards += spent.sum(1)
        return self._shared(state, self._forward(ids, query, asked, begin))

    def _forward(self, ids: Tensor, query: Tensor, asked: Tensor, begin: Tensor) -> Tensor:
        rows = query.any(1).nonzero()[:, 0]
        if not len(rows):
            return torch.zeros(0, self.model.vocab_size, device=ids.device)
        end = len(self.slots)
        counts = query[rows].sum(1)
        columns = torch.where(query[rows], self.slots, end).sort(1).values[:, : int(counts.max())]
        filling, inside = columns == end, columns.clamp(max=end - 1)
        keys = inside if self.store is None else self.slots.expand(len(rows), -1)
        attend = (keys[:, None] <= inside[..., None]) & (keys >= begin[rows])[:, None]
        if self.store is None:
            attend = attend & ~filling[:, None]
        else:
            self.store.aim(rows, columns)
        return self.model.forward(
            Query(
                tokens=ids[rows].gather(1, inside).masked_fill(filling, 0),
                columns=columns,
                positions=(inside - begin[rows]).clamp(min=0),
                counts=counts,
                attend=torch.where(filling[..., None], attend[:, :1], attend),
                wanted=asked[rows].gather(1, inside) & ~filling,
                rows=rows,
                store=self.store,
            )
        )

    def _shared(self, state: DecodeState, logits: Tensor) -> Tensor:
        """Over the denoiser's vocabulary, none of it on the mask."""
        spare = state.spec.vocab_size - self.model.vocab_size
        logits = torch.nn.functional.pad(logits, (0, spare), value=-torch.inf)
        if state.spec.mask_id < logits.shape[1]:
            logits = logits.index_fill(1, torch.tensor([state.spec.mask_id], device=logits.device), -torch.inf)
        return logits


def reader_of(state: DecodeState, scorer: str, copies: int = 1) -> CausalReader:
    """A reader of the model that the user handed over.

    Args:
        state: of the decoding.
        scorer: who asks, as the user knows it.
        copies: sequences that are read for each row.

    Raises:
        InputError: when there is none, it is something else, or its tokens are not those of the denoiser.
    """
    model = state.resource(f"{scorer} scorer", RESOURCE)
    if not isinstance(model, CausalModel):
        raise InputError(
            f"resource {RESOURCE!r} is a {type(model).__name__}; wrap a transformers model with TransformersCausal, or "
            "a function with CallableCausal"
        )
    spec = state.spec
    if model.vocab_size != spec.vocab_size and not model.vocab_size == spec.mask_id == spec.vocab_size - 1:
        raise InputError(
            f"the autoregressive model has {model.vocab_size} tokens and the denoiser {spec.vocab_size}; the {scorer} "
            "scorer needs both to have the same tokenizer (give vocab_size where the model only has spare tokens)"
        )
    return CausalReader(model, state, copies)
