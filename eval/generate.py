"""Images by shards: resumable, and the same whatever the batch size, the number of processes and n.

Every image has a seed. Its noise comes from its own CPU generator and its condition from the seed, so which
other images are made beside it does not matter (up to the rounding of batched matrix products).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..samplers import Plan, attach
from ..samplers.errors import InputError
from ..samplers.files import read_tensors, write_tensors
from .conditions import Conditions
from .quantise import to_uint8

SHARD_SIZE = 128
"Images in a shard. The last shard of a run may hold fewer; a run with a larger n fills it up."

PER_IMAGE_ARGUMENTS = ("negative_prompt", "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3")
"Text arguments that pipelines want as long as the list of prompts."


@dataclass(frozen=True)
class Shard:
    """Consecutive images of a run.

    Attributes:
        index: position of the shard in the run.
        images: uint8 (S, C, H, W), the only form that is scored.
        seeds: int64 (S,).
        conditions: int64 (S,): class label, number of the prompt, or -1.
        nfe: counted network evaluations per image.
        warnings: what the user should know about these images.
    """

    index: int
    images: Tensor
    seeds: Tensor
    conditions: Tensor
    nfe: float
    warnings: tuple[str, ...] = ()

    def first(self, count: int) -> Shard:
        """The shard cut to its first ``count`` images."""
        parts = (self.images[:count], self.seeds[:count], self.conditions[:count])
        return Shard(self.index, *parts, self.nfe, self.warnings)


@dataclass(frozen=True)
class ImageSet:
    """The images of one configuration, as files.

    Attributes:
        folder: OUT/shards/<config_hash>.
        config_hash: what the header of each shard must say.
        conditions: what the images show.
        seeds: consecutive seeds, in the order of the images.
    """

    folder: Path
    config_hash: str
    conditions: Conditions
    seeds: range

    @property
    def indices(self) -> range:
        """Indices of all shards."""
        return range(-(-len(self.seeds) // SHARD_SIZE))

    def seeds_of(self, index: int) -> range:
        """Seeds of one shard."""
        return self.seeds[index * SHARD_SIZE : (index + 1) * SHARD_SIZE]

    def path(self, index: int) -> Path:
        """File of one shard."""
        return self.folder / f"shard-{index:05d}.safetensors"

    def read(self, index: int) -> Shard | None:
        """A shard, checked and cut to the seeds of this set; None when there is none yet. It may be incomplete.

        Raises:
            InputError: when the file is damaged or belongs to another configuration.
        """
        path = self.path(index)
        if not path.is_file():
            return None
        tensors, header = read_tensors(path)
        if header.get("config_hash") != self.config_hash:
            found = header.get("config_hash", "none")
            raise InputError(
                f"{path} belongs to another configuration (config_hash {found}, here {self.config_hash}); delete it"
            )
        try:
            images, seeds, codes = (tensors[key] for key in ("images", "seeds", "conditions"))
            shard = Shard(
                index,
                images,
                seeds,
                codes,
                float(header["nfe"]),
                tuple(json.loads(header.get("warnings", "[]"))),
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} is not a complete shard ({error}); delete it and run again") from None
        shard = shard.first(len(self.seeds_of(index)))
        wanted = list(self.seeds_of(index))[: len(shard.seeds)]
        right = shard.seeds.tolist() == wanted and shard.conditions.tolist() == self.conditions.codes(wanted)
        if not right or images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(seeds):
            raise InputError(f"{path} holds other seeds, conditions or images than expected; delete it and run again")
        return shard

    def shards(self) -> Iterator[Shard]:
        """All shards in order.

        Raises:
            InputError: when one is missing, incomplete or damaged.
        """
        for index in self.indices:
            shard = self.read(index)
            if shard is None or len(shard.seeds) < len(self.seeds_of(index)):
                raise InputError(f"{self.path(index)} is missing or incomplete; run the same command again")
            yield shard

    def batches(self) -> Iterator[Tensor]:
        """The images of `shards`, uint8 (B, C, H, W)."""
        for shard in self.shards():
            yield shard.images

    def missing(self) -> int:
        """Number of images that are still to be made, over all processes."""
        made = (self.read(index) for index in self.indices)
        return len(self.seeds) - sum(len(shard.seeds) for shard in made if shard is not None)


def generate(
    pipe: Any,
    plan: Plan,
    images: ImageSet,
    *,
    call_kwargs: Mapping[str, Any],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Makes what is missing of the shards ``rank``, ``rank + world``, ...

    Args:
        pipe: a pipeline that no plan is attached to.
        plan: attached while this runs.
        images: which images, and where they go.
        call_kwargs: further arguments of the pipeline's call.
        batch_size: images per call, at most; batches do not reach over the end of a shard.
        rank: number of this process.
        world: number of processes.
        progress: called with the number of images after each batch.

    Raises:
        InputError: for a damaged or foreign shard, NaN images, a full disk.
    """
    todo = [index for index in images.indices[rank::world] if _is_incomplete(images, index)]
    if not todo:
        return
    with attach(pipe, plan) as handle:
        for index in todo:
            shard = images.read(index)
            seeds = images.seeds_of(index)
            for batch in _batches(seeds[len(shard.seeds) if shard else 0 :], batch_size):
                made, seeded = sample_images(pipe, images.conditions, batch, call_kwargs)
                stats = handle.stats
                assert stats is not None
                warnings = (*stats.warnings, *(() if seeded else (_unseeded(pipe),)))
                codes = torch.tensor(images.conditions.codes(batch))
                part = Shard(index, made, torch.tensor(batch), codes, stats.nfe, warnings)
                shard = part if shard is None else _joined(shard, part)
                progress(len(batch))
            assert shard is not None
            _write(images, shard)


