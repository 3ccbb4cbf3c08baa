"""Trains ``fashion-unet``: an unconditional pixel-space U-Net for ``DDIMPipeline`` and ``DDPMPipeline``."""

from __future__ import annotations

import torch
from diffusers import DDIMPipeline, UNet2DModel
from torch import Generator, Tensor

from fewstep.scripts.demo.data import load_fashion, to_float
from fewstep.scripts.demo.teacher import teacher_scheduler, velocity_loss
from fewstep.scripts.demo.trainer import Recipe, train, training_parser

BATCH = 64


def new_unet() -> UNet2DModel:
    """An untrained U-Net of the demo's shape."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 48, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def main() -> None:
    """Trains the U-Net into ``--work`` and saves the pipeline as ``--work``/pipe."""
    parser = training_parser(__doc__, steps=5600)
    parser.add_argument("--time_power", type=float, default=1.0, help="above 1: train more on the cleaner times")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    images, _ = load_fashion("train", options.data)
    unet, scheduler = new_unet(), teacher_scheduler()

    def loss_function(generator: Generator) -> dict[str, Tensor]:
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x0 = to_float(images[index])
        loss = velocity_loss(scheduler, lambda x, t: unet(x, t).sample, x0, generator, options.time_power)
        return {"v": loss}

    recipe = Recipe(steps=options.steps, lr=1.2e-3, ema=0.9985, seed=options.seed, bf16=True, save_every=400)
    record = train(unet, loss_function, recipe, options.work)
    DDIMPipeline(unet=unet, scheduler=scheduler).save_pretrained(options.work / "pipe")
    print(record)  # noqa: T201


if __name__ == "__main__":
    main()
