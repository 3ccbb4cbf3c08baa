"""Images as a denoiser sees them: encoded once, and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import torch
from PIL import Image
from torch import Tensor, nn

from ..samplers.errors import InputError
from ..samplers.files import write_tensors
from ..samplers.fingerprint import fingerprint
from ..samplers.network import denoisers
from .conditions import Layout
from .encoder import Encoder, Value
from .images import Images
from .method import seed_of
from .open_files import OPEN, undamaged

SHARD = 256
"Images in a file of latents."

Posterior = Literal["sample", "mean"]


class Moments(NamedTuple):
    """What an autoencoder says of images, in the denoiser's units: mean, and standard deviation or None, (B, ...)."""

    mean: Tensor
    std: Tensor | None


class _Shard(NamedTuple):
    """An open file: its tensors, of which rows can be read, and the value of each row."""

    path: Path
    slices: dict[str, Any]
    values: list[Value]


class Latents:
    """The images of a source, encoded, by number.

    An autoencoder that gives a distribution is asked for mean and standard deviation, and each visit of an image draws
    from it, as its denoiser was trained. ``posterior="mean"`` keeps the mean alone, in half the space. Images are
    scaled so that the shorter side fits, and cropped around the centre. The autoencoder runs in float32: in half
    precision some give NaN. On disk an image takes ``image_bytes``; a file holds 256.

    Args:
        encoder: of the pipeline's conditions; it knows the layout of the network's samples.
        images: the images.
        folder: of the files.
        size: height and width of the images in pixels: those of the pipeline's call.
        posterior: what is kept of the autoencoder's distribution.

    Raises:
        InputError: when the pipeline's images cannot be brought to its network.
    """

    def __init__(
        self, encoder: Encoder, images: Images, folder: Path, size: tuple[int, int], posterior: Posterior = "sample"
    ) -> None:
        self.encoder, self.images, self.folder, self.size, self.posterior = encoder, images, folder, size, posterior
        blank = torch.zeros(1, channels(encoder.pipe), *size)
        moments = encode_images(encoder.pipe, encoder.layout, blank)
        self._shape, self._spreads = tuple(moments.mean.shape[1:]), moments.std is not None
        vae = getattr(encoder.pipe, "vae", None)
        self._maker = fingerprint(vae) if isinstance(vae, nn.Module) else "pixels"
        self._open = lru_cache(OPEN)(self._read)  # a batch takes its rows from many files

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_bytes(self) -> int:
        """Bytes on disk for one image."""
        return 4 * int(np.prod(self._shape)) * (2 if self._spreads and self.posterior == "sample" else 1)

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk for all of them."""
        return len(self) * self.image_bytes

    def make(
        self, batch_size: int = 8, rank: int = 0, world: int = 1, progress: Callable[[int], None] = lambda count: None
    ) -> None:
        """Encodes what is missing. An interrupted run goes on at the file at which it stopped.

        Args:
            batch_size: images per run of the autoencoder.
            rank: number of this process.
            world: number of processes.
            progress: called with the number of images after each run.

        Raises:
            InputError: when an image cannot be read, is not of the pipeline's sort, or becomes NaN, or a file is
                damaged, foreign, or cannot be written.
        """
        for shard in range(-(-len(self) // SHARD))[rank::world]:
            if not self._path(shard).is_file():
                self._write(shard, batch_size, progress)
            self._open(shard)  # a foreign or damaged file is found here, and not in the middle of a training

    def get(self, items: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, list[Value]]:
        """Images as the denoiser sees them, float32 (B, ...), and their captions or labels.

        Args:
            items: numbers of the images.
            seeds: one for each, of what is drawn from the autoencoder's distribution.

        Raises:
            InputError: when they are not made yet, or a file is damaged or foreign.
        """
        rows, values = [], []
        for item, seed in zip(items, seeds, strict=True):
            shard, row = divmod(item, SHARD)
            made = self._open(shard)
            with undamaged(made.path):
                x0 = made.slices["mean"][row]
                if "std" in made.slices:
                    generator = torch.Generator("cpu").manual_seed(seed_of(seed, "posterior"))
                    x0 = x0 + made.slices["std"][row] * torch.randn(x0.shape, generator=generator)
            rows.append(x0)
            values.append(made.values[row])
        return torch.stack(rows), values

    def _write(self, shard: int, batch_size: int, progress: Callable[[int], None]) -> None:
        items = range(shard * SHARD, min(len(self), (shard + 1) * SHARD))
        moments, values = [], []
        for start in range(0, len(items), batch_size):
            examples = [self.images.example(item) for item in items[start : start + batch_size]]
            for example in examples:
                try:
                    self.encoder.check([example.value])
                except InputError as error:
                    raise InputError(f"{error} of {example.name}") from None
            pipe = self.encoder.pipe
            pixels = torch.stack([to_pixels(example.image, self.size, channels(pipe)) for example in examples])
            made = encode_images(pipe, self.encoder.layout, pixels)
            for example, row in zip(examples, made.mean, strict=True):
                if not row.isfinite().all():
                    raise InputError(f"the autoencoder makes NaN or infinity of {example.name}; remove the image")
            moments.append(made)
            values += [example.value for example in examples]
            progress(len(examples))
        tensors = {"mean": torch.cat([made.mean for made in moments])}
        if self.posterior == "sample" and moments[0].std is not None:
            tensors["std"] = torch.cat([made.std for made in moments if made.std is not None])
        write_tensors(self._path(shard), tensors, {"made_of": self._made_of(shard), "values": json.dumps(values)})

    def _read(self, shard: int) -> _Shard:
        """Opens a file.

        Raises:
            InputError: when it is missing, damaged or foreign.
        """
        path = self._path(shard)
        if not path.is_file():
            raise InputError(f"{path} does not exist; make the latents first")
        with undamaged(path):
            stream: Any = safetensors.safe_open(path, "pt")
            header = dict(stream.metadata() or {})
            if header.get("made_of") != self._made_of(shard):
                raise InputError(
                    f"{path} was made of other images, another size, or another autoencoder; delete it and make "
                    "it again"
                )
            slices = {name: stream.get_slice(name) for name in ("mean", "std") if name in stream.keys()}  # noqa: SIM118
            return _Shard(path, slices, json.loads(header["values"]))

    def _path(self, shard: int) -> Path:
        return self.folder / f"latents-{shard:05d}.safetensors"

    def _made_of(self, shard: int) -> str:
        """What decides about the content of a file, as a hash."""
        names = [self.images.name(item) for item in range(shard * SHARD, min(len(self), (shard + 1) * SHARD))]
        known = [self._maker, self.size, self.posterior, self._shape, names]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def channels(pipe: Any) -> int:
    """Channels of a pipeline's images."""
    vae = getattr(pipe, "vae", None)
    network: Any = vae if isinstance(vae, nn.Module) else next(iter(denoisers(pipe).values()))
    return int(getattr(network.config, "in_channels", 3))


