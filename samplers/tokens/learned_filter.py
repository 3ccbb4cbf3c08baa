"""The filter of Learn2PD: what it is, what it learns from, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import InputError
from ..files import read_tensors, write_tensors
from .denoiser import Denoiser
from .loop import decode
from .recipe import Recipe
from .result import Decoded
from .slots import Choice, Scorer, Unmask
from .state import DecodeState, top

FORMAT = "fewstep token filter 1"
TRUTH = "reference tokens"


class TokenFilter(nn.Module):
    """Two layers from the confidences of a block to how final its tokens are (Learn2PD, arXiv:2509.25188).

    Args:
        length: positions of the block.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.layers = nn.Sequential(nn.Linear(length, length), nn.ReLU(), nn.Linear(length, length))

    def forward(self, confidences: Tensor) -> Tensor:
        """(R, length) logits from (R, length) confidences, 1 where a token is committed."""
        logits: Tensor = self.layers(confidences)
        return logits

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        write_tensors(Path(path), self.state_dict(), {"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> TokenFilter:
        """Reads a file that `save` wrote.

        Raises:
            InputError: when it is not one.
        """
        tensors, header = read_tensors(Path(path))
        if header.get("format") != FORMAT:
            raise InputError(
                f"{path} is not a token filter of this fewstep; train one with `fewstep search token-filter`"
            )
        network = cls(len(next(iter(tensors.values()))))
        try:
            network.load_state_dict(tensors)
        except RuntimeError:
            raise InputError(f"{path} has not the tensors of a token filter; train it again") from None
        return network.eval()


def block_features(state: DecodeState, length: int) -> tuple[Tensor, Tensor]:
    """What the filter sees of each row's block.

    Args:
        state: of the decoding, with logits and proposals at hand.
        length: of the filter.

    Returns:
        (B, length) float32, the probability of the proposal at open positions and 1 elsewhere; (B, length) int64, the
        columns that the entries are about, L past the end of the block.

    Raises:
        InputError: when a block is longer than the filter.
    """
    longest = int((state.block_end - state.block_start)[state.alive].max())
    if longest > length:
        raise InputError(
            f"a block has {longest} positions and the token filter is made for {length}; use blocks of that length"
        )
    confidence = torch.where(state.candidates, state.confidence("prob"), 1.0).float()
    columns = state.block_start[:, None] + torch.arange(length, device=state.x.device)
    inside = (columns < state.block_end[:, None]) & (columns < state.x.shape[1])
    index = torch.where(inside, columns, state.x.shape[1])
    return nn.functional.pad(confidence, (0, 1), value=1.0).gather(1, index), index


@dataclass(frozen=True, slots=True)
class FilterData:
    """What a filter learns from. M = steps of all rows.

    Attributes:
        features: (M, length) float32, confidences as the filter sees them.
        final: (M, length) bool, whether the proposal was the token of the reference.
        counted: (M, length) bool, the open positions; the others say nothing.
    """

    features: Tensor
    final: Tensor
    counted: Tensor


class _Oracle(Unmask):
    """Every open position whose proposal is the reference's token."""

    type: Literal["reference-oracle"] = "reference-oracle"

    def select(self, state: DecodeState) -> Tensor:
        """The right ones, or else the surest."""
        truth: Tensor = state.resources[TRUTH]
        right = state.candidates & (state.x0 == truth)
        none = state.alive & ~right.any(1)
        return right | top(state.confidence("prob"), state.candidates, none.long())


class _Teacher(Scorer):
    """Puts the reference's token wherever something is committed, so that the replay stays on the reference."""

    type: Literal["reference-teacher"] = "reference-teacher"

    def accept(self, state: DecodeState, choice: Choice) -> Choice:
        """The same positions."""
        return Choice(choice.select, state.resources[TRUTH], choice.failed)


def replay(
    denoiser: Denoiser, prompt: Tensor | Sequence[Any], reference: Decoded, blocks: Any, length: int
) -> FilterData:
    """Replays a decoding with an oracle that commits all that is right in each step, and labels what it sees.

    Args:
        denoiser: that gave the reference.
        prompt: its prompts.
        reference: a decoding of them, usually with the likeliest token and one per step.
        blocks: the block schedule, as a recipe has it; its blocks must not be longer than ``length``.
        length: of the filter.

    Returns:
        The steps of the replay. A step in which nothing was right commits the reference's token at the surest position.

    Raises:
        InputError: when the reference is of other prompts, or a block longer than the filter.
    """
    truth = reference.tokens
    rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def watch(state: DecodeState) -> None:
        if state.x.shape != truth.shape or not bool((state.x == truth)[~state.editable].all()):
            raise InputError("the reference to replay is of other prompts or another length; decode the same ones")
        features, index = block_features(state, length)
        right, mine = (
            nn.functional.pad(flags, (0, 1)).gather(1, index)
            for flags in ((state.x0 == truth) & state.candidates, state.candidates)
        )
        rows.append((features[state.alive], right[state.alive], mine[state.alive]))

    recipe = Recipe(blocks=blocks, unmask=_Oracle(), scorer=_Teacher())
    generated = truth.shape[1] - reference.answer_start
    decode(denoiser, prompt, generated, recipe, resources={TRUTH: truth}, watch=watch)
    features, final, counted = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return FilterData(features, final, counted)


def train_filter(data: FilterData, *, steps: int = 40_000, lr: float = 3e-3, seed: int = 0) -> TokenFilter:
    """Fits a filter by AdamW on all data at once, to the binary cross-entropy at open positions.

    Args:
        data: of replays.
        steps: of the optimiser; the default and ``lr`` are the paper's.
        lr: its rate.
        seed: of the initial weights.

    Raises:
        InputError: when there is nothing to learn from.
    """
    if not bool(data.counted.any()):
        raise InputError("there is no open position to learn from; replay a decoding that generates something")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = TokenFilter(data.features.shape[1])
    optimiser = torch.optim.AdamW(network.parameters(), lr=lr)
    with torch.enable_grad():
        for _ in range(steps):
            logits = network(data.features)[data.counted]
            loss = binary_cross_entropy_with_logits(logits, data.final[data.counted].float())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return network.eval()
