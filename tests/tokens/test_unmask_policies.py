"""Unmask policies against closed forms, exact laws and rules by hand."""

import math
from itertools import pairwise, product

import oracles
import pytest
import torch
from diffusers import AmusedScheduler
from oracles import CERTAIN, SAMPLED, shuffle_success_of, success
from token_laws import MASK, by_position, committed_first, counts_by_step, fits, joint, spec

from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    Ancestral,
    Ascending,
    AscendingBlocks,
    CallableDenoiser,
    Dimple,
    EntropyBound,
    Factor,
    FirstHitting,
    Fixed,
    LocalLeap,
    MaskGIT,
    OutputCache,
    PositionWeighted,
    Quota,
    Recipe,
    decode,
)

ADAPTIVE = [
    Factor(),
    EntropyBound(),
    EntropyBound(strict=True),
    EntropyBound(error="prob"),
    EntropyBound(error="margin"),
    Dimple(),
    LocalLeap(),
]
TABLE = torch.tensor([[[0.3, 0.02], [0.08, 0.2]], [[0.05, 0.15], [0.13, 0.07]]], dtype=torch.float64)
"""A joint law of three binary tokens."""


def first_step(denoiser, unmask, length, **fields):
    return committed_first(decode(denoiser, [[]], length, Recipe(unmask=unmask, **fields)))[0]


@pytest.mark.parametrize("unmask", ADAPTIVE, ids=lambda unmask: unmask.type)
def test_adaptive_policies_take_one_pass_where_all_is_certain_and_many_where_all_depends(unmask):
    recipe = Recipe(unmask=unmask, propose=SAMPLED)
    for make in CERTAIN:
        rate, decoded = success(make(), recipe, 2)
        assert (rate, decoded.nfe.tolist()) == (1, [1, 1])
    for items in (2, 4, 6):
        rate, decoded = success(oracles.shuffle(items), recipe, 3)
        assert (rate, decoded.nfe.tolist()) == (1, [items] * 3)


def ancestral_success(left, steps):
    """Each of the masks goes in this step with probability 1 / steps; those that go are drawn with replacement."""
    if not left:
        return 1.0
    rate = 1 / steps
    return sum(
        math.comb(left, now)
        * rate**now
        * (1 - rate) ** (left - now)
        * math.prod((left - i) / left for i in range(now))
        * ancestral_success(left - now, steps - 1)
        for now in range(left + 1)
        if steps > 1 or now == left
    )


@pytest.mark.parametrize(("unmask", "expected"), [
    (Dimple(steps=3), shuffle_success_of([1, 2, 3])),
    (MaskGIT(steps=3), shuffle_success_of([1, 2, 3])),
    (Ascending(), shuffle_success_of([1, 5])),
    (PositionWeighted(tokens=2), shuffle_success_of([2, 2, 2])),
    (FirstHitting(), 1.0),
    (Ancestral(steps=4), ancestral_success(6, 4)),
], ids=lambda value: getattr(value, "type", ""))  # fmt: skip
def test_success_is_that_of_the_closed_form(unmask, expected):
    rows = 700
    rate, _ = success(oracles.shuffle(), Recipe(unmask=unmask, propose=SAMPLED), rows)
    assert abs(rate - expected) <= 3 * math.sqrt(max(expected * (1 - expected), 1e-12) / rows)


def test_first_hitting_has_the_law_of_the_denoiser():
    recipe = Recipe(unmask=FirstHitting(), propose=SAMPLED)
    law = {outcome: TABLE[outcome].item() for outcome in product((0, 1), repeat=3)}
    decoded = decode(joint(TABLE), [[]] * 2000, 3, recipe)
    assert fits(decoded.tokens, law) > 0.01
    assert (decoded.nfe == 3).all()
    orders = {order: 1 / 6 for order in product(range(3), repeat=3) if len(set(order)) == 3}
    assert fits(decoded.reveal_step, orders) > 0.01


