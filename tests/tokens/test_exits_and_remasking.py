"""Exits, remasking, logits processors and block schedules against exact laws and rules by hand."""

import math
from itertools import product

import oracles
import pytest
import torch
from oracles import CERTAIN, EOS, SAMPLED, success
from token_laws import MASK, by_position, counts_by_step, fits, joint, spec
from token_models import llama_denoiser

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    RECIPES,
    Ancestral,
    CallableDenoiser,
    Credit,
    Edit,
    EndSuppression,
    EntropyEnd,
    EosExit,
    EotExit,
    Fixed,
    MaskGIT,
    Nested,
    Prophet,
    Quota,
    Recipe,
    ReMDM,
    Sliding,
    StableConfident,
    Threshold,
    decode,
)

ONE = Recipe(unmask=Quota(tokens=1))


@pytest.mark.parametrize(("leave", "passes"), [
    (Prophet(), 1), (StableConfident(), 2), (StableConfident(steps=2), 3), ({"type": "none"}, 6)
], ids=["prophet", "stable", "stable for two", "none"])  # fmt: skip
def test_exits_leave_when_all_is_certain_and_stay_while_something_depends(leave, passes):
    for make in CERTAIN:
        rate, decoded = success(make(), ONE.replace(exit=leave, blocks=Fixed(length=2)), 2)
        assert (rate, decoded.nfe.tolist(), decoded.exact) == (1, [passes] * 2, True)
    rate, decoded = success(oracles.shuffle(), ONE.replace(exit=leave, propose=SAMPLED), 3)
    assert (rate, decoded.nfe.tolist()) == (1, [6] * 3)


@pytest.mark.parametrize(("gap", "passes"), [(8.0, 1), (6.0, 3), (5.0, 3), (3.0, 6), (2.0, 6)])
def test_prophet_lowers_its_threshold_with_progress(gap, passes):
    """One of six tokens per step: 0.33 is passed after two, 0.67 after five, when there is one left."""
    denoiser = CallableDenoiser(lambda ids: torch.tensor([gap, 0.0, -1.0]).expand(*ids.shape, -1), spec(3))
    decoded = decode(denoiser, [[]], 6, ONE.replace(exit=Prophet()))
    assert decoded.nfe.item() == passes


def test_prophet_looks_at_masks_alone():
    """Two positions are wide apart, two are not: once these are committed the mean gap is that of the others."""
    gaps = torch.tensor([9.0, 9.0, 0.1, 0.1])
    logits = torch.stack([gaps, torch.zeros(4), torch.full((4,), -1.0)], dim=1)
    denoiser = CallableDenoiser(lambda ids: logits.expand(len(ids), -1, -1), spec(3))
    wait = {"thresholds": (8.0, 8.0, 8.0)}
    assert counts_by_step(decode(denoiser, [[]], 4, ONE.replace(exit=Prophet(**wait)))) == [1, 1, 1, 1]
    split = ONE.replace(blocks=Fixed(length=2), exit=Prophet(**wait, scope="block"))
    assert counts_by_step(decode(denoiser, [[]], 4, split)) == [2, 1, 1]


def wavering(flips):
    """Token 0 is likeliest in the first ``flips`` evaluations, then token 1; always surely."""
    calls = []

    def logits(ids):
        calls.append(len(ids))
        return torch.tensor([20.0, 0.0] if len(calls) <= flips else [0.0, 20.0]).expand(*ids.shape, -1)

    return CallableDenoiser(logits, spec(2))


def test_what_is_confident_has_to_be_stable_too():
    assert decode(wavering(0), [[]], 6, ONE.replace(exit=StableConfident())).nfe.item() == 2
    assert decode(wavering(1), [[]], 6, ONE.replace(exit=StableConfident())).nfe.item() == 3
    assert decode(by_position([0.9] * 6), [[]], 6, ONE.replace(exit=StableConfident())).nfe.item() == 6
    assert decode(by_position([0.9] * 6), [[]], 6, ONE.replace(exit=StableConfident(entropy=0.5))).nfe.item() == 2


