"""Distances: torch's own losses, per sample, without broadcasting, with a gradient where there is no difference."""

import pytest
import torch
from torch.nn import functional

from fewstep.distill.distances import DISTANCES, L1, L2, Huber, PseudoHuber
from fewstep.samplers import InputError


def pair():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)


def test_they_are_torchs():
    a, b = pair()
    for row in range(3):
        assert L2()(a, b)[row] == functional.mse_loss(a[row], b[row])
        torch.testing.assert_close(L1()(a, b)[row], functional.l1_loss(a[row], b[row]))
    norms = torch.linalg.vector_norm((a - b).flatten(1), dim=1)
    torch.testing.assert_close(PseudoHuber(0.0)(a, b), norms)
    c = 0.01 * 8**0.5
    torch.testing.assert_close(PseudoHuber(0.01)(a, b), torch.hypot(norms, torch.full_like(norms, c)) - c)


def test_huber_is_a_square_for_small_and_a_norm_for_large_differences():
    a, b = pair()
    torch.testing.assert_close(Huber(1e4)(a, b) * 2e4, L2()(a, b), rtol=1e-6, atol=0)
    torch.testing.assert_close(Huber(1e-9)(a, b), L1()(a, b), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", [*(DISTANCES[name]() for name in DISTANCES.names()), PseudoHuber(0.0)], ids=str)
def test_no_difference_is_no_loss_and_no_gradient(distance):
    a = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = distance(a, a.detach())
    assert loss.dtype == torch.float32
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert a.grad.tolist() == torch.zeros(2, 3).tolist()


def test_errors():
    for words, make in (
        (r"c of the huber distance must be positive and finite; got 0.0, or use l1", lambda: Huber(0.0)),
        (r"scale of the pseudo-huber distance must be 0 or more and finite; got -1", lambda: PseudoHuber(-1)),
        (r"between tensors of one shape; got \(2, 1\) and \(2, 3\)", lambda: L2()(torch.ones(2, 1), torch.ones(2, 3))),
        (r"unknown distance 'hubert'; did you mean 'huber'", lambda: DISTANCES["hubert"]),
    ):
        with pytest.raises(InputError, match=words):
            make()
