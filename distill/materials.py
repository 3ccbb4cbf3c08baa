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
        by = f" by the plan {options.teacher.stem}" if options.teacher else ""
        return f"{options.teacher_samples:,} samples of the teacher{by}"
    return "no data but the conditions of the samples"


def open_data(options: DistillOptions) -> Images | None:
    """The images that a run is trained on; None where there are none.

    Raises:
        InputError: when they are not there.
    """
    if options.train_data_dir is not None:
        if not options.train_data_dir.exists():
            raise InputError(f"--train_data_dir {options.train_data_dir} does not exist; give a folder of images")
        return open_images(str(options.train_data_dir))
    return None if options.dataset_name is None else open_images(options.dataset_name, options.dataset_split)


def make_source(
    images: Images | None,
    values: Sequence[Value],
    method: Method,
    options: DistillOptions,
    encoder: Encoder,
    teacher: Plan,
    accelerator: Accelerator,
    tell: Tell,
) -> Batches:
    """The batches of a run; what is encoded or made once is made here, shared by the processes.

    Args:
        images: of `open_data`.
        values: prompts or labels of a run without images.
        method: that is trained.
        options: of the run.
        encoder: of the pipeline.
        teacher: how the teacher samples.
        accelerator: knows the processes.
        tell: of the progress.

    Raises:
        InputError: when images or values are not of the pipeline's sort.
    """
    ranks = accelerator.process_index, accelerator.num_processes
    batch = options.global_batch(accelerator.num_processes)
    if images is not None:
        images = First(images, batch) if options.dry_run else images
        latents = Latents(encoder, images, options.cache / "latents", image_size(encoder, options), options.posterior)
        latents.make(options.encode_batch_size, *ranks, tell("encoding images", len(images)))
        accelerator.wait_for_everyone()
        return ImageBatches(latents, batch, options.seed)
    values = values or (None,)
    values = values[:batch] if options.dry_run else values
    pairs = None
    if options.teacher_samples is not None:
        count = min(batch, options.teacher_samples) if options.dry_run else options.teacher_samples
        coupled = method.needs == "pairs"
        folder = options.cache / ("pairs" if coupled else "samples")
        pairs = Pairs(encoder, teacher, values, folder, count, SEED + options.seed, coupled=coupled)
    if encoder.kind != "none":
        encoder.make(values, options.encode_batch_size, *ranks, tell("encoding conditions", len(set(values))))
    if pairs is not None:
        pairs.make(options.encode_batch_size, *ranks, tell("sampling the teacher", len(pairs)))
    accelerator.wait_for_everyone()
    if pairs is None:
        return ConditionBatches(values, encoder, batch, options.seed)
    return PairBatches(pairs, batch, options.seed)


def shown_conditions(options: DistillOptions, pipe: Any, images: Images | None) -> Conditions:
    """Prompts or labels of the run, or where it has images and none are given, captions or labels of some of these.

    Raises:
        InputError: when there are none.
    """
    if images is None or options.prompts is not None or options.class_labels:
        return conditions_for(pipe, class_labels=options.class_labels, prompts=options.prompts)
    count = max(1, options.num_validation_images)
    values = [images.example(item).value for item in range(0, len(images), -(-len(images) // count))]
    if all(isinstance(value, str) for value in values):
        return Conditions("prompts", tuple(str(value) for value in values))
    labels = tuple(sorted({value for value in values if isinstance(value, int)}))
    return conditions_for(pipe, class_labels=() if getattr(pipe, "labels", None) else labels)


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