def to_pixels(image: Image.Image, size: tuple[int, int], channels: int) -> Tensor:
    """An image scaled and cropped around its centre, float32 (channels, height, width) in [-1, 1].

    Raises:
        InputError: when images have neither 1 nor 3 channels.
    """
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise InputError(f"the pipeline's images have {channels} channels; fewstep reads images of 1 or 3")
    height, width = size
    factor = max(height / image.height, width / image.width)
    scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    image = image.convert(modes[channels])
    image = image if image.size == scaled else image.resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    array = np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).reshape(height, width, channels).permute(2, 0, 1)


@torch.no_grad()
def encode_images(pipe: Any, layout: Layout, pixels: Tensor) -> Moments:
    """Images as the denoiser of a pipeline sees them, on the CPU.

    Args:
        pipe: the pipeline. Without an autoencoder its samples are the pixels.
        layout: of its network's samples.
        pixels: float32 (B, C, H, W) in [-1, 1].

    Raises:
        InputError: when what the autoencoder gives cannot be brought to the shape of the network's samples.
    """
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, nn.Module):
        return Moments(_laid_out(pipe, layout, pixels), None)
    with _in_float32(vae) as network:
        place = next(network.parameters())
        try:
            encoded = network.encode(pixels.to(place.device))
        except ValueError as error:
            raise InputError(
                f"{type(vae).__name__} takes no images of shape {tuple(pixels.shape[1:])} ({error}); distil from "
                "prompts or pairs"
            ) from None
    posterior = getattr(encoded, "latent_dist", None)
    mean = (posterior.mode() if posterior is not None else encoded.latent).cpu()
    shift, scale = _units(vae.config)
    mean = _laid_out(pipe, layout, (mean - shift) * scale)
    return Moments(mean, None if posterior is None else _laid_out(pipe, layout, posterior.std.cpu() * scale))


def _units(config: Any) -> tuple[Tensor, Tensor]:
    """What is taken from latents (B, C, H, W), and what they are multiplied with then, for the denoiser."""

    def per_channel(name: str, default: float) -> Tensor:
        values = getattr(config, name, None)
        return torch.tensor(default if values is None else values, dtype=torch.float32).view(1, -1, 1, 1)

    shift = per_channel("latents_mean", getattr(config, "shift_factor", None) or 0.0)
    return shift, getattr(config, "scaling_factor", 1.0) / per_channel("latents_std", 1.0)


def _laid_out(pipe: Any, layout: Layout, latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) in the shape in which the scheduler steps them: as they are, or packed as Flux does.

    Raises:
        InputError: when it is another one.
    """
    if tuple(latents.shape[1:]) == layout.shape:
        return latents
    if hasattr(pipe, "_pack_latents") and latents.ndim == 4 and len(layout.shape) == 2:
        try:
            packed: Tensor = pipe._pack_latents(latents, *latents.shape)
        except (TypeError, RuntimeError):
            packed = latents
        if tuple(packed.shape[1:]) == layout.shape:
            return packed
    raise InputError(
        f"images become {tuple(latents.shape[1:])} and {layout.pipeline} steps samples of shape {layout.shape}; give "
        "the height and width of the pipeline's call, or distil from prompts or pairs"
    )


@contextmanager
def _in_float32(network: Any) -> Iterator[Any]:
    """A network with its parameters in float32 until the block ends; diffusers' own ``to`` warns each time."""
    dtype = next(network.parameters()).dtype
    try:
        yield nn.Module.to(network, dtype=torch.float32)
    finally:
        nn.Module.to(network, dtype=dtype)
