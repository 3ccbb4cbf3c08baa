import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.eval import (
    FeatureStats,
    frechet_distance,
    frechet_distance_features,
    kernel_distance,
    kernel_jackknife,
)
from fewstep.eval import distances as module
from fewstep.eval.jackknife import block_jackknife
from fewstep.samplers.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from cleanfid import fid as cleanfid
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance


def sample(n: int, d: int, seed: int, shift: float = 0.0, decay: float = 0.0) -> torch.Tensor:
    """Correlated features with a mean far from zero, as pooled activations have."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64) / math.sqrt(d)
    scale = torch.exp(-decay * torch.arange(d, dtype=torch.float64))
    return torch.randn(n, d, generator=g, dtype=torch.float64) * scale @ mix + 0.5 + shift


def stats(x: torch.Tensor, fingerprint: str = "f") -> FeatureStats:
    return FeatureStats.from_features(x, fingerprint=fingerprint)


class Flat(nn.Module):
    """A feature net for torchmetrics that hands over what it is given as features."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.num_features = d

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 24), (90, 200, 64), (1000, 70, 64)])
def test_frechet_distance_is_clean_fids(n: int, m: int, d: int) -> None:
    x, y = sample(n, d, 1, shift=0.2, decay=0.03), sample(m, d, 2, decay=0.01)
    theirs = cleanfid.fid_from_feats(x.numpy(), y.numpy())
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance_features(x, y) == pytest.approx(theirs, rel=1e-6)


def test_frechet_distance_is_torchmetrics() -> None:
    x, y = sample(300, 12, 1, shift=0.3), sample(200, 12, 2)
    metric = FrechetInceptionDistance(feature=Flat(12), input_img_size=(3, 2, 2))
    metric.set_dtype(torch.float64)
    metric.update(x.view(-1, 3, 2, 2), real=False)
    metric.update(y.view(-1, 3, 2, 2), real=True)
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(metric.compute().item(), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(20, 25), (20, 500), (500, 500)])
def test_the_two_routes_agree(n: int, m: int) -> None:
    x, y = sample(n, 40, 1, shift=0.1), sample(m, 40, 2)
    assert frechet_distance_features(x, y) == pytest.approx(frechet_distance(stats(x), stats(y)), rel=1e-6)


