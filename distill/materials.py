"""What a distillation is trained on: batches for a method from the options of its run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import Accelerator

from ..eval.conditions import Conditions, conditions_for
from ..samplers import Plan
from ..samplers.errors import InputError
from .encoder import Encoder, Value
from .images import First, Images, open_images
from .latents import Latents
from .method import Method
from .options import DistillOptions
from .pairs import Pairs
from .sources import Batches, ConditionBatches, ImageBatches, PairBatches

SEED = 3_000_000
"Seed of the first sample of the teacher, that none of them is made of noise on which a student is scored."

Tell = Callable[[str, int], Callable[[int], None]]
"""From what is made, and how many of them, to what is called with the number of those that are done."""


def check_data(method: Method, options: DistillOptions) -> None:
    """Refuses options that leave a method without what it eats.

    Raises:
        InputError: naming the flags that would give it.
    """
    images = options.train_data_dir is not None or options.dataset_name is not None
    if images and options.teacher_samples is not None:
        raise InputError("--teacher_samples are made where there is no data set; leave one of them out")
    if method.needs == "pairs" and options.teacher_samples is None:
        why = "; a data set has none" if images else ""
        raise InputError(f"{method.type} needs pairs of noise and samples of the teacher; give --teacher_samples{why}")
    if method.needs == "data" and not images and options.teacher_samples is None:
        raise InputError(
            f"{method.type} needs data; give --train_data_dir, --dataset_name, or --teacher_samples to have the "
            "teacher make some"
        )
    if method.needs == "conditions" and options.teacher_samples is not None:
        raise InputError(f"{method.type} needs no samples; leave --teacher_samples out")


def data_in_words(method: Method, options: DistillOptions) -> str:
    """What a run is trained on, for its card."""
    if options.train_data_dir is not None:
        return f"the images of {options.train_data_dir.name}"
    if options.dataset_name is not None:
        return f"the data set {options.dataset_name}"
    if options.teacher_samples is not None:
        return f"{options.teacher_samples:,} samples of the teacher"
    return "no data but the conditions of the samples"


def make_source(
    method: Method, options: DistillOptions, encoder: Encoder, teacher: Plan, accelerator: Accelerator, tell: Tell
) -> Batches:
    """The batches of a run; what is encoded or made once is made here, shared by the processes.

    Args:
        method: says what it needs.
        options: of the run.
        encoder: of the pipeline.
        teacher: how the teacher samples.
        accelerator: knows the processes.
        tell: of the progress.

    Raises:
        InputError: when images, prompts or labels are missing or not of the pipeline's sort.
    """
    source = _source(method, options, encoder, teacher, accelerator, tell)
    accelerator.wait_for_everyone()
    return source


def shown_conditions(options: DistillOptions, pipe: Any) -> Conditions:
    """Prompts or labels of the validation images: those of the options, or the captions of the data's first images.

    Raises:
        InputError: when there are none.
    """
    images = _images(options)
    if images is None or options.prompts is not None or options.class_labels:
        return conditions_for(pipe, class_labels=options.class_labels, prompts=options.prompts)
    values = [images.example(item).value for item in range(min(len(images), max(1, options.num_validation_images)))]
    if isinstance(values[0], str):
        return Conditions("prompts", tuple(str(value) for value in values))
    return conditions_for(pipe)


def _source(
    method: Method, options: DistillOptions, encoder: Encoder, teacher: Plan, accelerator: Accelerator, tell: Tell
) -> Batches:
    ranks = accelerator.process_index, accelerator.num_processes
    batch = options.global_batch(accelerator.num_processes)
    images = _images(options)
    if images is not None:
        images = First(images, batch) if options.dry_run else images
        latents = Latents(encoder, images, options.cache / "latents", image_size(encoder, options), options.posterior)
        latents.make(options.encode_batch_size, *ranks, tell("encoding images", len(images)))
        return ImageBatches(latents, batch, options.seed)
    values = _values(options, encoder)
    if encoder.kind != "none":
        encoder.make(values, options.encode_batch_size, *ranks, tell("encoding conditions", len(set(values))))
    if options.teacher_samples is None:
        return ConditionBatches(values, encoder, batch, options.seed)
    count = min(batch, options.teacher_samples) if options.dry_run else options.teacher_samples
    pairs = Pairs(encoder, teacher, values, options.cache / "samples", count, SEED + options.seed)
    pairs.make(options.encode_batch_size, *ranks, tell("sampling the teacher", len(pairs)))
    return PairBatches(pairs, batch, options.seed)


def _images(options: DistillOptions) -> Images | None:
    if options.train_data_dir is not None:
        if not options.train_data_dir.exists():
            raise InputError(f"--train_data_dir {options.train_data_dir} does not exist; give a folder of images")
        return open_images(str(options.train_data_dir))
    return None if options.dataset_name is None else open_images(options.dataset_name, options.dataset_split)


def _values(options: DistillOptions, encoder: Encoder) -> Sequence[Value]:
    known = conditions_for(encoder.pipe, class_labels=options.class_labels, prompts=options.prompts)
    return known.values or (None,)


def image_size(encoder: Encoder, options: DistillOptions) -> tuple[int, int]:
    """Height and width of the images in pixels.

    Raises:
        InputError: when the pipeline's samples do not tell it.
    """
    if options.resolution is not None:
        return options.resolution, options.resolution
    shape, vae = encoder.layout.shape, getattr(encoder.pipe, "vae", None)
    if len(shape) != 3:
        raise InputError(f"samples of shape {shape} do not tell the size of the images; give --resolution")
    blocks = getattr(getattr(vae, "config", None), "block_out_channels", (1,))
    factor = getattr(encoder.pipe, "vae_scale_factor", None) or 2 ** (len(blocks) - 1)
    return shape[1] * factor, shape[2] * factor