def test_a_foreseen_end_saves_what_comes_after_it():
    """Items in blocks of four, then ends: in the first step the end is certain, and positions past it are dropped."""
    task = oracles.copy()
    recipe = Recipe(blocks=Fixed(length=4), unmask=Quota(tokens=1))
    prompts = task.prompts(2)
    costs = {}
    for leave in (EotExit(), EotExit(drop=False), EosExit(drop=True), {"type": "none"}):
        decoded = decode(task.denoiser(), prompts, 16, recipe.replace(exit=leave))
        assert decoded.tokens.shape == (2, 22)
        assert task.right(prompts, decoded.answers).all()
        costs[str(leave)] = (decoded.nfe[0].item(), decoded.token_forwards[0].item())
    assert list(costs.values()) == [(7, 22 + 6 * 13), (7, 6 * 22 + 13), (7, 7 * 22), (16, 16 * 22)]


@pytest.mark.parametrize(("threshold", "ends"), [(0.5, 2), (0.65, 6), (1.0, 6)])
def test_an_unlikely_end_does_not_cut(threshold, ends):
    """An end of probability 0.6 at position 1, the likeliest token there, which is committed last."""
    law = by_position([0.05, 0.6, 0.05, 0.05, 0.05, 0.05], eos_ids=(EOS,))
    steps = decode(law, [[]], 6, ONE.replace(exit=EotExit(threshold=threshold)))
    if ends == 2:
        assert steps.ends.item() == 2
        assert steps.nfe.item() == 2
    else:
        assert steps.ends.item() == decode(law, [[]], 6, ONE.replace(exit=EosExit(drop=True))).ends.item()
    with pytest.raises(InputError, match="the eot exit needs an end-of-sequence token; give eos_ids"):
        decode(by_position([0.5]), [[]], 1, ONE.replace(exit=EotExit()))


RULES = {
    "cap": ReMDM(rule="cap", eta=0.3),
    "rescale": ReMDM(rule="rescale", eta=0.6),
    "conf": ReMDM(rule="conf"),
    "loop": ReMDM(rule="loop", eta=0.3, on=0.7, off=0.2, alpha_on=0.6),
}
LARGEST = (0.95, 0.6, 0.3)


def visible_share(rule, time):
    if rule != "loop":
        return 1 - time
    if time > 0.7:
        return (1 - time) * 0.6 / 0.3
    return 0.6 if time > 0.2 else 1 - time * 0.4 / 0.2


def reveal_law(rule, steps):
    """Law of the steps at which three positions are committed last, by enumeration over what is visible when."""
    law = {(None,) * 3: 1.0}
    for step in range(steps):
        time, after = (steps - step) / steps, (steps - step - 1) / steps
        now, then = visible_share(rule, time), visible_share(rule, after)
        most = min(1.0, (1 - then) / now) if now else 1.0
        following = {}
        for state, chance in law.items():
            shown = [at for at in range(3) if state[at] is not None]
            weights = {at: math.exp(-LARGEST[at]) for at in shown}
            sigma = {
                "cap": min(0.3, most),
                "rescale": 0.6 * most,
                "loop": min(0.3, most) if 0.2 < time <= 0.7 else 0.0,
                "conf": 0.0,
            }[rule]
            rate = 1.0 if after == 0 else (then - (1 - sigma) * now) / (1 - now)
            for moves in product((False, True), repeat=3):
                move, new = chance, []
                for at, moved in enumerate(moves):
                    take = rate
                    if at in weights:
                        take = most * weights[at] / sum(weights.values()) if rule == "conf" else sigma
                    move *= take if moved else 1 - take
                    new.append((step if state[at] is None else None) if moved else state[at])
                if move > 0:
                    following[tuple(new)] = following.get(tuple(new), 0.0) + move
        law = following
    return law


@pytest.mark.parametrize("rule", RULES)
def test_remasking_has_the_law_of_its_rule(rule):
    """Commits and remasks together, until the clock is out: also after a step that left no mask."""
    steps, rows = 5, 1000
    recipe = Recipe(unmask=Ancestral(steps=steps), remask=RULES[rule])
    decoded = decode(by_position(LARGEST), [[]] * rows, 3, recipe)
    assert fits(decoded.reveal_step, reveal_law(rule, steps)) > 0.01
    without = decode(by_position(LARGEST), [[]] * rows, 3, recipe.replace(remask={"type": "none"}))
    assert fits(without.reveal_step, dict.fromkeys(product(range(steps), repeat=3), steps**-3)) > 0.01
    assert (decoded.nfe <= steps).all()
    assert (decoded.steps > without.steps).any()


