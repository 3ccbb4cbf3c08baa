"""From a cache's plan to logits: what is evaluated, how it is packed, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from .denoiser import Denoiser, Query
from .kv import PositionCache
from .slots import CachePlan, PolicyError
from .state import DecodeState

MAIN = ""
"""Name of the branch that policies decide by."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One of the evaluations of a step.

    Attributes:
        name: of the branch.
        tokens: (B, L) int64, the canvas as it sees it.
        cond: its conditioning tensors, of all rows.
    """

    name: str
    tokens: Tensor
    cond: Mapping[str, Tensor]


@dataclass
class Evaluator:
    """Runs a denoiser for a decoding and counts.

    Attributes:
        denoiser: that is run.
        nfe: (B,) int64, forward passes that the row was part of.
        token_forwards: (B,) int64, positions of the row that were evaluated.
        kv_bytes: most bytes of keys and values that were kept at once.
    """

    denoiser: Denoiser
    nfe: Tensor
    token_forwards: Tensor
    kv_bytes: int = 0
    _stores: dict[str, PositionCache] = field(default_factory=dict)

    def run(self, state: DecodeState, plan: CachePlan, wanted: Tensor) -> None:
        """Evaluates what ``plan`` says and writes what became known into ``state``.

        Args:
            state: of the decoding.
            plan: of its cache.
            wanted: (B, L) bool, positions whose logits somebody reads.

        Raises:
            PolicyError: when the plan leaves a live row without logits that are valid.
        """
        query = plan.query & state.present & state.alive[:, None]
        query = _complete(state, plan, query | (state.sources(wanted & query) & state.alive[:, None]))
        asked = query.any(1)
        known = _predicted_by(state, query) & wanted & asked[:, None]
        reused = state.known & (state.alive & ~asked)[:, None]
        self._check(state, reused)
        branches = {MAIN: Branch(MAIN, state.x, state.cond)}
        for processor in state.recipe.logits:
            for name in processor.branches:
                tokens, cond = processor.branch_tokens(state, name), processor.branch_cond(state, name)
                branches[name] = Branch(name, tokens, cond)
        old = {MAIN: state.raw, **state.branches}
        raw = {name: self._outputs(state, plan, query, known, branch) for name, branch in branches.items()}
        if bool(reused.any()):
            kept = reused[state.at]
            raw = {name: _merge(known, new, reused, old[name][kept]) for name, new in raw.items()}
        state.known = known | reused
        rows, columns = state.known.nonzero(as_tuple=True)
        state.at, state.raw = (rows, columns), raw.pop(MAIN)
        state.branches = raw
        self._judge(state, plan, query, wanted)
        self._note(state, query, len(branches))

    def _check(self, state: DecodeState, reused: Tensor) -> None:
        cache = state.recipe.cache
        if cache.keeps != "logits" and bool(reused.any()):
            raise PolicyError(f"the {cache.type} cache queries nothing in a live row; query its open positions")
        if bool((reused & state.changed.any(1, keepdim=True)).any()):
            raise PolicyError(f"the {cache.type} cache reuses logits of a row that has changed; query the row")

    def _outputs(self, state: DecodeState, plan: CachePlan, query: Tensor, known: Tensor, branch: Branch) -> Tensor:
        """(N, V) outputs for the positions ``known``, row by row."""
        sources = state.sources(known)
        number = sources.flatten().long().cumsum(0).view_as(known.long()) - 1
        outputs, places = [], []
        for rows in _groups(query.sum(1)):
            packed = self._pack(state, plan, query, sources, rows, branch)
            outputs.append(self.denoiser.forward(packed))
            asked = packed.wanted.nonzero(as_tuple=True)
            places.append(number[packed.rows[asked[0]], packed.columns[asked]])
        if not outputs:
            return state.raw[:0]
        logits = torch.cat(outputs)
        if len(outputs) > 1:
            logits = logits[torch.cat(places).argsort()]
        if not state.spec.logit_shift:
            return logits
        at = known.nonzero()
        before = torch.maximum(at[:, 1] - 1, state.first[at[:, 0]])
        return logits[number[at[:, 0], before]]

    def _pack(
        self, state: DecodeState, plan: CachePlan, query: Tensor, sources: Tensor, rows: Tensor, branch: Branch
    ) -> Query:
        """One forward pass over ``rows``, with each row's queries first and filling behind."""
        length = query.shape[1]
        counts = query[rows].sum(1)
        columns = torch.where(query[rows], state.columns, length).sort(dim=1).values[:, : int(counts.max())]
        filling = columns == length
        inside = columns.clamp(max=length - 1)
        store = self._store(state, branch.name)
        keys = torch.arange(length, device=columns.device).expand(len(rows), -1) if store is not None else inside
        available = (state.stored | query)[rows] if store is not None else ~filling
        attend = self._attend(state, plan, rows, inside, keys, available)
        attend = torch.where(filling[..., None], attend[:, :1], attend)
        if store is not None:
            store.aim(rows, columns, plan.probe)
        time = state.recipe.unmask.time(state)[rows] if state.spec.time_conditioned else None
        return Query(
            tokens=branch.tokens[rows].gather(1, inside).masked_fill(filling, state.spec.mask_id),
            columns=columns,
            positions=state.positions[rows].gather(1, inside),
            counts=counts,
            attend=attend,
            wanted=sources[rows].gather(1, inside) & ~filling,
            rows=rows,
            store=store,
            time=time,
            cond={key: value[rows] for key, value in branch.cond.items()},
        )

    def _attend(
        self, state: DecodeState, plan: CachePlan, rows: Tensor, queries: Tensor, keys: Tensor, available: Tensor
    ) -> Tensor:
        """(R, Q, K) bool, which keys a query attends to."""
        blocks = state.model_blocks[rows]
        attend = blocks.gather(1, keys)[:, None] <= blocks.gather(1, queries)[..., None]
        attend = attend & (available & state.present[rows].gather(1, keys))[:, None]
        if plan.visible is None:
            return attend
        visible = plan.visible[rows]
        if visible.ndim == 2:
            return attend & visible.gather(1, keys)[:, None]
        by_query = visible.gather(1, queries[..., None].expand(-1, -1, visible.shape[2]))
        return attend & by_query.gather(2, keys[:, None].expand(-1, queries.shape[1], -1))

    def _store(self, state: DecodeState, name: str) -> PositionCache | None:
        if state.recipe.cache.keeps != "kv":
            return None
        if name not in self._stores:
            batch, length = state.x.shape
            self._stores[name] = PositionCache(batch, length, state.x.device)
        return self._stores[name]

    def _judge(self, state: DecodeState, plan: CachePlan, query: Tensor, wanted: Tensor) -> None:
        """Which keys and values are now those of a full evaluation, and whether all logits are.

        Raises:
            PolicyError: when the cache says that it is exact and was not.
        """
        blocks = state.model_blocks
        old = state.present & ~query & ~state.fresh
        sound = blocks < least(blocks, old)
        if plan.visible is not None:
            sound = torch.zeros_like(sound)
        state.fresh = torch.where(query, sound, state.fresh)
        lacking = (wanted & ~state.known) | (state.sources(state.known) & query & ~sound)
        state.exact = state.exact & ~lacking.any(1)
        cache = state.recipe.cache
        if cache.exactness(state.spec) and not bool(state.exact.all()):
            raise PolicyError(
                f"the {cache.type} cache says that it is exact, but leaves logits out or reads outdated keys and values"
            )

    def _note(self, state: DecodeState, query: Tensor, branches: int) -> None:
        self.nfe += query.any(1) * branches
        self.token_forwards += query.sum(1) * branches
        self.kv_bytes = max(self.kv_bytes, sum(store.nbytes for store in self._stores.values()))
        state.age = torch.where(query, 0, state.age)
        state.seen = torch.where(query, state.x, state.seen)
        if state.recipe.cache.keeps == "kv":
            state.drift = torch.where(query & state.stored, self._stores[MAIN].drift[:, :-1], 0.0)
            state.stored = state.stored | query


