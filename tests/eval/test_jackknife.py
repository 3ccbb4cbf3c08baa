import math

import pytest
import torch

from fewstep.eval import (
    Estimate,
    FeatureStats,
    Jackknife,
    block_jackknife,
    block_slices,
    frechet_distance,
    frechet_jackknife,
    mean_estimate,
    mean_jackknife,
    paired_difference,
)
from fewstep.samplers.errors import InputError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance_with_divisor_n(blocks: list[torch.Tensor]) -> float:
    return torch.cat(list(blocks)).var(correction=0).item()


def test_mean_of_single_images_is_the_textbook_error() -> None:
    x = normal(40)
    ours = mean_jackknife(x, blocks=40)
    textbook = mean_estimate(x)
    assert ours.value == pytest.approx(x.mean().item(), rel=1e-12)
    assert ours.se == pytest.approx(textbook.se, rel=1e-10) == pytest.approx(x.std().item() / math.sqrt(40))


def test_correction_makes_the_biased_variance_exactly_unbiased() -> None:
    # With single observations the jackknife of the variance with divisor n is that with divisor n - 1.
    x = normal(25)
    ours = block_jackknife(variance_with_divisor_n, list(x.split(1)))
    assert ours.value == pytest.approx(x.var().item(), rel=1e-10)
    assert ours.plain == pytest.approx(x.var(correction=0).item(), rel=1e-12)


def test_unequal_blocks_agree_with_equal_ones_on_a_mean() -> None:
    x = normal(61)
    uneven = block_jackknife(lambda blocks: torch.cat(list(blocks)).mean().item(), list(x.split([10, 20, 5, 26])))
    assert uneven.value == pytest.approx(x.mean().item(), rel=1e-10)
    assert uneven.n == 61
    direct = mean_jackknife(x, blocks=7)
    generic = block_jackknife(
        lambda blocks: torch.cat(list(blocks)).mean().item(),
        [x[cut] for cut in block_slices(61, 7)],
        correct_bias=False,
    )
    assert direct.se == pytest.approx(generic.se, rel=1e-10)
    assert direct.replicates == pytest.approx(generic.replicates)


def test_error_of_unequal_blocks_is_right() -> None:
    sizes = [4, 8, 12, 16, 20] * 3
    errors = [
        block_jackknife(lambda b: torch.cat(list(b)).mean().item(), list(normal(180, seed=s).split(sizes))).se ** 2
        for s in range(200)
    ]
    assert sum(errors) / 200 == pytest.approx(1 / 180, rel=0.1)


def test_intervals_use_the_stated_quantiles() -> None:
    low, high = Estimate(1.0, 0.5, 10).interval()
    assert (low, high) == pytest.approx((1 - 0.5 * 1.959964, 1 + 0.5 * 1.959964))
    jackknife = Jackknife(1.0, 0.5, 200, 1.0, (0.0,) * 20, (10,) * 20)
    assert jackknife.interval()[1] == pytest.approx(1 + 0.5 * 2.093024)  # Student's t, 19 degrees of freedom


def test_blocks_cover_everything_once() -> None:
    cuts = block_slices(103, 20)
    assert [i for cut in cuts for i in range(103)[cut]] == list(range(103))
    assert {cut.stop - cut.start for cut in cuts} == {5, 6}


def test_pairing_takes_out_what_the_methods_share() -> None:
    shared, own = normal(2000, seed=1), 0.05 * normal(2000, seed=2)
    a, b = mean_jackknife(shared + own + 0.3), mean_jackknife(shared)
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx((own + 0.3).mean().item(), rel=1e-9)
    assert difference.se == pytest.approx(mean_jackknife(own).se, rel=1e-6)
    assert difference.se < 0.1 * math.hypot(a.se, b.se)


def gaussian(d: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A Cholesky factor and its covariance, well away from singular."""
    a = normal(d, d, seed=seed) / math.sqrt(d)
    covariance = a @ a.T + 0.3 * torch.eye(d, dtype=torch.float64)
    return torch.linalg.cholesky(covariance), covariance


@pytest.mark.parametrize(("d", "shift"), [(8, 0.3), (12, 0.5), (16, 0.1)])
def test_interval_of_the_frechet_distance_covers_the_truth(d: int, shift: float) -> None:
    """200 trials at n = 10 d with t intervals; the plain distance is off by several of their errors."""
    (root, covariance), (_, other) = gaussian(d, 1), gaussian(d, 2)
    zero = torch.zeros(d, dtype=torch.float64)
    reference = FeatureStats.from_mu_sigma(zero + shift, other, n=10**9, fingerprint="f")
    truth = frechet_distance(FeatureStats.from_mu_sigma(zero, covariance, n=10**9, fingerprint="f"), reference)
    trials = []
    for seed in range(200):
        x = normal(10 * d, d, seed=seed) @ root.T
        blocks = [FeatureStats.from_features(x[cut], fingerprint="f") for cut in block_slices(len(x))]
        trials.append(frechet_jackknife(blocks, reference))
    covered = sum(low <= truth <= high for low, high in (trial.interval() for trial in trials))
    assert covered >= 180
    values = torch.tensor([trial.value for trial in trials])
    plain = torch.tensor([trial.plain for trial in trials])
    assert abs(values.mean().item() - truth) < 3 * values.std().item() / math.sqrt(200)
    assert plain.mean().item() - truth > 5 * plain.std().item() / math.sqrt(200)
    assert sum(trial.se for trial in trials) / 200 == pytest.approx(values.std().item(), rel=0.2)


def test_frechet_jackknife_is_the_generic_one() -> None:
    x, reference = normal(60, 5), FeatureStats.from_features(normal(80, 5, seed=9) + 1, fingerprint="f")
    blocks = [FeatureStats.from_features(part, fingerprint="f") for part in x.split([20, 10, 30])]

    def direct(parts: list[torch.Tensor]) -> float:
        return frechet_distance(FeatureStats.from_features(torch.cat(list(parts)), fingerprint="f"), reference)

    ours, generic = frechet_jackknife(blocks, reference), block_jackknife(direct, list(x.split([20, 10, 30])))
    assert ours.replicates == pytest.approx(generic.replicates, rel=1e-9)
    assert (ours.value, ours.se) == pytest.approx((generic.value, generic.se), rel=1e-8)


def test_paired_frechet_difference_is_far_more_exact_on_shared_noise() -> None:
    reference = FeatureStats.from_features(normal(4000, 6, seed=5), fingerprint="f")

    def score(x: torch.Tensor) -> Jackknife:
        return frechet_jackknife(
            [FeatureStats.from_features(x[cut], fingerprint="f") for cut in block_slices(len(x))], reference
        )

    noise = normal(600, 6, seed=6)
    good, bad = score(1.1 * noise + 0.3), score(1.15 * noise + 0.35)
    difference = paired_difference(bad, good)
    assert difference.se < 0.4 * math.hypot(good.se, bad.se)
    assert difference.value > 5 * difference.se


def test_refuses() -> None:
    with pytest.raises(InputError, match=r"20 blocks need .* got 19 images"):
        block_slices(19)
    with pytest.raises(InputError, match=r"at least two blocks, none empty; got sizes \[5\]"):
        block_jackknife(variance_with_divisor_n, [normal(5)])
    with pytest.raises(InputError, match="the same seeds in the same blocks"):
        paired_difference(mean_jackknife(normal(40)), mean_jackknife(normal(60)))
    with pytest.raises(InputError, match="must be finite"):
        mean_jackknife(torch.full((40,), torch.nan))
    with pytest.raises(InputError, match="at least 2 values; got 1"):
        mean_estimate(normal(1))