def test_remasking_repairs_what_was_committed_too_early():
    """Two bits that are always equal: drawn in the same one of two steps they differ half of the time."""
    table = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)

    def wrong(recipe):
        tokens = decode(joint(table + 1e-9), [[]] * 600, 2, recipe).tokens
        return (tokens[:, 0] != tokens[:, 1]).double().mean().item()

    few = wrong(Recipe(unmask=Ancestral(steps=2), propose=SAMPLED))
    assert abs(few - 0.25) <= 3 * math.sqrt(0.25 * 0.75 / 600)
    many = Recipe(unmask=Ancestral(steps=30), propose=SAMPLED)
    assert wrong(many.replace(remask=ReMDM(rule="rescale", eta=1))) < 0.1


@pytest.mark.parametrize(("fields", "words"), [
    ({"remask": ReMDM(rule="cap")}, "the rates of ancestral sampling, not of quota; use unmask ancestral"),
    ({"remask": {"type": "remdm", "rule": "conf", "eta": 0.1}}, "the conf rule has no eta"),
    ({"remask": {"type": "remdm", "rule": "loop", "off": 0.6}}, "off has to be below on; got 0.6 and 0.55"),
    ({"remask": {"type": "edit", "threshold": 0}}, "greater than 0; got 0"),
    ({"blocks": Sliding(), "unmask": Ancestral()}, "the ancestral policy plans the steps of a block, and a sliding"),
    ({"blocks": Sliding(), "unmask": Quota(steps=4)}, "give a number of tokens per step, or use fixed blocks"),
    ({"blocks": Sliding(), "unmask": MaskGIT()}, "the maskgit policy plans the steps"),
    ({"blocks": EntropyEnd(), "unmask": Quota(steps=4)}, "does not know its number of blocks in advance"),
    ({"blocks": {"type": "entropy-end", "shortest": 9, "longest": 8}}, "the shortest block, 9, is longer than"),
    ({"blocks": {"type": "nested", "length": 4}}, "a sub-block of 8 does not fit into a block of 4"),
    ({"exit": {"type": "eot", "threshold": 0}}, "greater than 0; got 0"),
    ({"logits": [{"type": "credit", "decay": 1}]}, "less than 1; got 1"),
])  # fmt: skip
def test_combinations_and_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        ONE.replace(**fields)


def fickle(sure, size=2):
    """At a committed bit the other bit has probability ``sure``; at a mask bit 0 has."""
    law = torch.tensor([sure, 1 - sure], dtype=torch.float64).log()
    return CallableDenoiser(lambda ids: torch.where((ids == 0)[..., None], law.flip(0), law), spec(size))


