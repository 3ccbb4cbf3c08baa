"""What every policy of a decoding may read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from .denoiser import DenoiserSpec

if TYPE_CHECKING:
    from .recipe import Recipe

Stream = Literal["proposal", "selection", "remask"]
Confidence = Literal["prob", "margin", "entropy", "random"]
STREAMS: tuple[Stream, ...] = ("proposal", "selection", "remask")


@dataclass
class DecodeState:
    """The canvas and what is known of it. Tensors are (B, L) unless noted; policies read, the loop writes.

    L = longest prompt + generated length; prompts are padded on the left. Everything that policies decide is by row:
    a row has its own block, counts its own steps, draws from its own random streams.

    Attributes:
        spec: of the denoiser.
        recipe: that decodes.
        x: int64, tokens; the mask's id where none is committed.
        editable: bool, masks at the start: what is generated. The rest is prompt or padding and never changes.
        first: (B,) int64, column of the first real token.
        end: (B,) int64, column after the last one that still exists; an exit may move it towards the start.
        answer: column at which generation starts, after the longest prompt.
        alive: (B,) bool, rows that are not done.
        held: (B,) bool, rows whose block is full, but which a remask policy does not let go yet.
        failed: (B,) bool, rows given up by a constraint or a scorer.
        step: (B,) int64, iterations that the row has completed.
        block_start: (B,) int64, first column of the row's active block.
        block_end: (B,) int64, column after it.
        block_index: (B,) int64, how many blocks it has left behind; -1 before the first.
        block_step: (B,) int64, iterations completed in this block.
        block_masks: (B,) int64, masks that the block had when the row entered it.
        known: bool, the positions whose logits are at hand; nothing below is meaningful anywhere else.
        at: (N,) rows and (N,) columns of the known positions, row by row.
        raw: (N, V), what the denoiser said there, with the shift of the logits undone.
        branches: (N, V) by name, the same of the other branches that logits processors ask for.
        logits: (N, V), after the logits processors; minus infinity at the mask's id.
        x0: int64, proposed tokens at the known positions.
        reveal_step: int64, the row's step at which a position was committed last; -1 if never.
        reveal_conf: float64, its token's probability then; NaN if never.
        stored: bool, positions with keys and values in the store, or evaluated at all without one.
        seen: int64, the token that a position had when it was evaluated last.
        age: int64, steps of the row since then: 1 when a cache plans the step after.
        fresh: bool, positions whose keys and values are those that a full evaluation of the canvas would give: nothing
            that they depend on has changed since. A cache that evaluates everything else is exact.
        exact: (B,) bool, whether all logits so far were those of no cache.
        drift: float32, how much stored values changed when they were written over last, for plans that probe.
        changed: bool, positions that the last iteration wrote.
        seeds: of the rows.
        cond: conditioning tensors of all rows, by name.
        uncond: those without condition, by name.
        memory: what policies keep between steps, each under itself as key: policies are frozen, so that two of one type
            with other fields keep apart what is theirs.
        scorer_nfe: (B,) int64, forward passes of a second model so far.
        scorer_token_forwards: (B,) int64, positions evaluated in them.
        resources: what the user handed over by name, such as a second model.
    """

    spec: DenoiserSpec
    recipe: Recipe
    x: Tensor
    first: Tensor
    answer: int
    seeds: tuple[int, ...]
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    uncond: Mapping[str, Tensor] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        length = self.x.shape[1]
        self.columns = torch.arange(length, device=self.x.device)[None]
        self.editable = (self.x == self.spec.mask_id) & (self.columns >= self.first[:, None])
        self.end = self._rows(length)
        self.alive = self.editable.any(1)
        self.failed, self.held = torch.zeros_like(self.alive), torch.zeros_like(self.alive)
        self.step, self.block_step, self.block_masks = self._rows(0), self._rows(0), self._rows(0)
        self.scorer_nfe, self.scorer_token_forwards = self._rows(0), self._rows(0)
        self.block_start, self.block_end, self.block_index = self._rows(0), self._rows(0), self._rows(-1)
        self.known, self.stored, self.changed, self.fresh = (torch.zeros_like(self.editable) for _ in range(4))
        self.exact = torch.ones_like(self.alive)
        self.at: tuple[Tensor, Tensor] = (self._rows(0)[:0], self._rows(0)[:0])
        self.raw = self.logits = torch.zeros(0, self.spec.vocab_size, device=self.x.device)
        self.branches: dict[str, Tensor] = {}
        self.x0 = self.x.clone()
        self.reveal_step = torch.full_like(self.x, -1)
        self.reveal_conf = torch.full(self.x.shape, torch.nan, dtype=torch.float64, device=self.x.device)
        self.seen = torch.full_like(self.x, -1)
        self.age = torch.zeros_like(self.x)
        self.drift = torch.zeros(self.x.shape, device=self.x.device)
        self._generators = [{name: generator(seed, name) for name in STREAMS} for seed in self.seeds]
        self._derived: dict[str, Tensor] = {}

    def _rows(self, value: int) -> Tensor:
        return torch.full((self.x.shape[0],), value, dtype=torch.long, device=self.x.device)

    @property
    def present(self) -> Tensor:
        """Bool, positions that exist: neither padding nor past the row's end."""
        return (self.columns >= self.first[:, None]) & (self.columns < self.end[:, None])

    @property
    def masked(self) -> Tensor:
        """Bool, positions that are still to be committed."""
        return (self.x == self.spec.mask_id) & self.editable & self.present

    @property
    def in_block(self) -> Tensor:
        """Bool, positions of the active block."""
        return (self.columns >= self.block_start[:, None]) & (self.columns < self.block_end[:, None])

    @property
    def open(self) -> Tensor:
        """Bool, what has to become known: masks of the active blocks of live rows; all of a block that is held."""
        due = self.masked | (self.editable & self.present & self.held[:, None])
        return due & self.in_block & self.alive[:, None]

    @property
    def ahead(self) -> Tensor:
        """Bool, masks that the denoiser can predict in this step, in the active block or past it."""
        return self.masked & self.reach(self.open)

    @property
    def progress(self) -> Tensor:
        """(B,) float64 in [0, 1], the share of what is to be generated that is committed."""
        total = (self.editable & self.present).sum(1)
        return 1 - self.masked.sum(1).double() / total.clamp(min=1)

    @property
    def candidates(self) -> Tensor:
        """Bool, what an unmask policy may choose from: masks of the active blocks whose logits are known."""
        return self.open & self.masked & self.known

    @property
    def stale(self) -> Tensor:
        """Bool, stored positions whose token has changed since they were evaluated."""
        return self.stored & (self.seen != self.x)

    @property
    def model_blocks(self) -> Tensor:
        """int64, the block of the denoiser's attention that a position is in."""
        return self.spec.blocks(self.columns, self.first[:, None], self.answer)

    @property
    def positions(self) -> Tensor:
        """int64, position ids; those of padding are not to be used."""
        return (self.columns - self.first[:, None]).clamp(min=0) + self.spec.position_base

    def sources(self, positions: Tensor) -> Tensor:
        """Bool, the positions whose outputs predict ``positions``: the ones before, where logits are shifted.

        The first real token has none before it and is predicted by its own output, as upstream does.
        """
        if not self.spec.logit_shift:
            return positions
        before = torch.zeros_like(positions)
        before[:, :-1] = positions[:, 1:]
        at_first = self.columns == self.first[:, None]
        return (before & self.present) | (positions & at_first)

    def reach(self, positions: Tensor) -> Tensor:
        """Bool, every position that the outputs for ``positions`` depend on: what a cacheless step evaluates."""
        blocks = self.model_blocks
        last = blocks.masked_fill(~self.sources(positions), blocks.min() - 1).amax(1, keepdim=True)
        return self.present & (blocks <= last)

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """(B, L) with ``values`` (N,) at the known positions and ``fill`` elsewhere."""
        out = torch.full(self.x.shape, fill, dtype=values.dtype, device=self.x.device)
        out[self.at] = values
        return out

    @property
    def log_probs(self) -> Tensor:
        """(N, V), log-softmax of the logits: neither tempered nor filtered."""
        return self._once("log_probs", lambda: self.logits.log_softmax(-1))

    def confidence(self, kind: Confidence = "prob") -> Tensor:
        """How sure the denoiser is of each known position; minus infinity elsewhere. Larger is surer.

        Always from the probabilities p that are neither tempered nor filtered (Dimple, arXiv:2505.16990, section 4,
        advises it), then through the logits processors.

        Args:
            kind: "prob": p of the proposed token. "margin": the largest p less the second. "entropy": sum p log p.
                "random": uniform, from the row's stream of selections.
        """
        return self._once(f"confidence {kind}", lambda: self._confidence(kind))

    def _confidence(self, kind: Confidence) -> Tensor:
        if kind == "random":
            values = self.uniform("selection")[self.at]
        elif kind == "margin":
            top = self.log_probs.exp().topk(2).values
            values = top[:, 0] - top[:, 1]
        elif kind == "entropy":
            values = -torch.special.entr(self.log_probs.exp()).sum(-1)
        else:
            values = self.log_probs.gather(1, self.x0[self.at][:, None])[:, 0].exp()
        confidence = self.spread(values.double(), -torch.inf)
        for processor in self.recipe.logits:
            confidence = processor.confidence(self, confidence, kind)
        return confidence

    def uniform(self, stream: Stream) -> Tensor:
        """Float64 in [0, 1), fresh at every call: each live row draws one number per real position.

        What a row draws depends on its seed, its own length and how often it has drawn; neither on the batch nor on
        padding.
        """
        out = torch.zeros(self.x.shape, dtype=torch.float64)
        firsts, length = self.first.tolist(), self.x.shape[1]
        for row in self.alive.nonzero()[:, 0].tolist():
            drawn = torch.rand(length - firsts[row], generator=self._generators[row][stream], dtype=torch.float64)
            out[row, firsts[row] :] = drawn
        return out.to(self.x.device)

    def remember(self, logits: Tensor) -> None:
        """Takes the processed logits of a step; what was derived from older ones is forgotten."""
        self.logits = logits
        self._derived.clear()

    def resource(self, policy: str, name: str) -> Any:
        """What the user handed over as ``name``.

        Args:
            policy: who asks, as the user knows it.
            name: the resource.

        Raises:
            InputError: when there is none.
        """
        if name not in self.resources:
            raise InputError(f"the {policy} needs {name!r}; hand it over with decode(..., resources={{{name!r}: ...}})")
        return self.resources[name]

    def _once(self, name: str, make: Any) -> Tensor:
        if name not in self._derived:
            self._derived[name] = make()
        return self._derived[name]


