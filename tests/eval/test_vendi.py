import math

import numpy as np
import pytest
import torch

from fewstep.eval import vendi_jackknife, vendi_score
from fewstep.eval.jackknife import block_jackknife, block_slices
from fewstep.samplers.errors import InputError


def features(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)])
def test_is_the_entropy_of_the_similarity_matrix(shape: tuple[int, int]) -> None:
    x = features(*shape)
    k = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1).numpy() / len(x)
    values = np.linalg.eigvalsh(k)
    values = values[values > 1e-12]
    assert vendi_score(x) == pytest.approx(math.exp(-(values * np.log(values)).sum()), rel=1e-8)


def test_counts_different_images() -> None:
    assert vendi_score(3 * torch.eye(7)) == pytest.approx(7, rel=1e-10)
    assert vendi_score(torch.ones(20, 5)) == pytest.approx(1, abs=1e-10)
    two_modes = torch.eye(2).repeat(50, 1)
    assert vendi_score(two_modes) == pytest.approx(2, rel=1e-10)
    assert vendi_score(features(40, 6)) == pytest.approx(vendi_score(9 * features(40, 6)), rel=1e-12)


@pytest.mark.parametrize("shape", [(60, 8), (45, 42), (24, 80)])
def test_replicates_leave_out_a_block(shape: tuple[int, int]) -> None:
    x = features(*shape)
    ours = vendi_jackknife(x, blocks=5)
    blocks = [x[cut] for cut in block_slices(len(x), 5)]
    generic = block_jackknife(lambda parts: vendi_score(torch.cat(list(parts))), blocks, correct_bias=False)
    assert ours.value == pytest.approx(vendi_score(x), rel=1e-10)
    assert ours.replicates == pytest.approx(generic.replicates, rel=1e-9)


def test_error_is_the_spread() -> None:
    trials = [vendi_jackknife(features(200, 8, seed)) for seed in range(80)]
    spread = torch.tensor([trial.value for trial in trials]).std().item()
    assert sum(trial.se for trial in trials) / 80 == pytest.approx(spread, rel=0.25)


def test_refuses_a_vector_without_direction() -> None:
    x = features(5, 3)
    x[2] = 0
    with pytest.raises(InputError, match="image 2 are all zero"):
        vendi_score(x)
