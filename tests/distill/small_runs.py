"""Whole distillations of a tiny pipeline in a folder, small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from tiny import tiny_dit

from fewstep.distill import methods as _methods  # noqa: F401  (registers them)
from fewstep.distill.loop import Outcome
from fewstep.distill.method import METHODS
from fewstep.distill.options import DistillOptions
from fewstep.distill.run import distill
from fewstep.samplers import Plan
from fewstep.samplers.files import read_tensors


class Given:
    """What a run is given: a pipeline, a plan of the teacher, and images.

    Attributes:
        pipe: folder of a tiny DiT.
        teacher: file of a plan of two steps.
        images: folder of six images of two classes.
    """

    def __init__(self, folder: Path) -> None:
        self.pipe, self.teacher, self.images = folder / "dit", folder / "teacher.json", folder / "images"
        tiny_dit().save_pretrained(self.pipe)
        guidance = {"type": "constant", "scale": 2.0}
        Plan.from_json({"fewstep_plan": 1, "grid": {"type": "spacing", "steps": 2}, "guidance": guidance}).save(
            self.teacher
        )
        draw = np.random.default_rng(0)
        for label in (0, 1):
            (self.images / str(label)).mkdir(parents=True)
            for number in range(3):
                pixels = draw.integers(0, 256, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(self.images / str(label) / f"{number}.png")

    def options(self, folder: Path, updates: int = 3, **changes: Any) -> dict[str, Any]:
        """Options of a run by name."""
        return {
            "pipe": str(self.pipe),
            "teacher": self.teacher,
            "output_dir": folder,
            "max_train_steps": updates,
            "train_batch_size": 3,
            "learning_rate": 1e-3,
            "checkpointing_steps": 2,
            "class_labels": (0, 1, 2),
            "num_validation_images": 0,
            "encode_batch_size": 4,
        } | changes

    def run(self, name: str, folder: Path, hyper: dict[str, Any], updates: int = 3, **changes: Any) -> Outcome:
        """A quiet run of a method with hyper-parameters."""
        fresh_states()
        return distill(METHODS[name](**hyper), DistillOptions(**self.options(folder, updates, **changes)))

    def flags(self, folder: Path, updates: int = 3, **changes: Any) -> list[str]:
        """The options of a run as a command line."""
        return as_flags(self.options(folder, updates, **changes))


def as_flags(options: dict[str, Any]) -> list[str]:
    """Options as a command line; those that are None or empty are left out."""
    found = []
    for name, value in options.items():
        if value is not None and value != ():
            values = value if isinstance(value, tuple) else (value,)
            found += [f"--{name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
    return found


def fresh_states() -> None:
    """Lets the next accelerator know nothing of earlier ones in this process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def roles_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint / "roles.safetensors")[0]


def assert_same_roles(one: Path, other: Path) -> None:
    """All tensors of two checkpoints are equal bit for bit."""
    first, second = roles_in(one), roles_in(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
