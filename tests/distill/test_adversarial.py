"""Adversarial losses and heads, and the discrepancy of features."""

import pytest
import torch
from torch.nn import functional
from torchmetrics.image.kid import poly_mmd

from fewstep.distill.terms import (
    GAN_LOSSES,
    MMD,
    FeatureHeads,
    Hinge,
    LeastSquares,
    Polynomial,
    SaturatingHinge,
    Softplus,
)
from fewstep.samplers import InputError


@pytest.mark.parametrize(
    ("loss", "real", "fake"),
    [(Hinge(), 1.5, -1.5), (SaturatingHinge(), 1.5, -1.5), (LeastSquares(), 1.0, 0.0)],
    ids=lambda value: type(value).__name__,
)
def test_a_sure_discriminator_has_no_loss(loss, real, fake):
    real, fake = torch.full((3, 5), real), torch.full((3, 5), fake)
    assert loss.discriminator(real, fake).tolist() == [0.0, 0.0, 0.0]
    assert (loss.discriminator(fake, real) > 0).all()
    assert (loss.generator(fake) > loss.generator(real)).all()


def test_softplus_is_the_cross_entropy_and_saturating_hinge_rests():
    real, fake = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    entropy = functional.binary_cross_entropy_with_logits
    for row in range(4):
        wanted = entropy(real[row], torch.ones(3)) + entropy(fake[row], torch.zeros(3))
        torch.testing.assert_close(Softplus().discriminator(real, fake)[row], wanted)
        torch.testing.assert_close(Softplus().generator(fake)[row], entropy(fake[row], torch.ones(3)))
    convinced = torch.full((2, 3), 1.5, requires_grad=True)
    SaturatingHinge().generator(convinced).sum().backward()
    assert convinced.grad.abs().max() == 0


@pytest.mark.parametrize("name", GAN_LOSSES.names())
@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 1, 2, 2)])
def test_losses_are_per_sample_and_point_the_right_way(name, shape):
    """From undecided logits the discriminator parts them and the student raises its own."""
    loss = GAN_LOSSES[name]()
    real, fake = torch.full(shape, 0.5, dtype=torch.bfloat16), torch.full(shape, 0.5, dtype=torch.bfloat16)
    real.requires_grad_(), fake.requires_grad_()
    value = loss.discriminator(real, fake)
    assert value.shape == (3,)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    fake.grad = None
    loss.generator(fake).sum().backward()
    assert (fake.grad < 0).all()


def test_heads_learn_to_tell_features_apart():
    """Tokens and maps; undecided at first, and the student's features get a gradient once they have learned."""
    torch.manual_seed(0)
    heads = FeatureHeads([6, 4], hidden=8)
    shift = torch.randn(6)

    def features(moved, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens, maps = torch.randn(16, 5, 6, generator=generator), torch.randn(16, 4, 2, 3, generator=generator)
        return [tokens + moved * shift, maps]

    logits = heads(features(0.0, 0))
    assert logits.shape == (16, 5 + 6)
    assert logits.abs().max() == 0
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)
    for step in range(60):
        loss = Hinge().discriminator(heads(features(1.0, 2 * step)), heads(features(0.0, 2 * step + 1))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = torch.zeros((), requires_grad=True)
    Hinge().generator(heads(features(moved, 999))).mean().backward()
    assert moved.grad < 0


def test_heads_refuse_other_features():
    with pytest.raises(InputError, match=r"made for features of \(6, 4\) channels; got \(4,\)"):
        FeatureHeads([6, 4])([torch.zeros(1, 4, 2, 2)])
    with pytest.raises(InputError, match=r"needs at least one feature map; got none"):
        FeatureHeads([])


# MMD


def samples(count, seed, mean=0.0):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def test_mmd_is_that_of_the_kernel_inception_distance():
    made, real = samples(7, 0), samples(7, 1, 0.5)
    assert float(MMD()(made, real).mean()) == pytest.approx(float(poly_mmd(made, real)), rel=1e-5)


def test_mmd_is_unbiased():
    """Over every pair of batches of 3 from two finite laws the mean is the exact discrepancy; 0 for equal laws."""
    first, second = samples(5, 0), samples(5, 1, 1.0)
    kernel = Polynomial(2)
    generator = torch.Generator().manual_seed(0)

    def exact(a, b):
        return kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean()

    for a, b in ((first, second), (first, first)):
        picks = torch.randint(5, (1200, 2, 3), generator=generator)
        values = torch.stack([MMD(kernel)(a[i], b[j]).mean() for i, j in picks])
        error = values.std() / len(values) ** 0.5
        assert abs(float(values.mean() - exact(a, b))) < 4 * error
        assert error < 0.2 * exact(first, second)
    assert (values < 0).any()


def test_mmd_moves_samples_to_the_law():
    real = samples(64, 0, 2.0)
    made = samples(64, 1).requires_grad_()
    before = MMD()(made, real).mean().item()
    optimizer = torch.optim.Adam([made], lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        MMD()(made, real).mean().backward()
        optimizer.step()
    assert MMD()(made, real).mean() < 0.05 * before


def test_mmd_errors():
    for made, real, words in (
        (samples(1, 0), samples(4, 0), r"needs 2 samples on either side; got 1 and 4"),
        (samples(4, 0), samples(4, 0)[:, :2], r"features must be \(N, D\) of one D; got \(4, 3\) and \(4, 2\)"),
    ):
        with pytest.raises(InputError, match=words):
            MMD()(made, real)
    with pytest.raises(InputError, match=r"degree of the polynomial kernel must be at least 1; got 0"):
        Polynomial(0)
