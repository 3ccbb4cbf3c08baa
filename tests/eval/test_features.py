from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep.eval import FeatureStats, load_feature_net, metric_name
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import write_tensors


def features(n: int = 50, d: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) * 2 + 30


def stats(x: torch.Tensor, fingerprint: str = "a" * 64) -> FeatureStats:
    return FeatureStats.from_features(x, fingerprint=fingerprint)


def test_moments_are_numpys() -> None:
    x = features()
    np.testing.assert_allclose(stats(x).mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats(x).cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-10)


def test_root_squares_to_the_covariance_also_when_singular() -> None:
    for n in (4, 50):
        s = stats(features(n))
        torch.testing.assert_close(s.root @ s.root, s.cov, rtol=1e-9, atol=1e-9)


def test_adds_and_subtracts_as_the_images_do() -> None:
    x = features(70)
    merged = stats(x[:20]) + stats(x[20:50]) + stats(x[50:])
    whole = stats(x)
    assert merged.n == len(merged) == 70
    torch.testing.assert_close(merged.outer, whole.outer, rtol=1e-13, atol=0)
    rest = whole - stats(x[20:50])
    torch.testing.assert_close(rest.cov, stats(torch.cat([x[:20], x[50:]])).cov, rtol=1e-8, atol=1e-9)


def test_mean_and_covariance_go_in_and_come_out() -> None:
    whole = stats(features())
    again = FeatureStats.from_mu_sigma(whole.mean, whole.cov, n=whole.n, fingerprint=whole.fingerprint)
    torch.testing.assert_close(again.sum, whole.sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(again.outer, whole.outer, rtol=1e-12, atol=0)


def test_file_round_trip_is_exact(tmp_path: Path) -> None:
    whole = stats(features())
    whole.save(tmp_path / "s.safetensors")
    again = FeatureStats.load(tmp_path / "s.safetensors", whole.fingerprint)
    assert (again.n, again.fingerprint) == (whole.n, whole.fingerprint)
    assert torch.equal(again.sum, whole.sum)
    assert torch.equal(again.outer, whole.outer)


def test_file_of_another_net_is_refused(tmp_path: Path) -> None:
    stats(features()).save(tmp_path / "s.safetensors")
    with pytest.raises(InputError, match="of the feature net aaaaaaaaaaaaaaaa, not of bbbbbbbbbbbbbbbb; compute"):
        FeatureStats.load(tmp_path / "s.safetensors", "b" * 64)


def test_other_files_are_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"sum": torch.zeros(2)})
    with pytest.raises(InputError, match="holds no feature statistics"):
        FeatureStats.load(tmp_path / "t.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(InputError, match="is corrupted"):
        FeatureStats.load(tmp_path / "c.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        FeatureStats.load(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="looks like a pickle"):
        FeatureStats.load(tmp_path / "s.pkl")


def test_different_nets_never_meet() -> None:
    a, b = stats(features()), stats(features(), "b" * 64)
    for meet in (lambda: a + b, lambda: a - b):
        with pytest.raises(InputError, match=r"different feature nets .* aaaaaaaaaaaaaaaa and bbbbbbbbbbbbbbbb"):
            meet()
    with pytest.raises(InputError, match="6 and 5 dimensions"):
        a + stats(features(d=5))


def test_bad_features_are_refused() -> None:
    x = features()
    x[3, 2] = torch.nan
    x[7, 0] = torch.inf
    with pytest.raises(InputError, match=r"features of 2 of 50 images hold NaN or infinity \(first: row 3\)"):
        stats(x)
    with pytest.raises(InputError, match="floating point tensor"):
        stats(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="empty"):
        stats(torch.zeros(0, 4))
    with pytest.raises(InputError, match="at least 2 images; got 1"):
        _ = stats(features(1)).cov
    with pytest.raises(InputError, match="at least one image; got n = 0"):
        _ = stats(features()) - stats(features())
    with pytest.raises(InputError, match="must be float64"):
        FeatureStats(2, torch.zeros(3), torch.zeros(3, 3), "a")
    with pytest.raises(InputError, match=r"shapes \(d,\) and \(d, d\)"):
        FeatureStats(2, torch.zeros(3).double(), torch.zeros(3, 2).double(), "a")


def test_names_of_scores() -> None:
    assert metric_name("fashion-features", 64, 128) == "fd_fashion"
    assert metric_name("dinov2", 10, 1024, "kd") == "kd_dinov2"
    assert metric_name("inception", 4096, 2048) == "fid"
    assert metric_name("inception", 10, 2048, "kd") == "kid"
    assert metric_name("inception", 10, 2048, "recall") == "recall_inception"
    with pytest.raises(InputError, match=r"fid needs at least 4096 images .* got 4095: use kid"):
        metric_name("inception", 4095, 2048)


def test_unknown_net_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match="unknown feature net 'dino2'; did you mean 'dinov2'"):
        load_feature_net("dino2")
