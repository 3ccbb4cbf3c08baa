"""The training loop of all distillation methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from ..samplers.errors import InputError
from .checkpoints import Checkpoints, State, check_identity, load
from .loop_options import LoopOptions
from .method import Loss, Method, Moment, Source, TrainedRoles, seed_of
from .optimisers import RoleOptimiser
from .run_log import Means, RunLog, tracked_settings
from .schedule import AVERAGE, Average, Counters, Schedule, rate_factor
from .shards import Sharing
from .stopping import StopRequest

Watch = Callable[[int], Mapping[str, float]]
"""From the number of updates so far to further values for the log: validation, a progress bar."""

_FOREIGN = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: updates of the student.
        checkpoint: the last one, which holds exactly this state, or this step's state from a few turns earlier.
        stopped_by: name of the signal that asked the run to stop, or None when it is complete.
    """

    step: int
    checkpoint: Path
    stopped_by: str | None


def no_watch(step: int) -> Mapping[str, float]:
    """A watch that does nothing."""
    return {}


def refuse_sharding(accelerator: Accelerator) -> None:
    """Refuses an accelerator that would cut up the networks in a way of its own.

    Raises:
        InputError: naming what does.
    """
    if accelerator.distributed_type in _FOREIGN:
        kind = accelerator.distributed_type.value
        raise InputError(
            f"the networks cannot be sharded by {kind}; run accelerate with plain multi-GPU, and with "
            "--shard_networks true where they are too large for one"
        )


