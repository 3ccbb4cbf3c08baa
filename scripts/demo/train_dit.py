"""Trains ``fashion-dit``: a class-conditional DiT (arXiv:2212.09748) on 8x8 latents, for ``DiTPipeline``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from torch import Generator, Tensor

from fewstep.scripts.demo.data import load_fashion
from fewstep.scripts.demo.teacher import teacher_scheduler, velocity_loss
from fewstep.scripts.demo.train_vae import LATENT_CHANNELS, encode_moments
from fewstep.scripts.demo.trainer import Recipe, train, training_parser

BATCH = 128
NULL_CLASS = 1000
"The unconditional label that ``DiTPipeline`` hard-codes."
LABEL_DROPOUT = 0.1


def new_transformer() -> DiTTransformer2DModel:
    """An untrained DiT of the demo's shape, initialised as the paper says (zero gates, zero output)."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=6,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith(("norm1.linear.weight", "norm1.linear.bias")) or name.startswith("proj_out_"):
            torch.nn.init.zeros_(parameter)
        elif name.endswith("embedding_table.weight"):
            torch.nn.init.normal_(parameter, std=0.02)
    for module in transformer.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0  # each block would drop labels of its own accord; the loss drops them for all
    return transformer


def blank_unused_labels(transformer: DiTTransformer2DModel, classes: int) -> None:
    """Zeroes the label embeddings that no class and no null label uses."""
    for name, parameter in transformer.named_parameters():
        if name.endswith("embedding_table.weight"):
            with torch.no_grad():
                parameter[classes:NULL_CLASS] = 0


def main() -> None:
    """Trains the DiT into ``--work`` and saves the pipeline as ``--work``/pipe."""
    parser = training_parser(__doc__, steps=8000)
    parser.add_argument("--vae", type=Path, required=True, help="folder that train_vae saved")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = load_fashion("train", options.data)
    vae = AutoencoderKL.from_pretrained(options.vae).eval().requires_grad_(False)
    mean, std = encode_moments(vae, images)
    torch.manual_seed(options.seed)
    transformer, scheduler = new_transformer(), teacher_scheduler()

    def loss_function(generator: Generator) -> dict[str, Tensor]:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x0 = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < LABEL_DROPOUT
        y = torch.where(dropped, NULL_CLASS, labels[index])
        return {"v": velocity_loss(scheduler, lambda x, t: transformer(x, t, class_labels=y).sample, x0, generator)}

    recipe = Recipe(steps=options.steps, lr=1e-3, ema=0.9985, seed=options.seed, save_every=500)
    record = train(transformer, loss_function, recipe, options.work)
    blank_unused_labels(transformer, classes=10)
    DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler).save_pretrained(options.work / "pipe")
    print(record)  # noqa: T201


if __name__ == "__main__":
    main()