def ancestral_law(table, steps):
    """Law of the outcomes by enumeration of partial outcomes: masks go one by one, each at the rate of its step."""
    law = {(None,) * table.ndim: 1.0}
    for step in range(steps):
        rate, after = 1 / (steps - step), {}
        for state, chance in law.items():
            agrees = torch.stack([
                table[full] if all(a is None or a == b for a, b in zip(state, full, strict=True)) else table.sum() * 0
                for full in product((0, 1), repeat=table.ndim)
            ])  # fmt: skip
            ones = [sum(agrees[i] for i, full in enumerate(product((0, 1), repeat=table.ndim)) if full[at])
                    / agrees.sum() for at in range(table.ndim)]  # fmt: skip
            for new in product((None, 0, 1), repeat=table.ndim):
                move = chance
                for old, token, one in zip(state, new, ones, strict=True):
                    if old is not None:
                        move *= float(token == old)
                    elif token is None:
                        move *= 1 - rate
                    else:
                        move *= rate * (one if token else 1 - one).item()
                if move:
                    after[new] = after.get(new, 0.0) + move
        law = after
    return law


def test_ancestral_sampling_has_the_law_of_its_steps():
    decoded = decode(joint(TABLE), [[]] * 2000, 3, Recipe(unmask=Ancestral(steps=2), propose=SAMPLED))
    law = ancestral_law(TABLE, 2)
    assert fits(decoded.tokens, law) > 0.01
    assert fits(decoded.tokens, {outcome: TABLE[outcome].item() for outcome in law}) < 1e-6


def test_steps_that_change_nothing_cost_nothing_with_the_output_cache():
    task, steps, rows = oracles.shuffle(), 12, 250
    recipe = Recipe(unmask=Ancestral(steps=steps), propose=SAMPLED)
    plain = decode(task.denoiser(), task.prompts(rows), 6, recipe)
    cached = decode(task.denoiser(), task.prompts(rows), 6, recipe.replace(cache=OutputCache()))
    assert torch.equal(plain.tokens, cached.tokens)
    assert cached.exact
    nfe = cached.nfe.double()
    expected = steps * (1 - (1 - 1 / steps) ** 6)
    assert abs(nfe.mean() - expected) <= 3 * nfe.std() / math.sqrt(rows)


def told_times(unmask, rows, length):
    """(steps, rows), what a time-conditioned denoiser is told."""
    times = []

    def logits(ids, time):
        times.append(time)
        return torch.zeros(*ids.shape, 4, dtype=torch.float64)

    denoiser = CallableDenoiser(logits, spec(4, time_conditioned=True))
    decode(denoiser, [[]] * rows, length, Recipe(unmask=unmask, propose=SAMPLED))
    return times


def test_a_denoiser_is_told_the_time_of_the_sampler():
    """Of n masks the first is hit at a time of mean n / (n + 1), each later one at (n - 1) / n of that, and so on."""
    times = torch.stack(told_times(FirstHitting(), 400, 3))
    assert (times[1:] < times[:-1]).all()
    for step, expected in enumerate((3 / 4, 3 / 4 * 2 / 3, 3 / 4 * 2 / 3 / 2)):
        assert abs(times[step].mean() - expected) <= 3 * times[step].std() / 20
    seen = [time.max().item() for time in told_times(Ancestral(steps=4), 20, 8)]
    assert seen == [1.0, 0.75, 0.5, 0.25]
    in_blocks = decode(by_position([0.5] * 4), [[]], 4, Recipe(unmask=Ancestral(steps=2), blocks=Fixed(length=2)))
    assert in_blocks.steps.item() <= 4


@pytest.mark.parametrize(("largest", "factor", "count"), [
    ([0.99, 0.9, 0.8, 0.7], 1.0, 3),  # 5 (1 - 0.7) = 1.5
    ([0.99, 0.9, 0.8, 0.7], 1.6, 4),
    ([0.99, 0.9, 0.8, 0.7], 0.5, 2),
    ([0.99, 0.9, 0.8, 0.4], 1.0, 3),  # the last one fails, and stays
    ([0.43, 0.42, 0.41, 0.4], 1.0, 1),
])  # fmt: skip
def test_factor_by_hand(largest, factor, count):
    order = torch.tensor([2, 0, 3, 1])
    shuffled = torch.tensor(largest)[order].tolist()
    chosen = first_step(by_position(shuffled), Factor(factor=factor), 4)
    assert sorted(order[chosen].tolist()) == list(range(count))


@pytest.mark.parametrize(("fields", "count"), [
    ({"error": "prob", "bound": 0.1}, 3),  # 0.01 + 0.05 before the third
    ({"error": "prob", "bound": 0.1, "strict": True}, 2),
    ({"error": "margin", "bound": 0.1}, 3),  # 1 - margin is 4/3 of the error: 0.08
    ({"error": "margin", "bound": 0.07}, 2),
    ({"error": "prob", "bound": 0}, 1),
    ({"error": "prob", "bound": 10, "strict": True}, 4),
])  # fmt: skip
def test_error_bounds_by_hand(fields, count):
    assert first_step(by_position([0.99, 0.95, 0.9, 0.5]), EntropyBound(**fields), 4) == list(range(count))


