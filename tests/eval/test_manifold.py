import pytest
import torch
from prdc import compute_prdc

from fewstep.eval import manifold, manifold_scores
from fewstep.eval.jackknife import block_jackknife, block_slices
from fewstep.samplers.errors import InputError

NAMES = ("precision", "recall", "density", "coverage")


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("k", "d", "chunk"), [(5, 8, 1 << 23), (3, 2, 1 << 23), (1, 16, 500)])
def test_scores_are_those_of_prdc(k: int, d: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "_CHUNK", chunk)
    real, generated = normal(150, d, 1), normal(110, d, 2) * 0.8 + 0.3
    theirs = compute_prdc(real.numpy(), generated.numpy(), nearest_k=k)
    ours = manifold_scores(real, generated, k=k)
    for name in NAMES:
        assert getattr(ours, name).value == pytest.approx(theirs[name], rel=1e-12), name
        assert theirs[name] > 0.05, name


def test_real_comes_first() -> None:
    wide, narrow = normal(200, 4, 1), 0.2 * normal(200, 4, 2)
    scores = manifold_scores(wide, narrow)
    assert scores.precision.value > 0.95
    assert scores.recall.value < 0.3


def test_replicates_leave_out_a_block() -> None:
    """Against a recomputation from scratch; exact where the generated radii play no part."""
    real, generated = normal(80, 4, 1), normal(90, 4, 2) + 0.2
    ours = manifold_scores(real, generated, blocks=6)
    blocks = [generated[cut] for cut in block_slices(90, 6)]
    for name in ("precision", "density", "coverage"):
        generic = block_jackknife(
            lambda parts, name=name: compute_prdc(real.numpy(), torch.cat(list(parts)).numpy(), nearest_k=5)[name],
            blocks,
            correct_bias=False,
        )
        assert getattr(ours, name).replicates == pytest.approx(generic.replicates, rel=1e-10)
        assert getattr(ours, name).se == pytest.approx(generic.se, rel=1e-8)


def test_errors_are_the_spread_over_generated_sets() -> None:
    real = normal(250, 8, 1)
    trials = [manifold_scores(real, 0.9 * normal(300, 8, seed) + 0.3) for seed in range(2, 82)]
    for name, high in zip(NAMES, (1.3, 1.7, 1.3, 1.7), strict=True):
        values = torch.tensor([getattr(trial, name).value for trial in trials])
        error = sum(getattr(trial, name).se for trial in trials) / len(trials)
        assert 0.75 < error / values.std().item() < high, name


def test_refuses() -> None:
    with pytest.raises(InputError, match="more than 5 images a side; got 5 real and 40"):
        manifold_scores(normal(5, 3, 1), normal(40, 3, 2))
    with pytest.raises(InputError, match="3 and 4 dimensions"):
        manifold_scores(normal(40, 3, 1), normal(40, 4, 2))
    with pytest.raises(InputError, match="generated features of 40 of 40 images hold NaN"):
        manifold_scores(normal(40, 3, 1), normal(40, 3, 2) * torch.nan)
