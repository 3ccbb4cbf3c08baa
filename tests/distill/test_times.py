"""Laws of times: what they are drawn from, per sample, the same from the same generators."""

import math

import pytest
import torch
from analytic import EDM, FLOW, PROCESSES, VP

from fewstep.distill.times import (
    TIME_LAWS,
    Choice,
    ListedTimes,
    LogitNormalTimes,
    LogNormalTimes,
    Range,
    UniformTimes,
    normal,
    uniform,
)
from fewstep.samplers import InputError

LAWS = {
    "uniform": UniformTimes(0.02, 0.98),
    "log-normal": LogNormalTimes(-1.0, 1.4),
    "logit-normal": LogitNormalTimes(1.0, 1.0),
}


def one(seed=0):
    return torch.Generator().manual_seed(seed)


def test_all_laws_are_here():
    assert sorted([*LAWS, "listed"]) == TIME_LAWS.names()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_sample_is_its_generators(law, name):
    """The times of samples 2 and 3 are the same in a batch of four and in one of two."""
    process = PROCESSES[name]
    four = LAWS[law](process, 4, [one(seed) for seed in range(4)])
    assert four.dtype == torch.float64
    assert torch.equal(four[2:], LAWS[law](process, 2, [one(2), one(3)]))
    assert torch.equal(LAWS[law](process, 4, one(7)), LAWS[law](process, 4, one(7)))
    low, high = process.time_range
    many = LAWS[law](process, 500, one())
    assert ((many >= low) & (many <= high)).all()
    assert many.unique().numel() > 400


def test_uniform_is_even_in_the_schedulers_spacing():
    times = UniformTimes(0.02, 0.98)(VP, 20000, one())
    quarters = torch.quantile(times, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)) / 999
    torch.testing.assert_close(quarters, torch.linspace(0.02, 0.98, 5, dtype=torch.float64), rtol=0, atol=0.01)
    shifted = UniformTimes()(FLOW.with_shift(3.0), 20000, one()).median() / 1000
    assert float(shifted) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


@pytest.mark.parametrize("name", PROCESSES)
def test_log_normal_is_normal_in_log_noise(name):
    """The middle half of log(sigma/alpha), which no process cuts off, has the law's quartiles."""
    process = PROCESSES[name]
    times = LogNormalTimes(-1.1, 0.8)(process, 20000, one())
    quartiles = torch.quantile(-process.log_snr(times) / 2, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    wanted = -1.1 + 0.8 * torch.special.ndtri(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quartiles, wanted, rtol=0, atol=0.02)


def test_logit_normal_is_normal_in_logit_sigma():
    times = LogitNormalTimes(1.0, 0.5)(FLOW, 20000, one())
    logits = torch.logit(times / 1000)
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.02)
    assert float(logits.std()) == pytest.approx(0.5, abs=0.02)


def test_choices_come_as_often_as_they_weigh():
    choice = Choice((1.0, 7.0, 11.0), (1.0, 0.0, 3.0))
    drawn = choice(20000, one())
    assert set(drawn.tolist()) == {1.0, 11.0}
    assert float((drawn == 11.0).double().mean()) == pytest.approx(0.75, abs=0.02)
    assert torch.equal(ListedTimes(Choice((999.0, 249.0)))(VP, 50, one()), Choice((999.0, 249.0))(50, one()))
    scales = Range(5.0, 15.0)(20000, one())
    assert 5 <= scales.min() < 5.01 < 14.99 < scales.max() < 15


def test_numbers():
    assert normal(one(), 20000).std() == pytest.approx(1.0, abs=0.02)
    assert normal(one(), 20000).isfinite().all()
    assert uniform(one(), 3).shape == (3,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UniformTimes(0.5, 0.2), r"low and high must rise within 0 to 1; got 0.5 and 0.2"),
        (lambda: LogNormalTimes(std=0.0), r"std of the log-normal law must be positive and finite; got 0.0"),
        (lambda: LogitNormalTimes(std=math.inf), r"std of the logit-normal law must be positive and finite; got inf"),
        (lambda: Choice(()), r"a choice needs at least one value; got none"),
        (lambda: Choice((1.0, 2.0), (1.0,)), r"2 values need as many weights; got 1"),
        (lambda: Choice((1.0,), (0.0,)), r"weights must be 0 or more with a positive, finite sum; got \(0.0,\)"),
        (lambda: Range(2.0, 1.0), r"low must be at most high, both finite; got 2 and 1"),
        (lambda: uniform([one()], 2), r"2 samples need one generator each, or one for all; got 1"),
        (lambda: ListedTimes(Choice((1000.0,)))(VP, 1, one()), r"time 1000 is outside 0 to 999"),
        (lambda: TIME_LAWS["log-norm"], r"unknown law of times 'log-norm'; did you mean 'log-normal'"),
    ],
)
def test_errors(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_edm_times_stay_in_the_schedulers_range():
    times = LogNormalTimes(0.0, 30.0)(EDM, 200, one())
    low, high = EDM.time_range
    assert float(times.min()) == pytest.approx(low)
    assert float(times.max()) == pytest.approx(high)
