"""The options of a training run that no method has to know about, by the names they have in diffusers' scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .schedule import RateName


class LoopOptions(BaseModel):
    """How long, how fast and how safely a run trains."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    output_dir: Path = Field(description="Folder of the checkpoints and the log.")
    max_train_steps: int = Field(gt=0, description="Updates of the student.")
    train_batch_size: int = Field(default=16, gt=0, description="Samples per process and micro-batch.")
    gradient_accumulation_steps: int = Field(default=1, gt=0, description="Micro-batches per update.")
    seed: int = Field(default=0, ge=0, description="Decides batches, noise and dropout.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = Field(
        default=None, description="Of the forward passes; None for what accelerate is configured to."
    )

    optimizer: Literal["adamw", "radam"] = Field(default="adamw", description="Of all roles.")
    use_8bit_adam: bool = Field(default=False, description="AdamW with 8-bit moments, by bitsandbytes.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak, of roles that the method does not scale.")
    lr_scheduler: RateName = Field(default="constant", description="How the learning rate runs.")
    lr_warmup_steps: int = Field(default=0, ge=0, description="Updates of the student until the peak.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Of the first moment.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Of the second moment.")
    adam_weight_decay: float = Field(default=0.01, ge=0, description="Share of the rate.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment.")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Gradient norm per role, at most.")
    loss_limit: float = Field(default=1e6, gt=0, description="A term whose mean is larger than this has diverged.")

    use_ema: bool = Field(default=False, description="Export and validate an average of the student.")
    ema_decay: float = Field(default=0.999, ge=0, lt=1, description="Of that average.")

    checkpointing_steps: int = Field(default=500, gt=0, description="Updates of the student between checkpoints.")
    checkpoints_total_limit: int | None = Field(default=None, gt=0, description="Older checkpoints are deleted.")
    resume_from_checkpoint: str | None = Field(default=None, description="A checkpoint's folder, or 'latest'.")
    report_to: str = Field(default="none", description="tensorboard, wandb, comet_ml, ..., all or none.")
    tracker_project_name: str = Field(default="fewstep-distill", description="What trackers call the runs.")

    def global_batch(self, processes: int) -> int:
        """Samples per turn, over all processes."""
        return self.train_batch_size * self.gradient_accumulation_steps * processes

    def identity(self, processes: int) -> dict[str, Any]:
        """What a run that is resumed must have in common with the one that wrote the checkpoint."""
        return {
            "seed": self.seed,
            "global_batch": self.global_batch(processes),
            "optimizer": self.optimizer,
            "use_8bit_adam": self.use_8bit_adam,
            "use_ema": self.use_ema,
        }