def _is_incomplete(images: ImageSet, index: int) -> bool:
    shard = images.read(index)
    return shard is None or len(shard.seeds) < len(images.seeds_of(index))


def _batches(seeds: Sequence[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(seeds), size):
        yield list(seeds[start : start + size])


def sample_images(
    pipe: Any, conditions: Conditions, seeds: Sequence[int], call_kwargs: Mapping[str, Any]
) -> tuple[Tensor, bool]:
    """One call of the pipeline.

    Args:
        pipe: the pipeline, with or without a plan.
        conditions: what the images show.
        seeds: one per image.
        call_kwargs: further arguments of the call.

    Returns:
        Images uint8 (B, C, H, W), and whether all noise came from the images' own generators.
    """
    with watch_global_noise(pipe.device, seeds[0]) as untouched:
        output = call_pipeline(pipe, conditions, seeds, call_kwargs)
        seeded = untouched()
    array = np.ascontiguousarray(output.images, dtype=np.float32)
    if array.ndim != 4 or len(array) != len(seeds):
        raise InputError(
            f"{type(pipe).__name__} returned images of shape {array.shape} for {len(seeds)} seeds; "
            "fewstep scores pipelines that return one image (height, width, channels) per seed"
        )
    return to_uint8(torch.from_numpy(array).permute(0, 3, 1, 2)), seeded


def call_pipeline(pipe: Any, conditions: Conditions, seeds: Sequence[int], call_kwargs: Mapping[str, Any]) -> Any:
    """Calls the pipeline with one CPU generator per image; its images are float (B, H, W, C) in [0, 1]."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    lists = {
        name: [value] * len(seeds) if name in PER_IMAGE_ARGUMENTS and isinstance(value, str) else value
        for name, value in call_kwargs.items()
    }
    return pipe(**conditions.inputs(seeds), **lists, generator=generators, output_type="np")


@contextmanager
def watch_global_noise(device: torch.device, seed: int) -> Iterator[Callable[[], bool]]:
    """Seeds torch's global generators for the block, restores them, and tells whether they were used."""
    cuda = [device] if device.type == "cuda" else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in cuda)]

    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        before = states()
        yield lambda: all(torch.equal(a, b) for a, b in zip(before, states(), strict=True))


def _unseeded(pipe: Any) -> str:
    return (
        f"{type(pipe).__name__} draws noise outside the images' generators with this plan: "
        "its images depend on the batch size"
    )


def _joined(a: Shard, b: Shard) -> Shard:
    return Shard(
        index=a.index,
        images=torch.cat([a.images, b.images]),
        seeds=torch.cat([a.seeds, b.seeds]),
        conditions=torch.cat([a.conditions, b.conditions]),
        nfe=b.nfe,
        warnings=tuple(dict.fromkeys((*a.warnings, *b.warnings))),
    )


def _write(images: ImageSet, shard: Shard) -> None:
    tensors = {"images": shard.images, "seeds": shard.seeds, "conditions": shard.conditions}
    header = {
        "config_hash": images.config_hash,
        "nfe": repr(shard.nfe),
        "warnings": json.dumps(shard.warnings),
    }
    write_tensors(images.path(shard.index), tensors, header)
