"""Laws of three times: the grids and segments of the papers, the curricula of their appendices."""

import math

import pytest
import torch
from analytic import EDM, FLOW, PROCESSES, VP
from diffusers import CMStochasticIterativeScheduler, LCMScheduler

from fewstep.distill.spans import (
    GridSpans,
    TrajectorySpans,
    TuningSpans,
    ct_count,
    ct_decay,
    even_points,
    ict_count,
    karras_points,
    normal_weights,
    segment_edges,
)
from fewstep.distill.times import LogNormalTimes
from fewstep.samplers import InputError


def one(seed=0):
    return torch.Generator().manual_seed(seed)


def test_even_points_are_lcms():
    """LCMScheduler's own grid of 50, and a first point at 0, where a step from 19 ends."""
    scheduler = LCMScheduler(original_inference_steps=50)
    scheduler.set_timesteps(50)
    assert even_points(VP, 50) == (0.0, *map(float, scheduler.timesteps.flip(0).tolist()))
    assert even_points(VP, 3) == (0.0, 332.0, 666.0, 999.0)
    assert even_points(FLOW, 4) == (0.0, 250.0, 500.0, 750.0, 1000.0)


def test_karras_points_are_those_of_consistency_models():
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    points = torch.tensor(karras_points(EDM, 40), dtype=torch.float64)
    theirs = torch.from_numpy(scheduler._convert_to_karras(torch.linspace(0, 1, 40).double().numpy())).flip(0)
    torch.testing.assert_close((4 * points).exp(), theirs, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close((4 * points[[0, -1]]).exp(), torch.tensor([0.002, 80.0], dtype=torch.float64))


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("forward", [False, True])
def test_spans_are_neighbours_within_one_segment(name, forward):
    process = PROCESSES[name]
    points = karras_points(process, 13, low=0.02, high=50.0)
    edges = segment_edges(12, 4)
    span = GridSpans(points, edges, forward=forward)(process, 300, one())
    bounds = [points[edge] for edge in edges] + [points[-1]]
    seen = set()
    for t, r, s in zip(*(times.tolist() for times in span), strict=True):
        assert abs(points.index(t) - points.index(r)) == 1
        low, high = (t, s) if forward else (s, t)
        assert low <= (r if forward else t)
        assert low < high
        assert low <= r <= high
        inside = [bound for bound in bounds if min(t, r) < bound < max(t, r) or min(r, s) < bound < max(r, s)]
        assert s in bounds
        assert inside == []
        seen.add((t, r, s))
    assert len(seen) == 12


def test_spans_of_a_sample_are_its_generators():
    law = TrajectorySpans(even_points(VP, 20))
    four = law(VP, 4, [one(seed) for seed in range(4)])
    for all_of_it, part in zip(four, law(VP, 2, [one(2), one(3)]), strict=True):
        assert torch.equal(all_of_it[2:], part)


def test_any_end_of_tcd_is_as_likely():
    span = TrajectorySpans((0.0, 100.0, 200.0, 300.0))(VP, 30000, one())
    assert (span.s <= span.r).all()
    last = span.s[span.t == 300.0]
    for end in (0.0, 100.0, 200.0):
        assert float((last == end).double().mean()) == pytest.approx(1 / 3, abs=0.02)


def test_weights_of_intervals():
    """iCT's weights are the mass of a log-normal law between levels: those of a plain draw from it."""
    levels = (0.01, 0.1, 0.5, 2.0, 50.0)
    weights = torch.tensor(normal_weights(levels), dtype=torch.float64)
    law = torch.distributions.Normal(-1.1, 2.0)
    mass = law.cdf(torch.tensor(levels, dtype=torch.float64).log()).diff()
    torch.testing.assert_close(weights / weights.sum(), mass / mass.sum())
    points = karras_points(EDM, 5)
    span = GridSpans(points, weights=(0.0, 1.0, 0.0, 0.0))(EDM, 20, one())
    assert span.t.unique().tolist() == [points[2]]


@pytest.mark.parametrize("name", PROCESSES)
def test_tuning_nears_from_denoising_to_neighbours(name):
    """r / t in sigma/alpha is 1 - n / q^(stage + 1); at first r is clean below u = log 7, later all are near t."""
    process = PROCESSES[name]
    law = LogNormalTimes(-1.1, 0.7)
    first = TuningSpans(law)(process, 200, one())
    assert (first.s == process.clean_time).all()
    u = (-process.log_snr(first.t) / 2).exp()
    assert torch.equal(first.r == process.clean_time, u <= math.log(7))
    assert not (first.r == first.t).any()
    later = TuningSpans(law, stage=6)(process, 200, one())
    u_t, u_r = ((-process.log_snr(time) / 2).exp() for time in (later.t, later.r))
    inside = later.r != process.clean_time
    wanted = 1 - (1 + 8 * torch.sigmoid(-u_t)) / 2**7
    torch.testing.assert_close((u_r / u_t)[inside], wanted[inside], rtol=1e-6, atol=1e-6)
    assert inside.sum() > 150


def test_segments():
    assert segment_edges(50, 4) == (0, 12, 25, 37)
    assert segment_edges(50, 1) == (0,)
    assert segment_edges(4, 4) == (0, 1, 2, 3)
    for steps, few, more in ((30, 2, 22), (30, 13, 26), (52, 23, 46)):
        assert set(segment_edges(steps, few)) <= set(segment_edges(steps, more))


def test_curricula():
    """Both ends of the curricula, and the doubling of iCT: 10, 20, ..., 1280 in eight equal parts."""
    assert [ct_count(0, 1000), ct_count(1000, 1000)] == [2, 151]
    assert ct_decay(2) == pytest.approx(0.95)
    assert ct_decay(151) == pytest.approx(0.95 ** (2 / 151))
    assert [ict_count(step, 800) for step in range(0, 900, 100)] == [11, 21, 41, 81, 161, 321, 641, 1281, 1281]
    assert ict_count(99, 800) == 11


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GridSpans((1.0,)), r"a grid needs at least 2 points; got 1"),
        (lambda: TrajectorySpans(()), r"a grid needs at least 2 points; got 0"),
        (lambda: GridSpans((0.0, 1.0, 2.0), (0, 2)), r"edges must rise from 0 and stay below 2, the last point; got"),
        (lambda: TrajectorySpans((0.0, 1.0), (1,)), r"edges must rise from 0 and stay below 1, the last point; got"),
        (lambda: GridSpans((0.0, 1.0), (1,)), r"edges must rise from 0 and stay below 1, the last point; got \(1,\)"),
        (lambda: GridSpans((0.0, 1.0), weights=(1.0, 1.0)), r"1 values need as many weights; got 2"),
        (lambda: TuningSpans(LogNormalTimes(), stage=-1), r"stage must be 0 or more; got -1"),
        (lambda: TuningSpans(LogNormalTimes(), q=1.0), r"q must exceed 1, k be 0 or more, b positive; got 1, 8, 1"),
        (lambda: even_points(VP, 0), r"steps must be at least 1; got 0"),
        (lambda: even_points(VP, 1000), r"a table of 1000 times has no 1000 steps of more than one each"),
        (
            lambda: karras_points(FLOW, 5),
            r"sigma/alpha must rise from above 0 and stay finite; got 0 to inf, give",
        ),
        (lambda: karras_points(EDM, 1), r"karras points need a count of 2 or more and a positive rho; got 1 and 7"),
        (lambda: segment_edges(4, 5), r"segments must be 1 to 4, the number of steps; got 5"),
    ],
)
def test_errors(make, words):
    with pytest.raises(InputError, match=words):
        make()