@pytest.mark.parametrize(("post_steps", "blocks", "passes"), [(0, 4, 4), (3, 4, 7), (3, 2, 10), (16, 4, 20)])
def test_editing_ends(post_steps, blocks, passes):
    """A denoiser that never agrees with what is there: as many steps more per block as allowed, and no more."""
    recipe = ONE.replace(blocks=Fixed(length=blocks), remask=Edit(post_steps=post_steps))
    decoded = decode(fickle(0.9), [[]] * 2, 4, recipe)
    assert decoded.nfe.tolist() == [passes] * 2
    order = decoded.reveal_step[0].tolist()
    last = [max(order[at // blocks * blocks : (at // blocks + 1) * blocks]) for at in range(4)]
    edits = [last[at] - order[at] + post_steps for at in range(4)]
    assert decoded.tokens.tolist() == [[count % 2 for count in edits]] * 2


def test_editing_needs_probability_and_stops_when_nothing_changes():
    unsure = decode(fickle(0.6), [[]], 3, ONE.replace(remask=Edit(threshold=0.7)))
    assert (unsure.tokens.tolist(), unsure.nfe.item()) == ([[0, 0, 0]], 4)
    laws = torch.tensor([[3.0, -3.0], [-3.0, 3.0]])
    settled = CallableDenoiser(lambda ids: laws[(ids != MASK).any(1).long()][:, None].expand(*ids.shape, -1), spec(2))
    decoded = decode(settled, [[]], 3, ONE.replace(remask=Edit()))
    assert (decoded.tokens.tolist(), decoded.nfe.item()) == ([[1, 1, 1]], 4)
    assert decode(settled, [[]], 3, ONE).tokens.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("cache", ["none", "refresh-all", "block-prefix"])
def test_editing_with_block_causal_attention_is_exact(cache):
    """Also where the schedule's block holds several of the attention's, of which the last may be full first."""
    recipe = Recipe(unmask=Quota(tokens=2), remask=Edit(threshold=0.2, post_steps=2), cache={"type": cache})
    causal = llama_denoiser(attention="block-causal", block_length=4)
    plain = decode(causal, [[3, 4, 5], [7]], 10, recipe.replace(cache={"type": "none"}))
    decoded = decode(causal, [[3, 4, 5], [7]], 10, recipe)
    assert decoded.exact
    assert torch.equal(decoded.tokens, plain.tokens)
    assert (decoded.nfe > 5).all()


def test_editing_leaves_blocks_that_are_done_alone():
    decoded = decode(fickle(0.9), [[]], 4, ONE.replace(blocks=Fixed(length=1), remask=Edit(post_steps=1)))
    assert decoded.tokens.tolist() == [[1, 1, 1, 1]]
    assert decoded.nfe.item() == 8


def watched(denoiser, recipe, length, read, prompt=((),)):
    seen = []
    decode(denoiser, [list(row) for row in prompt], length, recipe, watch=lambda state: seen.append(read(state)))
    return seen


@pytest.mark.parametrize("length", [4, 2])
def test_ends_are_held_back_less_and_less_over_all_blocks(length):
    """Position 3 proposes the end, at 0.9, the others an item, at 0.6: from progress 1/2 on the end is surer."""
    probs = torch.tensor([[0.05, 0.6, 0.35]] * 3 + [[0.9, 0.05, 0.05]], dtype=torch.float64)
    denoiser = CallableDenoiser(lambda ids: probs.log().expand(len(ids), -1, -1), spec(3, eos_ids=(0,)))
    recipe = ONE.replace(blocks=Fixed(length=length), logits=EndSuppression())

    def read(state):
        return state.progress.item(), state.confidence()[0, 3].item(), state.confidence("entropy")[0, 3].item()

    entropy = -(probs[3] * probs[3].log()).sum().item()
    seen = watched(denoiser, recipe, 4, read)
    assert [progress for progress, _, _ in seen] == [0, 0.25, 0.5, 0.75]
    for progress, confidence, doubt in seen[0 if length == 4 else 2 : 3]:
        factor = 0.4 + 0.6 * progress
        assert (confidence, doubt) == pytest.approx((0.9 * factor, -entropy / factor))
    assert decode(denoiser, [[]], 4, recipe).reveal_step.tolist() == [[0, 1, 3, 2]]
    assert decode(denoiser, [[]], 4, ONE).reveal_step.tolist() == [[1, 2, 3, 0]]
    with pytest.raises(InputError, match="eoser needs an end-of-sequence token; give eos_ids"):
        decode(by_position([0.5]), [[]], 1, ONE.replace(logits=EndSuppression()))


def test_credit_grows_with_every_step_that_a_token_is_likeliest():
    """At a constant probability p the credit after k steps is p^0.2 (1 + 0.8 + ... + 0.8^(k-1))."""
    denoiser = by_position([0.6, 0.9, 0.8, 0.7])
    gains = watched(
        denoiser, ONE.replace(logits=Credit()), 4, lambda state: state.spread(state.logits[:, 0], 0.0)[0, 0].item()
    )
    for step, logit in enumerate(gains):
        credit = 0.6**0.2 * sum(0.8**k for k in range(step + 1))
        assert logit == pytest.approx(math.log(0.6) + 0.7 * math.log1p(credit), rel=1e-5)
    plain, credited = (
        decode(by_position([0.55] * 8), [[]], 8, Recipe(unmask=Threshold(threshold=0.75), logits=logits))
        for logits in ((), Credit())
    )
    assert plain.nfe.item() == 8
    assert credited.nfe.item() < 5


def test_sub_blocks_start_anew_with_each_block():
    recipe = Recipe(unmask=Quota(tokens=9), blocks=Nested(length=5, inner=2))
    spans = watched(by_position([0.5] * 8), recipe, 8, lambda state: (state.block_start.item(), state.block_end.item()))
    assert spans == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 8)]
    causal = llama_denoiser(attention="block-causal", block_length=4)
    decoded = decode(causal, [[1, 2]], 8, Recipe(unmask=Quota(tokens=9), blocks=Nested(length=None, inner=3)))
    assert decoded.reveal_step[0, 2:].tolist() == [0, 1, 2, 2, 2, 3, 4, 4]
    with pytest.raises(InputError, match="no blocks of its own; give the nested schedule a length"):
        decode(by_position([0.5]), [[]], 1, recipe.replace(blocks=Nested(length=None)))


def test_a_window_slides_with_the_first_mask():
    law = by_position([0.4, 0.5, 0.9, 0.8, 0.7, 0.6])
    recipe = ONE.replace(blocks=Sliding(length=3))
    windows = watched(law, recipe, 6, lambda state: state.candidates[0].nonzero()[:, 0].tolist())
    assert windows == [[0, 1, 2], [0, 1], [0], [3, 4, 5], [4, 5], [5]]
    assert decode(law, [[]], 6, recipe).reveal_step.tolist() == [[2, 1, 0, 3, 4, 5]]
    first = by_position([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    windows = watched(first, recipe, 6, lambda state: state.candidates[0].nonzero()[:, 0].tolist())
    assert windows == [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5], [5]]


@pytest.mark.parametrize(("fields", "expected"), [
    ({"longest": 4, "shortest": 1}, [4, 2, 3, 1]),
    ({"longest": 4, "shortest": 3}, [4, 5 - 1, 2]),
    ({"longest": 2, "shortest": 1}, [2, 2, 2, 2, 1, 1]),
    ({"longest": 4, "shortest": 1, "bound": 5}, [4, 4, 2]),
])  # fmt: skip
def test_blocks_end_before_what_is_uncertain(fields, expected):
    """Ten positions, of which 6 and 9 are uncertain. The first block has nothing to go by."""
    law = by_position([0.99] * 6 + [0.3] + [0.99] * 2 + [0.3])
    decoded = decode(law, [[]], 10, Recipe(unmask=Quota(tokens=9), blocks=EntropyEnd(**({"bound": 0.5} | fields))))
    assert counts_by_step(decoded) == expected
    assert decoded.exact


MINE = ["mdlm", "radd", "first-hitting", "remdm-cap", "remdm-rescale", "remdm-conf", "remdm-loop", "dimple",
        "local-leap", "entropy-bound", "prophet", "ass", "eoser", "maskgit", "amused", "llada-2.1"]  # fmt: skip


@pytest.mark.parametrize("name", MINE)
def test_presets_decode(name):
    recipe = RECIPES[name]
    if recipe.unmask.type == "ancestral":
        recipe = recipe.replace(unmask=Ancestral(steps=12))
    attention = {"attention": "block-causal", "block_length": 4} if name == "llada-2.1" else {}
    decoded = decode(llama_denoiser(**attention), [[1, 2, 3], [4]], 8, recipe)
    assert not (decoded.answers == 23).any()
    assert decoded.exact
    assert (decoded.nfe <= 40).all()


def test_presets_have_the_numbers_of_their_papers():
    assert (RECIPES["mdlm"].unmask, RECIPES["radd"].unmask) == (Ancestral(steps=128), Ancestral(steps=1024))
    assert {RECIPES[f"remdm-{rule}"].remask.rule for rule in RULES} == set(RULES)
    assert {RECIPES[f"remdm-{rule}"].propose.top_p for rule in RULES} == {0.9}
    assert RECIPES["maskgit"].unmask.temperature == (4.5, 0)
    assert RECIPES["amused"].unmask == MaskGIT(steps=12, temperature=(2, 0))
    assert RECIPES["llada-2.1"].remask == Edit(threshold=0.5, post_steps=16)