def generator(seed: int, stream: str) -> torch.Generator:
    """The random stream of a row: seeds and streams that differ give streams that have nothing in common."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def top(scores: Tensor, allowed: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` best of the allowed positions of each row, all of them where there are fewer.

    Args:
        scores: (B, L); of equal ones the leftmost wins.
        allowed: (B, L) bool.
        counts: (B,).

    Returns:
        (B, L) bool.
    """
    order = scores.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~allowed).gather(1, order).byte().argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)
    return (rank < counts[:, None]) & allowed


def pad_left(prompts: Tensor | Sequence[Any], fill: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths in one tensor.

    Args:
        prompts: (B, P), or a list of sequences of ids.
        fill: id in the padding.
        device: of the result.

    Returns:
        ids (B, P) int64 and the column (B,) of each row's first token.

    Raises:
        InputError: when a prompt is not a sequence of whole numbers.
    """
    rows = [torch.as_tensor(prompt) for prompt in prompts]
    for index, row in enumerate(rows):
        if row.ndim != 1 or (row.numel() and (row.is_floating_point() or row.dtype == torch.bool)):
            raise InputError(
                f"prompt {index} is not a sequence of token ids; got {row.dtype} of shape {tuple(row.shape)}"
            )
    longest = max((row.numel() for row in rows), default=0)
    ids = torch.full((len(rows), longest), fill, dtype=torch.long, device=device)
    for index, row in enumerate(rows):
        ids[index, longest - row.numel() :] = row
    return ids, torch.tensor([longest - row.numel() for row in rows], dtype=torch.long, device=device)
