"""What a distillation leaves: weights that stock diffusers loads, and beside them the plans that sample with them."""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from ..samplers import Plan, TunedFor, denoisers, fingerprint
from ..samplers.errors import InputError
from ..samplers.guidance_schedule import GuidanceSchedule
from .deploy import unguided
from .export_lora import LoraFiles, export_lora
from .method import Method
from .role_kinds import Ema, lora_setting
from .schedule import AVERAGE
from .team import Team

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Student:
    """A student among the networks of a run, and how it is sampled.

    Attributes:
        pipe: the teacher's pipeline.
        component: name of the network in it.
        team: the networks of the run.
        role: the student.
        method: that trains it.
        plans: of `Method.plan`, by number of steps, the one that ships as ``plan.json`` first.
    """

    pipe: Any
    component: str
    team: Team
    role: str
    method: Method
    plans: Mapping[int, Plan]

    @property
    def deployed_role(self) -> str:
        """The role that it is sampled with: its average over the run where there is one, or itself."""
        return AVERAGE if self.team.roles.kinds.get(AVERAGE) == Ema(self.role) else self.role


@dataclass(frozen=True)
class Export:
    """A student on disk.

    Attributes:
        folder: where it is.
        component: name of its network in the pipeline.
        role: whose weights these are: the student's, or those of its average.
        plans: as written, by number of steps; the first one is ``plan.json``. None for a further student of a method.
        lora: how the adapter is loaded; None for a student with all weights of its own.
    """

    folder: Path
    component: str
    role: str
    plans: Mapping[int, Plan]
    lora: LoraFiles | None

    def plan_file(self, steps: int) -> Path:
        """The file of one of the plans."""
        return self.folder / _plan_name(self.plans, steps)


def origin(pipe: Any) -> TunedFor:
    """What plans of a student say about the pipeline that it was distilled from.

    Args:
        pipe: as it was loaded, before roles are made on its network.
    """
    return TunedFor(fingerprint=fingerprint(next(iter(denoisers(pipe).values()))), pipeline=type(pipe).__name__)


def deployed_plan(pipe: Any, network: nn.Module, method: Method, plan: Plan) -> Plan:
    """A plan of ``method.plan`` for a pipeline: without guidance where the student has it in its weights.

    Networks that are told the scale keep it; there is no second branch to leave out.

    Args:
        pipe: the pipeline.
        network: the student's.
        method: says whether the guidance is in the weights.
        plan: how the student is sampled.
    """
    config = getattr(network, "config", {})
    told = config.get("guidance_embeds") or config.get("time_cond_proj_dim")
    branches = "guidance_scale" in inspect.signature(type(pipe).__call__).parameters and not told
    return unguided(plan) if method.guidance_in_student and branches else plan


def call_arguments(plan: Plan, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call that a plan leaves to the caller."""
    decided = {"num_inference_steps": plan.grid, "guidance_scale": plan.guidance}
    if isinstance(plan.guidance, GuidanceSchedule) or getattr(plan.guidance, "scale", 2.0) <= 1:
        decided["true_cfg_scale"] = plan.guidance
    return {name: value for name, value in call_kwargs.items() if decided.get(name) is None}


def export_student(
    student: Student, folder: Path, *, base: TunedFor, dtype: torch.dtype | None = None, kohya: bool = False
) -> Export:
    """Writes a student: an adapter, or its network as ``save_pretrained`` does; and its plans.

    An export that was there is replaced when the new one is complete; ``plan.json`` goes away first and comes last.
    Of a method with several students the plans sample the first one; the others go without, in folders of their names
    in ``folder``.

    Args:
        student: after its training.
        folder: where it goes; made when it is not there.
        base: of `origin`.
        dtype: what the weights are stored as; as they are when None.
        kohya: whether to write an adapter with kohya's keys as well.

    Raises:
        InputError: when weights are not finite or cannot be written, or kohya's keys are asked for without an adapter.
    """
    pipe, component, method, plans = student.pipe, student.component, student.method, student.plans
    roles, sampled = student.team.roles, student.deployed_role
    adapter = lora_setting(roles.kinds, roles.kinds[sampled]) is not None
    if kohya and not adapter:
        raise InputError("kohya's keys are for adapters, and this student has all weights; leave --kohya out")
    if student.role != method.students[0]:
        folder, plans = folder / student.role, {}
    lora = None
    with _replacing(folder) as staged:
        if adapter:
            lora = export_lora(pipe, component, roles.lora(sampled), staged, dtype=dtype, kohya=kohya)
            weights = {"type": "lora", "file": lora.paths[0].name}
            lora = LoraFiles(tuple(folder / path.name for path in lora.paths), lora.imports, lora.load)
        else:
            weights = {"type": "student", "folder": component}
        with roles.use(sampled, grad=False, frozen=True) as network:
            if not adapter:
                write_network(network, staged / component, dtype)
            written = {
                steps: _complete(deployed_plan(pipe, network, method, plan), steps, method, base, weights, component)
                for steps, plan in plans.items()
            }
        for steps, plan in written.items():
            plan.save(staged / _plan_name(written, steps))
    return Export(folder, component, sampled, written, lora)


def write_network(network: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a network as ``save_pretrained`` does, from weights on any device.

    Args:
        network: of diffusers.
        folder: where it goes.
        dtype: what floating point weights are stored as; as they are when None.

    Raises:
        InputError: when it is none of diffusers' networks, its weights are not finite, or it cannot be written.
    """
    if not isinstance(network, ModelMixin):
        raise InputError(f"{type(network).__name__} is no network of diffusers and cannot be exported as one")
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
        for name, tensor in network.state_dict().items()
    }
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"{name} of the student is not finite; export an earlier checkpoint, or a wider dtype")
    config = {key: value for key, value in network.config.items() if key != "_name_or_path"}
    with init_empty_weights():
        twin: Any = type(network).from_config(config)
    twin.load_state_dict(tensors, assign=True)
    try:
        twin.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {folder}: {error}") from error


def _complete(
    plan: Plan, steps: int, method: Method, base: TunedFor, weights: Mapping[str, Any], component: str
) -> Plan:
    """The plan with its name, where it comes from, and the files of its weights."""
    return Plan.from_json(
        {
            "name": f"{method.type}-{steps}",
            **plan.to_json(),
            "weights": [{**weights, "component": component}],
            "tuned_for": base.model_copy(update={"steps": steps}).model_dump(exclude_none=True),
        }
    )


def _plan_name(plans: Mapping[int, Plan], steps: int) -> str:
    return PLAN_FILE if steps == next(iter(plans)) else f"plan-{steps}.json"


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yields a folder whose entries move into ``folder`` when the block ends well, and vanish when not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(".export-*"):
            shutil.rmtree(killed, ignore_errors=True)
        staged = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield staged
        for path in staged.rglob("*.safetensors"):  # which are for their owner alone otherwise
            path.chmod(0o644)
        for stale in folder.glob("plan*.json"):
            stale.unlink()
        for path in sorted(staged.iterdir(), key=lambda path: (path.name.startswith("plan"), path.name == PLAN_FILE)):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