def test_the_entropy_bound_is_the_definition():
    generator = torch.Generator().manual_seed(4)
    for bound in (0.2, 1.0, 2.5):
        logits = 3 * torch.randn(9, 5, generator=generator, dtype=torch.float64)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        denoiser = CallableDenoiser(lambda ids, logits=logits: logits.expand(len(ids), -1, -1), spec(5))
        for strict in (False, True):
            order, chosen = entropy.argsort().tolist(), []
            for at in order:
                total = sum(entropy[[*chosen, at]]) - (0 if strict else max(entropy[[*chosen, at]]))
                if chosen and total > bound:
                    break
                chosen.append(at)
            assert first_step(denoiser, EntropyBound(bound=bound, strict=strict), 9) == sorted(chosen)


def test_dimple_commits_the_sure_and_else_a_quota_of_each_row():
    sure = by_position([0.97, 0.5, 0.96, 0.5, 0.95, 0.5])
    assert first_step(sure, Dimple(), 6) == [0, 2]
    assert first_step(by_position([0.5] * 6), Dimple(steps=2), 6) != []
    rows = decode(by_position([0.5] * 6), [[1, 1, 1], [MASK, 1, MASK]], 3, Recipe(unmask=Dimple(steps=3)))
    assert [counts_by_step(rows, row) for row in range(2)] == [[1, 1, 1], [1, 2, 2]]
    surest = Dimple(steps=2, confidence="prob")
    assert first_step(by_position([0.5, 0.6, 0.7, 0.8]), surest, 4) == [3]


def test_local_leap_by_hand():
    law = by_position([0.8, 0.95, 0.74, 0.8, 0.5, 0.8])
    assert first_step(law, LocalLeap(radius=1), 6) == [0, 1]
    assert first_step(law, LocalLeap(radius=2), 6) == [0, 1, 3]
    assert first_step(law, LocalLeap(radius=4), 6) == [0, 1, 3, 5]
    assert first_step(by_position([0.8, 0.7, 0.85]), LocalLeap(), 3) == [2]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("masks", "steps"), [(16, 5), (16, 16), (10, 4), (5, 1)])
def test_maskgit_leaves_as_many_masks_as_amused(masks, steps, schedule):
    scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    scheduler.set_timesteps(steps)
    sample, left = torch.full((1, masks), MASK), []
    generator = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.zeros(1, masks, 4), timestep, sample, generator=generator).prev_sample
        left.append(int((sample == MASK).sum()))
    decoded = decode(by_position([0.5] * masks), [[]], masks, Recipe(unmask=MaskGIT(steps=steps, schedule=schedule)))
    ours = [masks - sum(counts_by_step(decoded)[: step + 1]) for step in range(decoded.steps.item())]
    assert ours == [count for step, count in enumerate(left) if step == 0 or left[step - 1] > count]


def test_maskgit_with_the_schedule_of_recap_takes_few_tokens_at_first():
    """256 tokens in 8 steps: floor(256 (1 - (i / 8)^2.5)) are left after step i."""
    left = [256, *(math.floor(256 * (1 - (step / 8) ** 2.5)) for step in range(1, 9))]
    decoded = decode(by_position([0.5] * 256), [[]], 256, Recipe(unmask=MaskGIT(steps=8, schedule="concave")))
    assert counts_by_step(decoded) == [before - after for before, after in pairwise(left)]
    assert left[1:3] == [254, 248]


def test_maskgit_is_annealed_gumbel_noise():
    """With noise of scale 2 the surer of two is first with odds (0.8 / 0.5)^(1/2), without noise always."""
    recipe = Recipe(unmask=MaskGIT(steps=2))
    decoded = decode(by_position([0.5, 0.8]), [[]] * 1500, 2, recipe)
    share = (decoded.reveal_step[:, 1] == 0).double().mean().item()
    expected = 0.8**0.5 / (0.8**0.5 + 0.5**0.5)
    assert abs(share - expected) <= 3 * math.sqrt(expected * (1 - expected) / 1500)
    quiet = decode(by_position([0.5, 0.8]), [[]] * 20, 2, Recipe(unmask=MaskGIT(steps=2, temperature=(0, 0))))
    assert (quiet.reveal_step[:, 1] == 0).all()