def identity_of(
    method: Method, options: LoopOptions, accelerator: Accelerator, further: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run that is resumed must have in common with the one that wrote the checkpoint."""
    return {
        "method": method.model_dump(mode="json"),
        "mixed_precision": accelerator.mixed_precision,
        **options.identity(accelerator.num_processes),
        **further,
    }


class Loop:
    """Trains the roles of a method.

    A turn takes one global batch, backpropagates the method's losses one by one, each into the parameters of its own
    role only, averages the gradients over micro-batches and processes, and updates the roles whose turn it is. All
    randomness follows from the seed and the counters, so that a resumed run is the uninterrupted one bit for bit on
    the CPU, and the same global batch split over processes gives the same result up to rounding. Dropout is the
    exception to the latter: each process draws its own.

    Args:
        method: what is trained, and when.
        roles: the networks, on the accelerator's device.
        source: of the batches.
        options: of the run.
        accelerator: of `run_log.make_accelerator`, or a user's own.
        watch: called in all processes after each update of the student, before its line is logged.
        identity: what a resumed run must have in common with this one besides method and options, as JSON.
        sharing: the processes that networks are cut over (`shards.cut`); None where each holds them whole.

    Raises:
        InputError: for a sharding of the networks that the loop does not do, or a role that cannot be trained.
    """

    def __init__(
        self,
        method: Method,
        roles: TrainedRoles,
        source: Source,
        options: LoopOptions,
        accelerator: Accelerator,
        watch: Watch = no_watch,
        identity: Mapping[str, Any] | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        refuse_sharding(accelerator)
        if sharing is None and accelerator.distributed_type == DistributedType.FSDP:
            raise InputError("accelerate is configured for FSDP, and the networks are whole; run it with multi-GPU")
        self.method, self.roles, self.source, self.options = method, roles, source, options
        self.accelerator, self.watch, self.sharing = accelerator, watch, sharing
        self._identity = identity_of(method, options, accelerator, identity or {})
        self.schedule = _averaged(method.turns(), options)
        self.counters = Counters()
        self.checkpoints = Checkpoints(options.output_dir, options.checkpoints_total_limit)
        self.optimisers = {role: RoleOptimiser(role, roles.trainable(role), options) for role in self.schedule.roles}
        self._log = RunLog(options.output_dir)
        self._means = Means()
        self._seconds = 0.0

    def run(self) -> Outcome:
        """Trains until the last update, or until SIGTERM or SIGINT, and leaves a checkpoint of where it ended.

        Raises:
            InputError: for a checkpoint that cannot be resumed or written, and when a loss, a gradient or a weight is
                not finite or a loss exceeds the limit; the message names the last good checkpoint.
        """
        options, accelerator = self.options, self.accelerator
        chosen = self.checkpoints.choose(options.resume_from_checkpoint)
        if chosen:
            self._resume(chosen)
        if accelerator.is_main_process:
            self.checkpoints.sweep()
            self._log.cut(self.counters.step)
        accelerator.init_trackers(
            options.tracker_project_name, tracked_settings(options.model_dump(exclude={"hub_token"}))
        )
        stopped = None
        with self._own_generators(), StopRequest() as request:
            saved = chosen
            while self.counters.step < options.max_train_steps and not stopped:
                before = self.counters.step
                stopped = self._turn(request)
                ended = self.counters.step == options.max_train_steps
                due = self.counters.step > before and self.counters.step % options.checkpointing_steps == 0
                if due or ended or stopped:
                    saved = self._save()
        assert saved is not None
        return Outcome(self.counters.step, saved, stopped)

    def _own_generators(self) -> AbstractContextManager[None]:
        """Leaves torch's global generators as they were at the start of the block."""
        device = self.accelerator.device
        if device.type == "cpu":
            return torch.random.fork_rng(devices=[])
        return torch.random.fork_rng(devices=[device], device_type=device.type)

    def _seed(self, seed: int) -> None:
        """Seeds torch's global generators; ``torch.manual_seed`` also asks for those of absent devices."""
        torch.default_generator.manual_seed(seed)
        device = self.accelerator.device
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)

    def _resume(self, path: Path) -> None:
        saved = load(path)
        check_identity(path, saved, self._state())
        self.roles.load_state(saved.roles)
        for role, tensors in saved.optimisers.items():
            self.optimisers[role].load_state(tensors)
        if self.accelerator.scaler is not None and saved.scaler:
            self.accelerator.scaler.load_state_dict(dict(saved.scaler))
        self.counters = saved.counters

    def _turn(self, request: StopRequest) -> str | None:
        """One turn; returns the signal that asked some process to stop."""
        began = time.perf_counter()
        self._enter_stage()
        updates = self.schedule.updates(self.counters)
        losses = self._backpropagate(updates)
        if self.sharing is not None:
            self.sharing.refuse_disorder()
        norms = {f"grad_norm/{role}": self.optimisers[role].gather(self.accelerator) for role in updates}
        measured, stop = self._measured(losses | norms, request.asked is not None)
        self._refuse_divergence(measured)
        rates = self._rates(updates)
        for role in updates:
            self.optimisers[role].step(rates[f"learning_rate/{role}"], self.accelerator.scaler)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.counters = self.schedule.after(self.counters)
        self._means.add(measured | rates)
        self._seconds += time.perf_counter() - began
        if self.schedule.leader in updates:
            for average in self.schedule.averages:
                self.roles.update_ema(average.role, average.at(self.counters.step))
            self._report()
        return (request.asked or "SIGTERM") if stop else None

    def _enter_stage(self) -> None:
        stage = self.schedule.due(self.counters)
        while self.counters.stage < stage:
            self.counters = self.schedule.entered(self.counters, self.counters.stage + 1)
            self.method.enter_stage(self.counters.stage, self.roles)
            for role in self.schedule.stages[self.counters.stage].fresh:
                self.optimisers[role].reset()

    def _backpropagate(self, updates: tuple[str, ...]) -> dict[str, Tensor]:
        """Leaves the gradients of a turn in the parameters; returns the means of the losses, by name in the log."""
        options, accelerator = self.options, self.accelerator
        means: dict[str, Tensor] = {}
        for micro in range(options.gradient_accumulation_steps):
            block = micro * accelerator.num_processes + accelerator.process_index
            moment = self._moment(updates, block)
            batch = self.source.batch(self.counters.turn, moment.positions).to(accelerator.device)
            self._seed(seed_of(options.seed, self.counters.turn, "block", block))
            for loss in self._losses(batch, moment):
                name = f"train/{loss.role}/{loss.term}"
                mean = loss.value.mean() / options.gradient_accumulation_steps
                scaled = mean if accelerator.scaler is None else accelerator.scaler.scale(mean)
                scaled.backward(inputs=list(self.optimisers[loss.role].parameters.values()))
                values = {name: mean.detach()} | {
                    f"train/{loss.role}/{part}": value.detach().mean() / options.gradient_accumulation_steps
                    for part, value in loss.parts.items()
                }
                means |= {key: means.get(key, torch.zeros_like(mean)) + value for key, value in values.items()}
        for role in updates:
            if all(parameter.grad is None for parameter in self.optimisers[role].parameters.values()):
                raise ValueError(f"the turn updates {role!r}, but no loss of it reaches a parameter of that role")
        return means

    def _moment(self, updates: tuple[str, ...], block: int) -> Moment:
        rows, counters = self.options.train_batch_size, self.counters
        return Moment(
            step=counters.step,
            turn=counters.turn,
            stage=counters.stage,
            stage_step=counters.step - self.schedule.stages[counters.stage].start,
            updates=updates,
            seed=self.options.seed,
            positions=range(block * rows, (block + 1) * rows),
            device=self.accelerator.device,
        )

    def _losses(self, batch: Any, moment: Moment) -> Iterator[Loss]:
        losses = iter(self.method.losses(batch, self.roles, moment))
        while True:
            with self.accelerator.autocast():
                loss = next(losses, None)
            if loss is None:
                return
            if loss.role not in moment.updates:
                raise ValueError(f"{loss.term} trains {loss.role!r}, but the turn updates {', '.join(moment.updates)}")
            if loss.value.ndim != 1:
                raise ValueError(f"{loss.term} must be one loss per sample, (B,); got {tuple(loss.value.shape)}")
            if not loss.value.requires_grad:
                raise ValueError(f"{loss.term} trains {loss.role!r}, but no gradient flows from it")
            yield loss

    def _measured(self, values: Mapping[str, Tensor], stop: bool) -> tuple[dict[str, float], bool]:
        """Values as numbers, averaged over the processes, and whether one of them is asked to stop."""
        flag = torch.tensor(float(stop), device=self.accelerator.device)
        together = torch.stack([*(value.float() for value in values.values()), flag])
        *numbers, asked = self.accelerator.reduce(together, "mean").tolist()
        return dict(zip(values, numbers, strict=True)), asked > 0

    def _refuse_divergence(self, measured: Mapping[str, float]) -> None:
        scaler, update = self.accelerator.scaler, self.counters.step + 1
        for name, value in measured.items():
            is_loss = name.startswith("train/")
            if not math.isfinite(value) and (is_loss or scaler is None or scaler.get_scale() < 1):
                self._give_up(f"{name} is {value} in update {update}")
            if is_loss and abs(value) > self.options.loss_limit:
                self._give_up(f"{name} is {value:g} in update {update}, above --loss_limit {self.options.loss_limit:g}")

    def _give_up(self, what: str) -> None:
        raise InputError(f"{what}; {self.checkpoints.last_good()}; use a smaller --learning_rate")

    def _rates(self, updates: tuple[str, ...]) -> dict[str, float]:
        options, schedule = self.options, self.schedule
        step, total = schedule.span(self.counters, options.max_train_steps)
        rate = options.learning_rate * rate_factor(options.lr_scheduler, step, options.lr_warmup_steps, total)
        return {f"learning_rate/{role}": rate * schedule.rates.get(role, 1.0) for role in updates}

    def _report(self) -> None:
        values = {**self._means.take(), "seconds": self._seconds, **self.watch(self.counters.step)}
        self._seconds = 0.0
        if self.accelerator.is_main_process:
            self._log.append(self.counters.step, values)
        self.accelerator.log(values, step=self.counters.step)

    def _state(self) -> State:
        scaler = self.accelerator.scaler
        return State(
            identity=self._identity,
            counters=self.counters,
            roles=self.roles.state(),
            optimisers={role: tensors for role, each in self.optimisers.items() if (tensors := each.state())},
            scaler={} if scaler is None else scaler.state_dict(),
        )

    def _save(self) -> Path:
        for role, optimiser in self.optimisers.items():
            if name := optimiser.broken(self.accelerator):
                self._give_up(f"{role}: {name} is not finite after update {self.counters.step}")
        failure, main = None, self.accelerator.is_main_process
        state = self._state() if main or self.sharing is not None else None
        if main and state is not None:
            try:
                self.checkpoints.save(state)
            except InputError as error:
                failure = error
        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if self.accelerator.reduce(failed, "max").item():
            raise failure or InputError("the main process could not write a checkpoint; its message says why")
        return self.checkpoints.path(self.counters.step)


def _averaged(schedule: Schedule, options: LoopOptions) -> Schedule:
    """The schedule with the average that is sampled with, where the options want one."""
    if not options.use_ema:
        return schedule
    return replace(schedule, averages=(*schedule.averages, Average(AVERAGE, options.ema_decay)))
