"""What a distillation is told: one field for each flag that all methods have."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from ..eval.assets import Dtype
from ..samplers.errors import InputError
from .latents import Posterior
from .loop_options import LoopOptions
from .lora import LoraSetting

STEPS = (1, 2, 4, 8)
"Numbers of steps in which students are watched, as far as their method was trained for them."


class DistillOptions(LoopOptions):
    """The options of `fewstep.distill.distill`, which are the flags of ``fewstep distill``."""

    pipe: str = Field(default="demo:fashion-dit", description="Pipeline folder, or a demo such as demo:fashion-dit.")
    dtype: Dtype = Field(default="float32", description="Of the frozen weights; trained ones are float32.")
    download: bool = Field(default=False, description="Whether weights may be fetched from a hub.")
    max_train_steps: int = Field(default=1000, gt=0, description="Updates of the student.")

    teacher: Path | None = Field(
        default=None,
        description="Plan by which the teacher samples, a file or the name of one that ships; its guidance is learned. "
        "Default: the demo's own.",
    )
    student: Path | None = Field(
        default=None, description="Plan of a student with whose weights this one begins; default: the teacher's."
    )
    train_data_dir: Path | None = Field(default=None, description="Folder of images, or of webdataset shards.")
    dataset_name: str | None = Field(default=None, description="Data set of the library datasets: a name or a folder.")
    dataset_split: str = Field(default="train", description="Of the data set.")
    teacher_samples: int | None = Field(
        default=None, gt=0, description="Samples for the teacher to make: data without a data set, or pairs."
    )
    resolution: int | None = Field(
        default=None, gt=0, description="Height and width of the images in pixels; default: the pipeline's own."
    )
    posterior: Posterior = Field(default="sample", description="What is kept of the autoencoder's distribution.")
    prompts: Path | None = Field(default=None, description="Text file with one prompt a line.")
    class_labels: tuple[int, ...] = Field(default=(), description="Labels; default: all of the pipeline's.")
    call_kwargs: tuple[str, ...] = Field(default=(), description="Further arguments of the pipeline's call, KEY=VALUE.")
    cache_dir: Path | None = Field(
        default=None, description="Folder of latents, samples and conditions; default: cache in --output_dir."
    )
    encode_batch_size: int = Field(default=16, gt=0, description="Samples per call that encodes or makes them.")

    lora_rank: int | None = Field(
        default=None, ge=0, description="Of the student's adapter; 0 trains all weights. Default: the method's."
    )
    lora_alpha: float | None = Field(default=None, gt=0, description="Scale of the adapter; default: its rank.")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of an adapter's inputs that are dropped.")
    lora_targets: tuple[str, ...] = Field(
        default=(), description="Ends of the names of adapted layers; default: all attention and MLP layers."
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for more time.")
    shard_networks: bool = Field(default=False, description="Cut weights, gradients and moments over the processes.")
    allow_tf32: bool = Field(default=False, description="Faster float32 on Ampere and later; not for scm.")

    num_inference_steps: int | None = Field(
        default=None, gt=0, description="Steps of the student's plan.json; default: 4, or what the method trains for."
    )
    validation_steps: int = Field(default=500, gt=0, description="Updates of the student between validations.")
    validation_num_inference_steps: tuple[int, ...] = Field(
        default=(), description=f"Steps to validate in; default: those of {', '.join(map(str, STEPS))} that can be."
    )
    num_validation_images: int = Field(default=8, ge=0, description="Images per number of steps; 0 for none.")
    validation_n: int = Field(default=0, ge=0, description="Images to score where real ones are known; 0 for none.")

    export_dtype: Dtype = Field(default="float32", description="Of the exported weights.")
    kohya: bool = Field(default=False, description="Also write an adapter with the keys of ComfyUI and kohya.")
    push_to_hub: bool = Field(default=False, description="Upload the result.")
    hub_model_id: str | None = Field(default=None, description="Repository to upload to.")
    hub_token: str | None = Field(default=None, description="Token of the hub; better to log in instead.")
    hub_private: bool = Field(default=False, description="Whether a new repository is private.")
    dry_run: bool = Field(default=False, description="Run two updates, and say what they need.")

    @model_validator(mode="after")
    def _consistent(self) -> DistillOptions:
        if self.train_data_dir is not None and self.dataset_name is not None:
            raise ValueError("--train_data_dir and --dataset_name exclude each other; give one")
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub needs a repository; give --hub_model_id USER/NAME")
        return self

    @property
    def cache(self) -> Path:
        """Folder of what is encoded or made once."""
        return self.cache_dir or self.output_dir / "cache"

    def lora(self, default_rank: int) -> LoraSetting | None:
        """The student's adapter; None to train all weights.

        Args:
            default_rank: of the method.

        Raises:
            InputError: for options of an adapter where there is none.
        """
        rank = default_rank if self.lora_rank is None else self.lora_rank
        if rank == 0:
            if self.lora_alpha is not None or self.lora_targets or self.lora_dropout:
                raise InputError("--lora_alpha, --lora_targets and --lora_dropout need an adapter; give --lora_rank")
            return None
        return LoraSetting(rank, self.lora_alpha or float(rank), self.lora_targets, self.lora_dropout)