@pytest.mark.parametrize(("length", "block_num", "expected"), [
    (16, 1, [1, 2, 4, 9]), (16, 3, [1, 2, 4, 9]), (16, 4, [1, 2, 4, 9]), (127, 1, [1, 2, 4, 8, 16, 32, 64]),
    (128, 4, [1, 2, 4, 8, 16, 32, 65]), (1, 1, [1]), (2, 1, [2]), (6, 2, [1, 5]),
])  # fmt: skip
def test_steps_ascend(length, block_num, expected):
    recipe = Recipe(blocks=AscendingBlocks(block_num=block_num), unmask=Ascending())
    decoded = decode(by_position([0.5] * length), [[]], length, recipe)
    assert counts_by_step(decoded) == expected
    if length == 16:
        start = {1: 0, 3: 3, 4: 1}[block_num]
        assert (decoded.reveal_step[0, start:] >= {1: 0, 3: 2, 4: 1}[block_num]).all()


def test_steps_ascend_anew_in_blocks_of_other_schedules():
    decoded = decode(by_position([0.5] * 14), [[]], 14, Recipe(blocks=Fixed(length=7), unmask=Ascending()))
    assert counts_by_step(decoded) == [1, 2, 4, 1, 2, 4]
    with pytest.raises(InputError, match="4 ascending blocks need at least 16 positions; got 8; lower block_num or"):
        decode(by_position([0.5] * 8), [[]], 8, Recipe(blocks=AscendingBlocks(block_num=4), unmask=Ascending()))


def test_position_weights_by_hand():
    even = by_position([0.5] * 5)
    assert first_step(even, PositionWeighted(tokens=2), 5) == [0, 1]
    law = by_position([0.5, 0.5, 0.9])
    assert first_step(law, PositionWeighted(tokens=1), 3) == [2]  # 0.9 exp(-0.5) > 0.5
    assert first_step(law, PositionWeighted(tokens=1, decay=0.3), 3) == [0]
    steep = PositionWeighted(tokens=1, decay=2, confidence="entropy")
    assert first_step(law, steep, 3) == [0]
    flat, quota = PositionWeighted(steps=3, decay=0), Quota(steps=3)
    for unmask in (flat, quota):
        decoded = decode(law, [[]], 3, Recipe(unmask=unmask))
        assert decoded.reveal_step.tolist() == [[1, 2, 0]]


def test_common_tokens_count_less_when_calibrated():
    law = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1]]).log()
    denoiser = CallableDenoiser(lambda ids: law.expand(len(ids), -1, -1), spec(3))
    recipe = Recipe(unmask=PositionWeighted(tokens=1, calibrated=True))
    shares = {"token-frequencies": torch.tensor([0.7, 0.1, 0.2])}
    assert committed_first(decode(denoiser, [[]], 2, recipe, resources=shares)) == [[1]]
    assert committed_first(decode(denoiser, [[]], 2, Recipe(unmask=PositionWeighted(tokens=1)))) == [[0]]
    with pytest.raises(InputError, match="the pc policy needs 'token-frequencies'; hand it over with decode"):
        decode(denoiser, [[]], 2, recipe)
    with pytest.raises(InputError, match=r"token-frequencies has to be 3 shares between 0 and 1; got .* shape \(2,\)"):
        decode(denoiser, [[]], 2, recipe, resources={"token-frequencies": torch.tensor([0.5, 0.5])})


@pytest.mark.parametrize(("fields", "words"), [
    ({"type": "factor", "factor": 0}, "greater than 0; got 0"),
    ({"type": "entropy-bound", "bound": -1}, "greater than or equal to 0; got -1"),
    ({"type": "local-leap", "threshold": 0.5}, "relaxed has to be at most the threshold"),
    ({"type": "dimple", "end": 1}, "less than 1; got 1"),
    ({"type": "ancestral", "steps": 0}, "greater than or equal to 1; got 0"),
    ({"type": "maskgit", "schedule": "sine"}, "'cosine', 'linear' or 'concave'; got 'sine'"),
    ({"type": "pc"}, "exactly one of steps, steps_per_block and tokens"),
])  # fmt: skip
def test_fields_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(InputError, match=words):
        Recipe(unmask=fields)
