"""A seeded, resumable training loop for the demo's networks.

Batches, noise and times of a step depend on ``(seed, step)`` alone, so a run that was stopped and
resumed takes the same steps as one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from fewstep.scripts.demo.data import DEFAULT_DATA


def training_parser(description: str | None, steps: int, images: bool = True) -> argparse.ArgumentParser:
    """The flags that every training script has: ``--work``, ``--steps``, ``--seed``, and ``--data`` for images."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder of the run (resumed when it exists)")
    if images:
        parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser


LossFunction = Callable[[Generator], dict[str, Tensor]]
"""From the step's generator to named loss terms; their sum is minimised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How long and how fast to train."""

    steps: int
    lr: float
    warmup: int = 200
    "Steps of linear warm-up, then cosine decay to ``lr_end * lr``."
    lr_end: float = 0.02
    weight_decay: float = 0.0
    clip: float = 1.0
    "Largest gradient norm."
    ema: float = 0.999
    "Decay of the averaged weights, shortened to (1 + step) / (10 + step) at the start."
    seed: int = 0
    bf16: bool = False
    "Forward pass under bfloat16 autocast."
    save_every: int = 500


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of ``step`` (from 0)."""
    warm = min(1.0, (step + 1) / max(recipe.warmup, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.lr * warm * (recipe.lr_end + (1 - recipe.lr_end) * cosine)


def step_generator(seed: int, step: int) -> Generator:
    """The generator of one training step."""
    return Generator().manual_seed((seed << 32) + step)


def train(
    model: nn.Module,
    loss_function: LossFunction,
    recipe: Recipe,
    folder: Path,
    on_save: Callable[[int, nn.Module], None] | None = None,
) -> dict[str, float]:
    """Trains ``model`` in place and leaves the averaged weights in it.

    Args:
        model: network in float32.
        loss_function: gives the loss terms; reads ``model``.
        recipe: the optimiser's settings.
        folder: where ``state.safetensors``, ``progress.json`` and ``log.jsonl`` go. A state found there is resumed.
        on_save: called with the step and the averaged model after each save.

    Returns:
        ``{"steps": ..., "train_s": ...}``, the wall time summed over all sittings.

    Raises:
        ValueError: when the folder holds a run of another recipe.
        FloatingPointError: when the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.99), fused=True
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    start, spent = _resume(folder, recipe, model, optimizer, average)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    model.train()
    clock = time.perf_counter()
    with Progress(*columns) as progress:
        task = progress.add_task(folder.name, total=recipe.steps, completed=start, loss="")
        for step in range(start, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(recipe, step)
            with torch.autocast("cpu", torch.bfloat16) if recipe.bf16 else nullcontext():
                terms = loss_function(step_generator(recipe.seed, step))
            loss = torch.stack(list(terms.values())).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"gradient norm is {norm.item()} at step {step}; lower lr (now {recipe.lr})")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
            if step % 50 == 0 or step + 1 == recipe.steps:
                shown = {name: round(value.item(), 5) for name, value in terms.items()}
                progress.update(task, loss=" ".join(f"{k} {v:.4f}" for k, v in shown.items()))
                elapsed = round(spent + time.perf_counter() - clock, 1)
                with (folder / "log.jsonl").open("a") as log:
                    log.write(
                        json.dumps({"step": step, "elapsed_s": elapsed, "norm": round(norm.item(), 4)} | shown) + "\n"
                    )
            progress.advance(task)
            if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
                elapsed = spent + time.perf_counter() - clock
                _save(folder, recipe, step + 1, elapsed, model, optimizer, average)
                if on_save is not None:
                    _call_with_average(on_save, step + 1, model, average)
    model.load_state_dict(average)
    model.eval()
    return {"steps": float(recipe.steps), "train_s": spent + time.perf_counter() - clock}


def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    live = model.state_dict()
    names = [name for name, value in live.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[n] for n in names], [live[n] for n in names], 1 - decay)


def _call_with_average(
    on_save: Callable[[int, nn.Module], None], step: int, model: nn.Module, average: dict[str, Tensor]
) -> None:
    live = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(average)
    model.eval()
    with torch.no_grad():
        on_save(step, model)
    model.load_state_dict(live)
    model.train()


def _save(
    folder: Path,
    recipe: Recipe,
    step: int,
    elapsed: float,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    header = {"step": str(step), "train_s": f"{elapsed:.1f}", "recipe": json.dumps(asdict(recipe))}
    temporary = folder / "state.safetensors.tmp"
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, temporary, metadata=header)
    temporary.replace(folder / "state.safetensors")


def read_header(folder: Path) -> dict[str, str]:
    """What a run's state says of itself: ``step``, ``train_s`` and ``recipe`` (JSON)."""
    with safe_open(folder / "state.safetensors", "pt") as stream:
        return dict(stream.metadata())


def _resume(
    folder: Path,
    recipe: Recipe,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> tuple[int, float]:
    path = folder / "state.safetensors"
    if not path.is_file():
        return 0, 0.0
    header = read_header(folder)
    if json.loads(header["recipe"]) != asdict(recipe):
        raise ValueError(f"{folder} holds a run of another recipe ({header['recipe']}); give another --work folder")
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    average.update({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(header["step"]), float(header["train_s"])