@pytest.mark.parametrize("decay", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("shape", [(30, 40), (40, 30)])
def test_nuclear_norm_of_steep_spectra(decay: float, shape: tuple[int, int]) -> None:
    """Against numpy; the steep ones are beyond what squared singular values can resolve."""
    left, right = torch.linalg.qr(sample(40, 40, 1)).Q, torch.linalg.qr(sample(40, 40, 2)).Q
    values = torch.exp(-decay * torch.arange(40, dtype=torch.float64))
    matrix = (left * values @ right)[: shape[0], : shape[1]]
    truth = np.linalg.svd(matrix.numpy(), compute_uv=False).sum()
    assert module._nuclear_norm(matrix).item() == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_contrasts_carry_the_covariance(n: int) -> None:
    x = sample(n, 6, 1)
    contrasts = module._contrasts(x)
    assert len(contrasts) == n - 1
    np.testing.assert_allclose(contrasts.T @ contrasts, np.cov(x.numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_identical_images_have_no_spread() -> None:
    x = torch.ones(5, 8, dtype=torch.float64)
    assert frechet_distance_features(x, x + 2) == pytest.approx(8 * 4, rel=1e-12)


def test_closed_forms() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2, whatever the dimension."""
    s1, s2 = torch.linspace(0.5, 2, 7, dtype=torch.float64), torch.linspace(2, 0, 7, dtype=torch.float64)
    m = torch.linspace(-1, 1, 7, dtype=torch.float64)
    a = FeatureStats.from_mu_sigma(m, torch.diag(s1**2), n=1000, fingerprint="f")
    b = FeatureStats.from_mu_sigma(0 * m, torch.diag(s2**2), n=50, fingerprint="f")
    truth = (m.square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(truth, rel=1e-9)


def test_equal_sets_are_at_zero_and_the_distance_scales() -> None:
    x, y = sample(100, 10, 1), sample(80, 10, 2, shift=1)
    trace = stats(x).cov.trace().item()
    assert abs(frechet_distance(stats(x), stats(x))) < 1e-9 * trace
    assert abs(frechet_distance_features(x[:8], x[:8])) < 1e-9 * trace
    assert frechet_distance_features(3 * x, 3 * y) == pytest.approx(9 * frechet_distance_features(x, y), rel=1e-10)
    turn = torch.linalg.qr(sample(10, 10, 3)).Q
    assert frechet_distance_features(x @ turn, y @ turn) == pytest.approx(frechet_distance_features(x, y), rel=1e-9)


def test_kernel_distance_is_clean_fids() -> None:
    x, y = sample(150, 16, 1, shift=0.2), sample(150, 16, 2)
    theirs = cleanfid.kernel_distance(x.numpy(), y.numpy(), num_subsets=1, max_subset_size=150)
    assert kernel_distance(x, y).value == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance_is_torchmetrics() -> None:
    g = torch.Generator().manual_seed(3)
    x, y = (torch.randint(low, 200, (60, 3, 2, 2), generator=g, dtype=torch.uint8) for low in (0, 20))
    metric = KernelInceptionDistance(feature=Flat(12), subsets=1, subset_size=60)
    metric.inception = Flat(12).double()
    metric.update(y.double(), real=True)
    metric.update(x.double(), real=False)
    theirs = metric.compute()[0].item()
    assert kernel_distance(x.flatten(1).double(), y.flatten(1).double()).value == pytest.approx(theirs, rel=1e-6)


def naive_kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """The U-statistic straight from its definition, also for n != m."""
    k = lambda a, b: ((a * b).sum().item() / len(a) + 1) ** 3  # noqa: E731
    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return xx + yy - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("chunk", [1 << 24, 40])
def test_kernel_distance_is_its_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    x, y = sample(11, 5, 1, shift=0.2), sample(17, 5, 2)
    assert kernel_distance(x, y).value == pytest.approx(naive_kernel_distance(x, y), rel=1e-10)


def test_kernel_jackknife_leaves_out_each_block() -> None:
    x, y = sample(30, 5, 1, shift=0.2), sample(17, 5, 2)
    blocks = list(x.split([5, 10, 8, 7]))
    ours = kernel_jackknife(blocks, y)
    generic = block_jackknife(
        lambda parts: kernel_distance(torch.cat(list(parts)), y).value, blocks, correct_bias=False
    )
    assert ours.replicates == pytest.approx(generic.replicates, rel=1e-10)
    assert (ours.value, ours.se, ours.n) == pytest.approx((generic.value, generic.se, generic.n), rel=1e-9)


@pytest.mark.parametrize("within", [True, False])
def test_degenerate_part_is_the_doubly_centred_gram(within: bool) -> None:
    x, y = sample(12, 4, 1), sample(9, 4, 2)
    y = x if within else y
    gram = (x @ y.T / 4 + 1) ** 3
    mask = ~torch.eye(12, dtype=torch.bool) if within else torch.ones(12, 9, dtype=torch.bool)
    kept = gram * mask
    r, c, t = kept.sum(1) / mask.sum(1), kept.sum(0) / mask.sum(0), kept.sum() / mask.sum()
    direct = (gram - r[:, None] - c[None] + t)[mask].square().mean()
    torch.testing.assert_close(module._gram_sums(x, y, within=within).degenerate(within=within), direct)


@pytest.mark.parametrize(("shift", "n", "m", "low", "high"), [(0.0, 60, 80, 0.9, 1.45), (0.5, 60, 40, 0.88, 1.15)])
def test_error_of_the_kernel_distance_is_the_spread(shift: float, n: int, m: int, low: float, high: float) -> None:
    """Also where the distributions are equal, and the statistic has no part of first order in the images."""
    g = torch.Generator().manual_seed(4)
    draw = lambda k: torch.randn(k, 8, generator=g, dtype=torch.float64)  # noqa: E731
    trials = [kernel_distance(draw(n) + shift, draw(m)) for _ in range(400)]
    values = torch.tensor([trial.value for trial in trials])
    error = torch.tensor([trial.se for trial in trials]).square().mean().sqrt().item()
    assert low < error / values.std().item() < high
    truth = 0.0 if shift == 0 else values.mean().item()
    covered = sum(a <= truth <= b for a, b in (trial.interval() for trial in trials))
    assert covered >= 0.9 * 400
    if shift == 0:
        assert abs(values.mean().item()) < 3 * values.std().item() / 20


def test_kernel_distance_is_unbiased_away_from_zero() -> None:
    """For N(mu, 1) and N(0, 1) in one dimension E (xy + 1)^3 = 1 + 3 m + 3 m2 + m3, with products of moments."""
    g, mu = torch.Generator().manual_seed(5), 0.7
    moments = [(mu, 0.0), (mu**2 + 1, 1.0), (mu**3 + 3 * mu, 0.0)]
    truth = sum(weight * (a - b) ** 2 for weight, (a, b) in zip((3, 3, 1), moments, strict=True))
    draw = lambda k: torch.randn(k, 1, generator=g, dtype=torch.float64)  # noqa: E731
    values = torch.tensor([kernel_distance(draw(30) + mu, draw(20)).value for _ in range(2000)])
    assert abs(values.mean().item() - truth) < 3 * values.std().item() / math.sqrt(2000)


def test_refuses() -> None:
    x = sample(10, 4, 1)
    with pytest.raises(InputError, match="different feature nets"):
        frechet_distance(stats(x), stats(x, "g"))
    with pytest.raises(InputError, match="4 and 3 dimensions"):
        kernel_distance(x, x[:, :3])
    with pytest.raises(InputError, match="at least 2 images a side; got 1 and 10"):
        frechet_distance_features(x[:1], x)
    with pytest.raises(InputError, match="needs 3 images a side; got 10 and 2"):
        kernel_distance(x, x[:2])
    with pytest.raises(InputError, match="2 images a side without any block"):
        kernel_jackknife([x[:9], x[9:]], x)
    with pytest.raises(InputError, match="NaN"):
        kernel_distance(x, x * torch.nan)
