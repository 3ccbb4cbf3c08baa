"""A network that predicts masked tokens, as the decode loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from .kv import PositionCache


@dataclass(frozen=True, slots=True)
class DenoiserSpec:
    """What the decode loop must know of a denoiser.

    Attributes:
        mask_id: id of the mask token; it may lie past ``vocab_size`` where the network cannot predict it.
        vocab_size: number of tokens that the network predicts.
        eos_ids: tokens after which an answer is over, the one that fills the rest first.
        attention: "full": every position attends to every other one. "block-causal": to those of its own block and
            of the blocks before.
        block_length: positions in a block of the attention.
        block_anchor: where blocks are counted from: "sequence", the first real token of a row, or "answer", the first
            position that is generated, with the prompt as one block before.
        logit_shift: 0 when the output at a position predicts the token there, 1 when it predicts the next one (Dream,
            Dimple, Fast-dLLM v2).
        time_conditioned: whether the network is told the time.
        position_base: position id of the first real token.
    """

    mask_id: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    attention: Literal["full", "block-causal"] = "full"
    block_length: int | None = None
    block_anchor: Literal["sequence", "answer"] = "sequence"
    logit_shift: int = 0
    time_conditioned: bool = False
    position_base: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size < 2:
            raise InputError(f"vocab_size counts the tokens that can be predicted; got {self.vocab_size}")
        if self.mask_id < 0 or any(not 0 <= eos < self.vocab_size for eos in self.eos_ids):
            raise InputError(f"mask_id {self.mask_id} and eos_ids {self.eos_ids} must be ids of tokens")
        if self.mask_id in self.eos_ids:
            raise InputError(f"mask_id {self.mask_id} is among eos_ids; an answer cannot end with a mask")
        if self.logit_shift not in (0, 1):
            raise InputError(f"logit_shift is 0 or 1; got {self.logit_shift}")
        if (self.attention == "block-causal") != (self.block_length is not None):
            raise InputError("block_length is given with attention='block-causal', and only then")
        if self.block_length is not None and self.block_length < 1:
            raise InputError(f"block_length counts positions; got {self.block_length}")

    def blocks(self, columns: Tensor, first: Tensor, answer: int) -> Tensor:
        """The block of the attention that each column of the canvas is in; all in one for full attention.

        Args:
            columns: (B, K) or (1, K), columns of the canvas.
            first: (B, 1), column of each row's first real token.
            answer: column at which generation starts.

        Returns:
            (B, K), a position attends to blocks that are not larger than its own.
        """
        if self.block_length is None:
            return torch.zeros_like(columns + first)
        if self.block_anchor == "sequence":
            return (columns - first).div(self.block_length, rounding_mode="floor")
        blocks = (columns + 0 * first - answer).div(self.block_length, rounding_mode="floor")
        return blocks.clamp(min=-1)


@dataclass(frozen=True, slots=True)
class Query:
    """Positions of some rows to be evaluated in one forward pass.

    The rows of a batch may ask for different numbers of positions: a row's positions come first, in order, and the
    rest of its Q entries are filling, which reads and writes nothing that counts.

    Attributes:
        tokens: (R, Q) int64, the tokens at the positions; the mask's id in filling.
        columns: (R, Q) int64, which columns of the canvas they are; its length L in filling.
        positions: (R, Q) int64, position ids.
        counts: (R,) int64, how many entries of each row are not filling.
        attend: (R, Q, K) bool, True where the query attends to the key; K = L columns with a ``store``, else the Q
            entries themselves.
        wanted: (R, Q) bool, at which entries logits are asked for.
        rows: (R,) int64, rows of the batch.
        store: keys and values of the canvas, already told where those of this pass belong; None to keep none.
        time: (R,) float64 in [0, 1], 1 at pure masks; None when the network is not told the time.
        cond: conditioning tensors by name, of these rows.
    """

    tokens: Tensor
    columns: Tensor
    positions: Tensor
    counts: Tensor
    attend: Tensor
    wanted: Tensor
    rows: Tensor
    store: PositionCache | None = None
    time: Tensor | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)


class Denoiser(ABC):
    """A network behind the decode loop. It owns the attention mask: what a query attends to is always said.

    Attributes:
        spec: what it is.
        keeps_kv: whether it can work from keys and values of a store.
    """

    spec: DenoiserSpec
    keeps_kv: bool = False

    @property
    def device(self) -> torch.device:
        """Where tokens are to be."""
        return torch.device("cpu")

    @abstractmethod
    def forward(self, query: Query) -> Tensor:
        """One forward pass.

        Args:
            query: what is asked.

        Returns:
            (N, V) outputs at the ``wanted`` entries, row by row and in order within a row, V = ``spec.vocab_size``,
            float32 or float64. A shift of the logits is the loop's business: these are the outputs *at* the entries.
        """


class WholeRows(Denoiser):
    """A denoiser that evaluates whole rows: no keys and values, no padding.

    Rows of equal length go together; each sequence is handed over as it is, from its first real token to its end.
    """

    @abstractmethod
    def evaluate(self, tokens: Tensor, time: Tensor | None, cond: Mapping[str, Tensor]) -> Tensor:
        """Logits of whole sequences.

        Args:
            tokens: (R, n) int64.
            time: (R,) or None.
            cond: conditioning tensors of the rows.

        Returns:
            (R, n, V).
        """

    def forward(self, query: Query) -> Tensor:
        """Logits at the wanted entries."""
        found: list[tuple[Tensor, Tensor]] = []
        number = torch.arange(query.wanted.numel(), device=query.wanted.device).view_as(query.wanted)
        for count in sorted(set(query.counts.tolist())):
            of = (query.counts == count).nonzero()[:, 0]
            time = None if query.time is None else query.time[of]
            logits = self.evaluate(query.tokens[of, :count], time, {k: v[of] for k, v in query.cond.items()})
            wanted = query.wanted[of, :count]
            if logits.shape != (*wanted.shape, self.spec.vocab_size):
                raise InputError(
                    f"the denoiser returned logits of shape {tuple(logits.shape)} for ids of shape "
                    f"{tuple(wanted.shape)}; (rows, positions, {self.spec.vocab_size}) is expected"
                )
            found.append((number[of, :count][wanted], logits[wanted]))
        order = torch.cat([place for place, _ in found]).argsort()
        return at_least_float32(torch.cat([logits for _, logits in found])[order])


class CallableDenoiser(WholeRows):
    """Any function from tokens to logits, such as a model whose own code attends to everything (LLaDA, Dream).

    Args:
        function: from ids (R, n) int64 to logits (R, n, V); rows are without padding and of one length. It is called
            with ``time=`` (R,) float64 when ``spec`` says so, and with the conditioning tensors by name.
        spec: what it is.
        device: where it wants its ids.
    """

    def __init__(self, function: Callable[..., Tensor], spec: DenoiserSpec, device: torch.device | str = "cpu") -> None:
        self.function = function
        self.spec = spec
        self._device = torch.device(device)

    @property
    def device(self) -> torch.device:
        """Where tokens are to be."""
        return self._device

    def evaluate(self, tokens: Tensor, time: Tensor | None, cond: Mapping[str, Tensor]) -> Tensor:
        """Calls the function."""
        return self.function(tokens, **cond) if time is None else self.function(tokens, time=time, **cond)


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits of half precision as float32, others as they are."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
