"""The loop that decodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .denoiser import Denoiser
from .evaluate import Evaluator, check_logits, least
from .recipe import RECIPES, Recipe
from .result import Decoded
from .slots import Choice, PolicyError
from .state import DecodeState, pad_left, top


@torch.no_grad()
def decode(
    denoiser: Denoiser,
    prompt: Tensor | Sequence[Any],
    gen_length: int,
    recipe: Recipe | str = "llada",
    *,
    seeds: int | Sequence[int] = 0,
    cond: Mapping[str, Tensor] | None = None,
    uncond: Mapping[str, Tensor] | None = None,
    resources: Mapping[str, Any] | None = None,
    watch: Callable[[DecodeState], None] | None = None,
    follow: Decoded | None = None,
) -> Decoded:
    """Decodes an answer to each prompt by unmasking.

    Args:
        denoiser: the network.
        prompt: (B, P) int64, or one sequence of ids per row, of any lengths. Masks among them are filled in too.
        gen_length: masks to append to each prompt.
        recipe: how, or the name of a preset.
        seeds: of the rows; a single number stands for it and those that follow it.
        cond: conditioning tensors (B, ...) by name.
        uncond: those of guidance's branch without condition.
        resources: objects that policies ask for by name, such as a second model.
        watch: called with the state in each step, when logits and proposals are at hand and before anything is
            committed; it must not change the state.
        follow: an earlier result on the same prompts: its tokens are committed in its order, whatever the policies
            choose. For comparing logits along one trajectory.

    Returns:
        Tokens, costs, and whether the cache was exact.

    Raises:
        InputError: when the input, the recipe and the denoiser do not fit together.
        PolicyError: when a policy breaks a rule of the loop.
    """
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    recipe.suits(denoiser)
    state = _start(denoiser, prompt, gen_length, recipe, seeds)
    batch = state.x.shape[0]
    state.cond, state.uncond, state.resources = _rows_of(cond, batch), _rows_of(uncond, batch), resources or {}
    _check_follow(follow, state)
    zeros = torch.zeros(batch, dtype=torch.long, device=state.x.device)
    evaluator = Evaluator(denoiser, zeros, zeros.clone())
    for policy in recipe.policies:
        policy.begin(state)
    generated = int(state.editable.sum(1).max())
    limit = recipe.unmask.limit(generated) + recipe.remask.limit(generated)
    while bool(state.alive.any()):
        if int(state.step.max()) > limit:
            raise PolicyError(
                f"policies {recipe.unmask.type} and {recipe.remask.type} go on after {limit} steps; raise their limit"
            )
        enter_blocks(state)
        _evaluate(state, evaluator)
        if watch is not None:
            watch(state)
        choice = choose(state) if follow is None else _followed(state, follow)
        commit(state, choice)
    return _result(state, evaluator)


def _start(
    denoiser: Denoiser, prompt: Tensor | Sequence[Any], gen_length: int, recipe: Recipe, seeds: int | Sequence[int]
) -> DecodeState:
    spec = denoiser.spec
    fill = spec.eos_ids[0] if spec.eos_ids else 0
    ids, first = pad_left(prompt, fill, denoiser.device)
    batch, longest = ids.shape
    if not batch:
        raise InputError("there is no prompt; give at least one row (an empty one is fine)")
    if gen_length < 0:
        raise InputError(f"gen_length counts tokens; got {gen_length}")
    known = (ids >= 0) & ((ids < spec.vocab_size) | (ids == spec.mask_id))
    if not bool(known.all()):
        raise InputError(f"a prompt has token {int(ids[~known][0])}; the vocabulary ends at {spec.vocab_size - 1}")
    x = torch.cat([ids, ids.new_full((batch, gen_length), spec.mask_id)], dim=1)
    seeds = tuple(seeds + row for row in range(batch)) if isinstance(seeds, int) else tuple(seeds)
    if len(seeds) != batch:
        raise InputError(f"{len(seeds)} seeds for {batch} prompts; give one per row, or a single number")
    state = DecodeState(spec=spec, recipe=recipe, x=x, first=first, answer=longest, seeds=seeds)
    if not bool(state.alive.any()):
        raise InputError("there is nothing to decode; give gen_length, or masks among the prompt")
    return state


def _rows_of(tensors: Mapping[str, Tensor] | None, batch: int) -> Mapping[str, Tensor]:
    for name, tensor in (tensors or {}).items():
        if tensor.shape[0] != batch:
            raise InputError(f"the conditioning {name!r} has {tensor.shape[0]} rows for {batch} prompts")
    return tensors or {}


def enter_blocks(state: DecodeState) -> None:
    """Moves rows whose block is full to their next one, and all rows where blocks slide."""
    moving, sliding = state.alive & ~state.open.any(1), state.recipe.blocks.slides
    if not (sliding or bool(moving.any())):
        return
    start, end = state.recipe.blocks.next(state)
    taking = state.alive & ~state.held if sliding else moving
    state.block_start = torch.where(taking, start, state.block_start)
    state.block_end = torch.where(taking, end, state.block_end)
    if sliding:
        moving = moving & (state.block_index < 0)
    state.block_index = state.block_index + moving.long()
    state.block_step = torch.where(moving, 0, state.block_step)
    state.block_masks = torch.where(moving, state.open.sum(1), state.block_masks)
    if bool((moving & (state.block_masks == 0)).any()):
        raise PolicyError(f"the {state.recipe.blocks.type} schedule gave a live row a block without masks")


def _evaluate(state: DecodeState, evaluator: Evaluator) -> None:
    """Logits, and the tokens that they propose."""
    recipe = state.recipe
    evaluator.run(state, recipe.cache.plan(state), wanted_by(state))
    propose(state)


def wanted_by(state: DecodeState) -> Tensor:
    """(B, L) bool, the positions whose logits somebody reads."""
    recipe, wanted = state.recipe, state.open
    for policy in recipe.policies:
        asked = policy.wants(state)
        if asked is not None:
            wanted = wanted | (asked & state.present & state.alive[:, None])
    return wanted


def propose(state: DecodeState) -> None:
    """From ``state.raw`` at the known positions to processed logits and proposed tokens."""
    recipe, logits = state.recipe, state.raw
    for processor in recipe.logits:
        logits = processor.process(state, logits)
    if state.spec.mask_id < logits.shape[1]:
        logits = logits.index_fill(1, torch.tensor([state.spec.mask_id], device=logits.device), -torch.inf)
    logits = recipe.constraint.restrict(state, logits)
    check_logits(logits)
    state.remember(logits)
    state.x0 = state.x.clone()
    state.x0[state.at] = recipe.propose.propose(state)
    stuck = state.alive & ~state.held & ~state.candidates.any(1)
    if bool(stuck.any()):
        raise PolicyError(f"the {recipe.cache.type} cache evaluates no open position of row {int(stuck.nonzero()[0])}")


def choose(state: DecodeState) -> Choice:
    """What the policies commit."""
    recipe = state.recipe
    select = recipe.unmask.select(state) & state.candidates
    quota = recipe.unmask.quota(state)
    if quota is not None:
        due = torch.minimum(quota, state.candidates.sum(1))
        if bool((state.alive & (select.sum(1) != due)).any()):
            raise PolicyError(f"the {recipe.unmask.type} policy does not keep to its quota")
    if not recipe.unmask.paced:
        idle = state.alive & ~select.any(1)
        select = select | top(state.confidence("prob"), state.candidates, idle.long())
    everything = recipe.exit.all_in(state)
    if everything is not None:
        select = select | (state.masked & state.known & (everything & state.alive)[:, None])
    choice = recipe.constraint.filter(state, Choice(select, state.x0))
    failed = choice.failed
    choice = recipe.scorer.accept(state, choice)
    given_up = [part for part in (failed, choice.failed) if part is not None]
    choice = Choice(choice.select & state.masked & state.known, choice.tokens, sum_of(given_up))
    stalled = state.alive & ~state.held & ~choice.select.any(1)
    if choice.failed is not None:
        stalled = stalled & ~choice.failed
    if not recipe.unmask.paced and bool(stalled.any()):
        raise PolicyError(
            f"row {int(stalled.nonzero()[0])} makes no progress: the {recipe.constraint.type} constraint or the "
            f"{recipe.scorer.type} scorer took back every choice; keep one or give the row up"
        )
    return choice


def sum_of(masks: Sequence[Tensor]) -> Tensor | None:
    """Whether any of the masks is True; None for none."""
    return torch.stack(list(masks)).any(0) if masks else None


def _followed(state: DecodeState, earlier: Decoded) -> Choice:
    if bool((state.alive & (state.step >= earlier.steps)).any()):
        raise InputError("the trajectory ends while masks are left; decode with the exit that it was made with")
    select = (earlier.reveal_step == state.step[:, None]) & state.masked
    if not bool((~select | state.known).all()):
        raise PolicyError("the trajectory commits positions whose logits this recipe does not compute at that step")
    return Choice(select, earlier.tokens)


def _check_follow(earlier: Decoded | None, state: DecodeState) -> None:
    if earlier is None:
        return
    if state.recipe.remask.rewrites:
        raise InputError(f"a trajectory cannot be followed with the {state.recipe.remask.type} remask policy; use none")
    same = earlier.tokens.shape == state.x.shape and bool((earlier.tokens == state.x)[~state.editable].all())
    if not same:
        raise InputError("the trajectory to follow is of other prompts or another length; decode the same ones")


def commit(state: DecodeState, choice: Choice) -> None:
    """Writes the choice, asks for rewrites and ends, and closes the step."""
    recipe, before, present = state.recipe, state.x, state.present
    select, tokens = choice.select & state.alive[:, None], choice.tokens
    if bool((select & ((tokens == state.spec.mask_id) | (tokens < 0) | (tokens >= state.spec.vocab_size))).any()):
        raise PolicyError("a policy commits the mask or a token that is not in the vocabulary")
    state.x = torch.where(select, tokens, state.x)
    state.reveal_step = torch.where(select, state.step[:, None], state.reveal_step)
    chosen = state.spread(
        state.log_probs.gather(1, tokens[state.at].clamp(0, state.spec.vocab_size - 1)[:, None])[:, 0].exp().double(),
        torch.nan,
    )
    state.reveal_conf = torch.where(select, chosen, state.reveal_conf)
    rewritten = recipe.remask.select(state, select)
    mine = state.editable & state.present & state.alive[:, None] & ~select & (state.x != state.spec.mask_id)
    rewrite = rewritten.select & mine
    state.x = torch.where(rewrite, rewritten.tokens, state.x)
    state.changed = state.x != before
    recipe.cache.on_commit(state, select)
    if bool(rewrite.any()):
        recipe.cache.invalidate(state, rewrite)
    held = recipe.remask.holds(state)
    ends = recipe.exit.ends(state)
    if ends is not None:
        state.end = torch.where(state.alive, torch.minimum(state.end, ends), state.end)
    blocks, timed = state.model_blocks, state.spec.time_conditioned
    state.fresh = state.fresh & (blocks < least(blocks, state.changed | (present & ~state.present))) & (not timed)
    if choice.failed is not None:
        state.failed = state.failed | (choice.failed & state.alive)
    state.step = state.step + state.alive.long()
    state.age = state.age + state.alive[:, None].long()
    state.block_step = state.block_step + state.alive.long()
    if held is not None:
        block = state.in_block & state.editable & state.present
        state.held = held & block.any(1) & ~(block & state.masked).any(1)
    state.alive = state.alive & (state.masked.any(1) | state.held) & ~state.failed


def _result(state: DecodeState, evaluator: Evaluator) -> Decoded:
    past = (state.columns >= state.end[:, None]) & state.editable
    tokens = state.x
    if state.spec.eos_ids:
        tokens = torch.where(past, state.spec.eos_ids[0], tokens)
    eos = torch.isin(tokens, torch.tensor(state.spec.eos_ids, dtype=torch.long, device=tokens.device)) & state.editable
    counted = state.editable & (eos.long().cumsum(1) - eos.long() == 0) & (tokens != state.spec.mask_id)
    return Decoded(
        tokens=tokens,
        answer_start=state.answer,
        first=state.first,
        ends=state.end,
        failed=state.failed,
        nfe=evaluator.nfe,
        token_forwards=evaluator.token_forwards,
        new_tokens=counted.sum(1),
        steps=state.step,
        reveal_step=state.reveal_step,
        reveal_conf=state.reveal_conf,
        exact=bool(state.exact.all()),
        kv_bytes=evaluator.kv_bytes,
        scorer_nfe=state.scorer_nfe,
        scorer_token_forwards=state.scorer_token_forwards,
    )