def _merge(known: Tensor, new: Tensor, reused: Tensor, old: Tensor) -> Tensor:
    """Logits of the positions ``known`` and ``reused``, row by row."""
    number = torch.arange(known.numel(), device=known.device).view_as(known)
    order = torch.cat([number[known], number[reused]]).argsort()
    return torch.cat([new.to(old.dtype), old])[order]


def least(blocks: Tensor, positions: Tensor) -> Tensor:
    """(B, 1), the first block of the attention with one of ``positions``; past the last block where there is none."""
    return blocks.masked_fill(~positions, int(blocks.max()) + 1).amin(1, keepdim=True)


def _complete(state: DecodeState, plan: CachePlan, query: Tensor) -> Tensor:
    """The queries, and what they may see that has no keys and values yet."""
    blocks = state.model_blocks
    while True:
        last = blocks.masked_fill(~query, blocks.min() - 1).amax(1, keepdim=True)
        seen = state.present & (blocks <= last) & ~state.stored
        if plan.visible is not None and plan.visible.ndim == 2:
            seen = seen & plan.visible
        elif plan.visible is not None:
            seen = seen & (plan.visible & query[..., None]).any(1)
        if not bool((seen & ~query).any()):
            return query
        query = query | seen


def _predicted_by(state: DecodeState, query: Tensor) -> Tensor:
    """Bool, the positions that the outputs at ``query`` predict."""
    if not state.spec.logit_shift:
        return query
    after = torch.zeros_like(query)
    after[:, 1:] = query[:, :-1]
    return (after & state.present & (state.columns > state.first[:, None])) | (
        query & (state.columns == state.first[:, None])
    )


def _groups(counts: Tensor) -> list[Tensor]:
    """Rows with something to evaluate, in forward passes of which no row fills less than half."""
    groups: list[list[int]] = []
    largest = 0
    for count, row in sorted(((count, row) for row, count in enumerate(counts.tolist()) if count), reverse=True):
        if 2 * count < largest or not groups:
            groups.append([])
            largest = count
        groups[-1].append(row)
    return [torch.tensor(sorted(group), device=counts.device) for group in groups]


def check_logits(logits: Tensor) -> None:
    """Refuses logits that no token can be chosen by.

    Raises:
        InputError: when some are NaN, or a position has no token left.
    """
    if logits.numel() and bool(torch.isnan(logits).any()):
        raise InputError("the denoiser's logits are NaN; look at its weights, its precision and its conditioning")
    if logits.numel() and bool((logits == -torch.inf).all(-1).any()):
        raise InputError("no token is left at some position; the logits processors forbid all that the denoiser offers")
