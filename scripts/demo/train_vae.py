"""Trains the autoencoder of ``fashion-dit``: 32x32 grey images to 8x8 latents of unit variance.

The loss is L1, a perceptual term on the maps of a classifier *other than the judge* (another seed; see
``train_features``), and a small Kullback-Leibler term. Channels of the latent are brought to zero mean and
unit variance by folding the affine map into ``quant_conv`` and ``post_quant_conv``, so ``scaling_factor`` is 1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from fewstep.eval.nets.fashion import FashionNet
from fewstep.scripts.demo.data import load_fashion, to_float
from fewstep.scripts.demo.train_features import load_classifier
from fewstep.scripts.demo.trainer import Recipe, train, training_parser

BATCH = 64
LATENT_CHANNELS = 8
KL_WEIGHT = 2e-4
PERCEPTUAL_WEIGHT = 1.0
POOLED_WEIGHT = 0.1


def new_vae() -> AutoencoderKL:
    """An untrained autoencoder of the demo's shape."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def perceptual_terms(net: FashionNet, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Distance of channel-normalised maps (as LPIPS, arXiv:1801.03924, Eq. 1) and of the pooled features."""
    pairs = list(zip(net.maps(real), net.maps(fake), strict=True))
    maps = [(_unit(a.float()) - _unit(b.float())).pow(2).sum(1).mean() for a, b in pairs]
    pooled = [x.float().mean(dim=(2, 3)) for x in pairs[-1]]
    return {
        "perceptual": PERCEPTUAL_WEIGHT * torch.stack(maps).mean(),
        "pooled": POOLED_WEIGHT * (pooled[0] - pooled[1]).pow(2).mean(),
    }


def _unit(x_BCHW: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x_BCHW, dim=1, eps=1e-6)


def encode_moments(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of uint8 images, each float32 (n, C, 8, 8)."""
    with torch.no_grad():
        posteriors = [vae.encode(to_float(batch)).latent_dist for batch in torch.split(images, 256)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


def fold_normalisation(vae: AutoencoderKL, images: Tensor) -> None:
    """Brings each latent channel to zero mean and unit variance over ``images``; what it decodes to stays."""
    mean, _ = encode_moments(vae, images)
    shift, scale = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    channels = len(shift)
    with torch.no_grad():
        quant, post = vae.quant_conv, vae.post_quant_conv
        post.bias += torch.einsum("oihw,i->o", post.weight, shift)
        post.weight *= scale[None, :, None, None]
        quant.weight[:channels] /= scale[:, None, None, None]
        quant.bias[:channels] = (quant.bias[:channels] - shift) / scale
        quant.bias[channels:] -= 2 * scale.log()


def train_vae(
    work: Path, perceptual: Path, data: Path, steps: int, seed: int
) -> tuple[AutoencoderKL, dict[str, float]]:
    """Trains the autoencoder, or resumes it from ``work``."""
    images, _ = load_fashion("train", data)
    net = load_classifier(perceptual)
    torch.manual_seed(seed)
    vae = new_vae()

    def loss_function(generator: Generator) -> dict[str, Tensor]:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x = to_float(images[index])
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        terms = {"l1": (x - y).abs().mean(), "kl": KL_WEIGHT * posterior.kl().mean() / noise[0].numel()}
        return terms | perceptual_terms(net, x, y)

    recipe = Recipe(steps=steps, lr=1.5e-3, ema=0.998, seed=seed, bf16=True)
    record = train(vae, loss_function, recipe, work)
    fold_normalisation(vae, images[:10_000])
    return vae, record


def refine_decoder(vae: AutoencoderKL, work: Path, perceptual: Path, data: Path, steps: int, seed: int) -> float:
    """Trains the decoder further and leaves the latents as they are; returns the time in seconds.

    The teacher's latents do not change, so this can run while, or after, the transformer learns them.
    """
    images, _ = load_fashion("train", data)
    net = load_classifier(perceptual)
    for frozen in (vae.encoder, vae.quant_conv):
        frozen.requires_grad_(False)

    def loss_function(generator: Generator) -> dict[str, Tensor]:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x = to_float(images[index])
        with torch.no_grad():
            posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        return {"l1": (x - y).abs().mean()} | perceptual_terms(net, x, y)

    recipe = Recipe(steps=steps, lr=1e-3, ema=0.995, seed=seed, bf16=True, save_every=200)
    return train(vae, loss_function, recipe, work)["train_s"]


def main() -> None:
    """Trains the autoencoder into ``--work`` and saves it as ``--work``/vae.

    With ``--decoder_steps`` it then refines the decoder and saves the result as ``--work``/vae-refined.
    """
    parser = training_parser(__doc__, steps=2600)
    parser.add_argument("--perceptual", type=Path, required=True, help="run of train_features with another seed")
    parser.add_argument("--decoder_steps", type=int, default=0, help="further steps of the decoder alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.work / "vae").is_dir():
        vae, record = train_vae(options.work, options.perceptual, options.data, options.steps, options.seed)
        vae.save_pretrained(options.work / "vae")
        print(record)  # noqa: T201
    if options.decoder_steps:
        vae = AutoencoderKL.from_pretrained(options.work / "vae")
        folder = options.work / "decoder"
        train_s = refine_decoder(vae, folder, options.perceptual, options.data, options.decoder_steps, options.seed + 1)
        vae.save_pretrained(options.work / "vae-refined")
        print({"decoder_steps": options.decoder_steps, "train_s": train_s})  # noqa: T201


if __name__ == "__main__":
    main()
