"""Fixed masks on wide networks with random weights: time saved against operations saved, the denoiser alone, batch 1.

``python -m fewstep.scripts.bench.wide --out caches-wide.json``

What a fixed mask saves does not depend on the weights. Each case is called in turn with the uncached run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from fewstep.samplers import Plan, uniform_mask
from fewstep.samplers.files import read_json, write_json
from fewstep.samplers.network import denoisers

from .cache_cost import Trial, counted, timed
from .caches import machine

Call = Callable[[], Any]


@contextmanager
def built_as(dtype: torch.dtype) -> Iterator[None]:
    """Networks that are built in the block have this type from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dit_xl() -> tuple[Any, Call]:
    """DiT-XL/2 for 256 pixels: 28 blocks of width 1152 on 256 tokens, float32."""
    network = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
        attention_bias=True,
    )
    decoder = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **_levels(4))
    pipe = DiTPipeline(network.eval(), decoder, DDIMScheduler())
    return pipe, partial(pipe, class_labels=[1], guidance_scale=1.0, output_type="np")


def sdxl() -> tuple[Any, Call]:
    """The U-Net of Stable Diffusion XL, 2.6 billion parameters, at 512 pixels, bfloat16."""
    with built_as(torch.bfloat16):
        network = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    pipe = StableDiffusionXLPipeline(None, None, None, None, None, network.eval(), DDIMScheduler())
    text = {"prompt_embeds": _noise(1, 77, 2048), "pooled_prompt_embeds": _noise(1, 1280)}
    return pipe, partial(pipe, **text, height=512, width=512, guidance_scale=1.0, output_type="latent")


def flux() -> tuple[Any, Call]:
    """Flux's blocks of width 3072, 2 double ones and 4 single ones, on 256 tokens and 64 of text, bfloat16."""
    with built_as(torch.bfloat16):
        network = FluxTransformer2DModel(num_layers=2, num_single_layers=4, guidance_embeds=True)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, network.eval())
    text = {"prompt_embeds": _noise(1, 64, 4096), "pooled_prompt_embeds": _noise(1, 768)}
    return pipe, partial(pipe, **text, height=256, width=256, output_type="latent")


def _levels(count: int) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "latent_channels": 4,
    }


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


INTERVALS = (2, 4)
"How many steps from one that computes to the next."


def intervals(steps: int) -> tuple[int, ...]:
    """Those that are no longer than the call."""
    return tuple(every for every in INTERVALS if every <= steps)


def masks(steps: int) -> dict[str, dict[str, Any]]:
    """Block masks, by what the table calls them."""
    made = {f"blocks, every {every}": uniform_mask(steps, every) for every in intervals(steps)} | {
        "attention and MLP, every 2": uniform_mask(steps, 2, ("attention", "mlp")),
        "blocks, every 2, order 1": uniform_mask(steps, 2, order=1),
    }
    return {name: {"type": "block-mask"} | mask.model_dump(mode="json") for name, mask in made.items()}


def deep(steps: int) -> dict[str, dict[str, Any]]:
    """Deep caches, by what the table calls them."""
    made = {f"cut 0.0, every {every}": {"type": "unet-deep", "interval": every} for every in intervals(steps)}
    return made | {"cut 1.0, every 2": {"type": "unet-deep", "interval": 2, "depth": 1}}


@dataclass(frozen=True)
class Wide:
    """A network, and the caches that are tried on it in a number of steps."""

    build: Callable[[], tuple[Any, Call]]
    caches: Callable[[int], dict[str, dict[str, Any]]]


NETWORKS = {"dit-xl": Wide(dit_xl, masks), "sdxl": Wide(sdxl, deep), "flux": Wide(flux, masks)}


def measured(wide: Wide, names: Sequence[str], steps: int, repeats: int) -> dict[str, Any]:
    """For each cache by what factor it saves operations and time, and the share that time is of operations.

    Args:
        wide: the network.
        names: first letters of the caches to try.
        steps: of each call.
        repeats: calls behind each speed, after one in which operations are counted.
    """
    torch.manual_seed(0)
    pipe, call = wide.build()
    pipe.set_progress_bar_config(disable=True)
    network = next(iter(denoisers(pipe).values()))
    base = Trial(_plan(steps))
    caches = {name: cache for name, cache in wide.caches(steps).items() if name.startswith(tuple(names))}
    trials = {name: Trial(_plan(steps, cache)) for name, cache in caches.items()}
    uncached, _ = counted(pipe, base, call)
    counts = {name: counted(pipe, trial, call) for name, trial in trials.items()}
    speeds = timed(pipe, base, trials, call, repeats, warm_ups=0)
    rows = []
    for name, (operations, held) in counts.items():
        share = {clock: speeds[name][clock]["ratio"] * operations / uncached for clock in ("wall", "processor")}
        row = {"cache": name, "plan": _said(trials[name].plan), "nfe": steps, "flops": uncached / operations}
        rows.append(row | {"bytes": held, "times": speeds[name], "share": share})
    size = sum(parameter.numel() for parameter in network.parameters())
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return {"about": (wide.build.__doc__ or "").rstrip("."), "parameters": size, "dtype": dtype, "rows": rows}


def _plan(steps: int, *caches: dict[str, Any]) -> Plan:
    plan = {"fewstep_plan": 1, "grid": {"type": "spacing", "steps": steps}}
    return Plan.from_json(plan | ({"caches": list(caches)} if caches else {}))


def _said(plan: Plan) -> dict[str, Any]:
    return {key: value for key, value in plan.to_json().items() if key != "fewstep_plan"}


def main() -> None:
    """Writes ``--out`` after each network, beside those that are in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--caches", nargs="+", default=[""], help="first letters of the caches to try; all")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = dict(read_json(options.out)["networks"]) if options.out.is_file() else {}
    for name in options.networks:
        found[name] = measured(NETWORKS[name], options.caches, options.steps, options.repeats)
        for row in found[name]["rows"]:
            print(name, row["cache"], f"operations {row['flops']:.3f}x", row["share"], flush=True)  # noqa: T201
        run = {"steps": options.steps, "repeats": options.repeats, "machine": machine()}
        write_json(options.out, run | {"networks": found})


if __name__ == "__main__":
    main()
