"""Turns the trained teachers into pipeline folders under ``eval/demo``: half-precision weights, card, reference plan.

``from_pretrained`` loads half-precision files into float32 networks, so the teachers compute in float32. Run it
again with ``--scores`` when ``fewstep bench`` has measured them, to put the table into the card.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from fewstep.samplers import ConstantGuidance, DiffusersSolver, Plan, SpacingGrid, TunedFor, denoisers, fingerprint
from fewstep.samplers.files import read_json, write_json, write_text
from fewstep.scripts.demo.data import CLASSES
from fewstep.scripts.demo.trainer import read_header

DATA = """* Data: the 60,000 training images of Fashion-MNIST (Xiao et al., arXiv:1708.07747; MIT licence),
  zero-padded to 32x32, without augmentation."""

DIT = """A class-conditional latent diffusion transformer (DiT, arXiv:2212.09748): {denoiser:,} parameters on 16 tokens,
and an autoencoder of {vae:,} parameters to 8x8x8 latents. Labels 0 to 9; 1000 is the null label that `DiTPipeline`
hard-codes."""

UNET = "An unconditional pixel-space U-Net of {denoiser:,} parameters, for `DDIMPipeline` and `DDPMPipeline`."

CARD = """# {name}

{summary}

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("eval/demo/{name}")
```

{data}
* Training: {steps} steps of {batch}, AdamW, cosine decay from {lr}, velocity prediction, averaged weights
  (decay {ema}), {minutes:.0f} minutes on one CPU core shared with other work:
  `python -m fewstep.scripts.demo.{script}`.{note}
* Weights in half precision, computed in float32. Licence: Apache-2.0.

{scores}
"""


def scores_table(path: Path | None) -> str:
    """A Markdown table of a bench's ``results.csv``; says so when there is none yet."""
    if path is None:
        return "Not scored yet."
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    columns = [c for c in ("fd_fashion", "precision_fashion", "recall_fashion", "class_accuracy") if rows[0].get(c)]
    lines = [f"| sampler | NFE | {' | '.join(columns)} |", "|---|---|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{float(row[c]):.3f} ± {float(row[c + '_se']):.3f}" for c in columns]
        lines.append(f"| {row['name']} | {float(row['nfe']):g} | {' | '.join(cells)} |")
    head = f"Scores with {int(rows[0]['n']):,} images (value ± standard error), by `fewstep bench`:"
    return "\n".join([head, "", *lines])


def parameters(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def card(name: str, pipe: Any, header: dict[str, str], options: argparse.Namespace) -> str:
    """The model card."""
    recipe = json.loads(header["recipe"])
    latent = name == "fashion-dit"
    sizes = {"denoiser": parameters(next(iter(denoisers(pipe).values()))), "vae": parameters(pipe.vae) if latent else 0}
    return CARD.format(
        name=name,
        pipeline=type(pipe).__name__,
        summary=(DIT if latent else UNET).format(**sizes),
        data=DATA,
        steps=header["step"],
        batch=128 if latent else 64,
        lr=recipe["lr"],
        ema=recipe["ema"],
        minutes=float(header["train_s"]) / 60,
        script="train_dit" if latent else "train_unet",
        note=f"\n  {options.note}" if options.note else "",
        scores=scores_table(options.scores),
    )


def main() -> None:
    """Writes ``--out``/NAME and ``--out``/plans/NAME/reference.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=("fashion-dit", "fashion-unet"), required=True)
    parser.add_argument("--work", type=Path, required=True, help="run of train_dit or train_unet")
    parser.add_argument("--vae", type=Path, help="another decoder for the same latents, as train_vae refined it")
    parser.add_argument("--out", type=Path, required=True, help="such as eval/demo")
    parser.add_argument("--guidance", type=float, help="guidance scale of the reference plan")
    parser.add_argument("--note", default="", help="a sentence for the card")
    parser.add_argument("--scores", type=Path, help="results.csv of fewstep bench")
    options = parser.parse_args()
    folder: Path = options.out / options.name
    pipe = DiffusionPipeline.from_pretrained(options.work / "pipe")
    if options.vae:
        pipe.vae = AutoencoderKL.from_pretrained(options.vae)
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.json"):
        write_json(path, {key: value for key, value in read_json(path).items() if key != "_name_or_path"})
    if options.name == "fashion-dit":  # the pipeline reads the names of its labels here, and does not write them
        index = read_json(folder / "model_index.json")
        write_json(folder / "model_index.json", index | {"id2label": {str(i): c for i, c in enumerate(CLASSES)}})
    pipe = DiffusionPipeline.from_pretrained(folder)
    write_text(folder / "README.md", card(options.name, pipe, read_header(options.work), options))
    reference = Plan(
        name="reference-50",
        solver=DiffusersSolver(scheduler="DDIMScheduler"),
        grid=SpacingGrid(steps=50, spacing="trailing"),
        guidance=ConstantGuidance(scale=options.guidance) if options.guidance else None,
        tuned_for=TunedFor(
            fingerprint=fingerprint(next(iter(denoisers(pipe).values()))), pipeline=type(pipe).__name__, steps=50
        ),
    )
    reference.save(options.out / "plans" / options.name / "reference.json")


if __name__ == "__main__":
    main()
