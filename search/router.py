"""Trains the router of a `Router` cache: HarmoniCa (arXiv:2410.01723), and Learning-to-Cache (arXiv:2406.01733).

Both learn by gradient with what probability each attention and MLP computes at each step, and need no data. Every call
of the pipeline samples each of its samples twice over: one half of the rows runs the network as it is, in the other
each sublayer answers p f(x) + (1 - p) times what it computed last. So guidance, the solver and its history are the
pipeline's own, and the loss compares predictions as they are sampled with, guidance applied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from ..samplers import (
    CacheHook,
    CachePart,
    CallHook,
    Evaluation,
    InputError,
    Part,
    Passing,
    Plan,
    Run,
    Step,
    TunedFor,
    attach,
    denoisers,
    fingerprint,
)
from ..samplers.files import read_tensors, write_tensors
from ..samplers.mask import FeatureHook, check_steps, columns
from ..samplers.router import Router, write_router
from ..samplers.teacher_pass import landing
from .adaptive import Call
from .aligner import Progress

ROUTER_FILE, STATE_FILE = "router.safetensors", "router-training.safetensors"

_FORMAT = "fewstep-router-training-1"
_LIMIT = 5.0
"Logits stay between this and its negative, and start at it."


@dataclass(frozen=True)
class Recipe:
    """What sets the methods apart.

    Attributes:
        pairs: whether every second step computes everything, for the next one to reuse; else all but the first are
            routed, and a sublayer is kept where its probability is above the threshold.
        follows_router: whether the next step starts where the router's prediction leads, and not the network's own.
        refresh: iterations between measurements of how much each step weighs by the error of the final samples; 0
            weighs all alike.
    """

    pairs: bool
    follows_router: bool
    refresh: int

    def routes(self, step: int) -> bool:
        """Whether a step has probabilities to learn."""
        return step % 2 == 1 if self.pairs else step > 0


HARMONICA = Recipe(pairs=False, follows_router=True, refresh=500)
"""Step-wise denoising training on the router's own trajectory, weighted by the image error proxy."""

LEARNING_TO_CACHE = Recipe(pairs=True, follows_router=False, refresh=0)
"""The baseline: the interpolation between a step and a copy of the one before, on the network's trajectory. The paper
takes the states from noised data, we from sampling."""


@dataclass(frozen=True)
class RouterTraining:
    """How a router is trained.

    Attributes:
        penalty: what a sublayer that computes costs, in units of the squared error of the prediction; higher leaves
            more out.
        iterations: calls of the pipeline; each gives one gradient step of AdamW for each routed timestep.
        batch_size: samples in each.
        lr: learning rate.
        threshold: probability above which a sublayer will compute.
        recipe: HARMONICA or LEARNING_TO_CACHE.
        save_every: iterations from one state in the folder to the next.
    """

    penalty: float
    iterations: int = 500
    batch_size: int = 8
    lr: float = 0.01
    threshold: float = 0.1
    recipe: Recipe = HARMONICA
    save_every: int = 20

    def __post_init__(self) -> None:
        if min(self.iterations, self.batch_size, self.save_every) < 1 or self.lr <= 0 or self.penalty < 0:
            raise InputError(
                "a router is trained with iterations, batch_size and save_every of at least 1, a positive lr and a "
                f"penalty of at least 0; got {self}"
            )


def train_router(
    pipe: Any, plan: Plan, call: Call, folder: Path, training: RouterTraining, progress: Progress | None = None
) -> Plan:
    """The plan with a router in the place of its caches.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        plan: the rest of the plan, with a grid.
        call: from the numbers of some samples, which may be repeated, to the arguments of a call for them, with one
            generator for each that only its number seeds.
        folder: keeps the state of the training, so that one that was stopped goes on, and the router's file. It
            belongs to this plan, call and training; save the plan there.
        training: how it is trained.
        progress: told after each iteration.

    Raises:
        InputError: when the plan has no grid, the network no sublayers that are known, the call no seeds of its own
            for each sample, or the folder belongs to another training.
    """
    steps = plan.nominal_steps
    if steps is None or steps < 2:
        raise InputError(f"a router is trained on a grid of at least 2 steps; the plan has {steps or 'no grid'}")
    names = _names(pipe)
    state = _State(training, steps, len(names), _key(pipe, plan, training))
    state.load(folder / STATE_FILE)
    watched = plan.model_copy(update={"caches": (_Routed(state=state),)})
    while state.iteration < training.iterations:
        recipe = training.recipe
        if recipe.refresh and state.iteration % recipe.refresh == 0:
            state.weights = _image_errors(pipe, plan, call, state)
        first = state.iteration * training.batch_size
        numbers = list(range(first, first + training.batch_size))
        with attach(pipe, watched):
            pipe(**call(numbers * 2))
        state.iteration += 1
        if state.iteration % training.save_every == 0 or state.iteration == training.iterations:
            state.save(folder / STATE_FILE)
        if progress is not None:
            progress(state.iteration, training.iterations, state.loss)
    write_router(folder / ROUTER_FILE, state.probabilities(), names)
    known = {} if plan.tuned_for is None else plan.tuned_for.model_dump()
    weights = fingerprint(next(iter(denoisers(pipe).values())))
    tuned_for = TunedFor(**known | {"fingerprint": weights, "pipeline": type(pipe).__name__, "steps": steps})
    router = Router(file=ROUTER_FILE, threshold=training.threshold)
    return plan.model_copy(update={"caches": (router,), "tuned_for": tuned_for})


@dataclass
class _State:
    """The router in training.

    Attributes:
        training: how.
        steps: timesteps.
        width: sublayers.
        key: digest of what the training belongs to.
        iteration: calls of the pipeline so far.
        weights: (steps,) how much the error of each step counts.
        loss: the sum over the steps of the last call.
    """

    training: RouterTraining
    steps: int
    width: int
    key: str
    iteration: int = 0
    weights: Tensor = field(init=False)
    loss: float = 0.0

    def __post_init__(self) -> None:
        routed = filter(self.training.recipe.routes, range(self.steps))
        self.logits = {step: torch.full((self.width,), _LIMIT, requires_grad=True) for step in routed}
        # an eps beneath every gradient, so that a small penalty moves what matters nothing as far as a large one does
        self.optimizer = torch.optim.AdamW(self.logits.values(), lr=self.training.lr, eps=1e-15, weight_decay=0.0)
        self.weights = torch.ones(self.steps)

    def probability(self, step: int, column: int) -> Tensor | None:
        """With what probability a sublayer computes; None where it always does."""
        return self.logits[step][column].sigmoid() if step in self.logits else None

    def probabilities(self) -> Tensor:
        """All of them, (steps, width)."""
        rows = (self.logits.get(step, torch.full((self.width,), torch.inf)) for step in range(self.steps))
        return torch.stack([row.detach().sigmoid() for row in rows])

    def learn(self, step: int, student: Tensor, teacher: Tensor) -> None:
        """One gradient step on w |y - y*|^2 + penalty sum p (HarmoniCa's L_SDT with the image error proxy)."""
        logits = self.logits[step]
        error = self.weights[step].to(student.device) * (student - teacher).float().square().mean()
        loss = error.cpu() + self.training.penalty * logits.sigmoid().sum()
        (logits.grad,) = torch.autograd.grad(loss, logits)
        self.optimizer.step()
        logits.grad = None
        with torch.no_grad():
            logits.clamp_(-_LIMIT, _LIMIT)
        self.loss += float(loss.detach())

    def save(self, path: Path) -> None:
        """Writes everything that the next iteration depends on."""
        tensors = {"weights": self.weights}
        for step, logits in self.logits.items():
            tensors[f"logits.{step}"] = logits.detach()
            tensors |= {f"{name}.{step}": value for name, value in self.optimizer.state[logits].items()}
        header = {"format": _FORMAT, "key": self.key, "iteration": str(self.iteration)}
        write_tensors(path, tensors, header)

    def load(self, path: Path) -> None:
        """Goes on from what was saved, if there is something.

        Raises:
            InputError: when it is of another training.
        """
        if not path.exists():
            return
        tensors, header = read_tensors(path)
        if header.get("format") != _FORMAT or header.get("key") != self.key:
            raise InputError(f"{path} is of another pipeline, plan or training; give another folder")
        self.iteration, self.weights = int(header["iteration"]), tensors["weights"]
        for step, logits in self.logits.items():
            logits.data = tensors[f"logits.{step}"]
            moments = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[logits] = {name: tensors[f"{name}.{step}"] for name in moments}


class _Routed(CachePart):
    """Trains the router while the pipeline samples."""

    type: Literal["router-training"] = "router-training"
    state: Any

    def reach(self, network: nn.Module) -> tuple[str, ...]:
        return Router().reach(network)

    def computes(self, steps: int) -> None:
        return None

    def make(self, modules: Mapping[str, nn.Module], run: Run) -> CacheHook:
        return _Blending(modules, self.state, run.scheduler)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        super().prepare(run, known_arguments)
        run.hooks.append(lambda: _Learning(self.state))


class _Blending(FeatureHook):
    """Blends what a sublayer gives with what was kept of it, in the second half of the samples."""

    def __init__(self, modules: Mapping[str, nn.Module], state: _State, scheduler: Any) -> None:
        super().__init__(modules, frozenset())
        self.state, self.scheduler, self.columns = state, scheduler, columns(modules)

    def evaluate(self, evaluation: Evaluation, proceed: Callable[[Evaluation], Any]) -> Any:
        """Runs the network with gradients."""
        check_steps("router", self.state.steps, len(self.scheduler.timesteps))
        batch = self.state.training.batch_size
        rows = torch.tensor(evaluation.kept if evaluation.kept is not None else range(evaluation.rows))
        self.routed = rows % (2 * batch) >= batch
        torch.set_grad_enabled(True)  # until the step is taken
        return super().evaluate(evaluation, proceed)

    def pass_module(self, passing: Passing) -> Any:
        """Runs the sublayer; the rows that are routed answer with the blend."""
        evaluation, place = passing.evaluation, self.place(passing)
        kept = self.memory.recall(place, evaluation)
        probability = self.state.probability(evaluation.index, self.columns[passing.name])
        output = passing.run()
        if kept is None or probability is None or float(probability.detach()) > self.state.training.threshold:
            self.memory.keep(place, tree_map_only(Tensor, torch.detach, output), evaluation)
        if kept is None or probability is None:
            return output
        return tree_map(lambda new, old: self._blend(new, old, probability), output, kept)

    def _blend(self, new: Any, old: Any, probability: Tensor) -> Any:
        if not isinstance(new, Tensor):
            return new
        p = probability.to(new.device, new.dtype)
        routed = self.routed.to(new.device).repeat_interleave(len(new) // len(self.routed))
        return torch.where(routed.view(-1, *(1,) * (new.ndim - 1)), p * new + (1 - p) * old, new)


class _Learning(CallHook):
    """Compares the halves of the samples at each step, learns, and goes on from one of them."""

    def __init__(self, state: _State) -> None:
        self.state = state
        state.loss = 0.0

    def before_step(self, step: Step) -> None:
        recipe = self.state.training.recipe
        plain, routed = self._halves(step.output)
        if not torch.equal(*self._halves(step.x)):
            raise InputError(
                "samples of the same number start from different noise; give the call one generator for each sample, "
                "which its number seeds"
            )
        if routed.requires_grad and step.index in self.state.logits:
            self.state.learn(step.index, routed, plain.detach())
        chosen = (routed if recipe.follows_router else plain).detach()
        step.output = torch.stack([chosen, chosen], dim=1).flatten(0, 2)
        torch.set_grad_enabled(False)

    def _halves(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that run the network as it is, and those that are routed: (branches, batch_size, ...) each."""
        batch = self.state.training.batch_size
        if len(tensor) % (2 * batch):
            raise InputError(f"the call samples {len(tensor)} rows for {2 * batch} numbers; give one sample for each")
        plain, routed = tensor.reshape(-1, 2, batch, *tensor.shape[1:]).unbind(1)
        return plain, routed


class _Landed(Part):
    """Has the calls of a plan say what they end with."""

    type: Literal["landed"] = "landed"
    listen: Any

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        self.listen.append(landing(run))


def _image_errors(pipe: Any, plan: Plan, call: Call, state: _State) -> Tensor:
    """Of each step, the squared error of the final samples when only that step reuses; their mean is 1.

    The image error proxy of HarmoniCa, lambda_t. A step that the router would not let reuse anything reuses all.

    Returns:
        (steps,) float32.
    """
    numbers = list(range(state.training.batch_size))

    def landed(*caches: Part) -> Tensor:
        listen: list[Any] = []
        with attach(pipe, plan.model_copy(update={"caches": (*caches, _Landed(listen=listen))})):
            samples: Tensor = listen[0](lambda: pipe(**call(numbers)))[1]
        return samples.float().cpu()

    threshold = state.training.threshold
    exact, errors = landed(), torch.zeros(state.steps)
    for step, row in enumerate(state.probabilities()):
        if step in state.logits:
            alone = torch.ones(state.steps, state.width)
            alone[step] = row if bool((row <= threshold).any()) else 0.0
            router = Router(probabilities=tuple(map(tuple, alone.tolist())), threshold=threshold)
            errors[step] = (landed(router) - exact).square().mean()
    total = errors.sum()
    return errors * len(state.logits) / total if total > 0 else torch.ones(state.steps)


def _names(pipe: Any) -> tuple[str, ...]:
    """Names of the sublayers of the pipeline's networks, which have as many each.

    Raises:
        InputError: when a network has none that is known, or they differ in number.
    """
    names = [Router().reach(network) for network in denoisers(pipe).values()]
    if len({len(found) for found in names}) > 1:
        raise InputError(f"the networks of a routed pipeline have as many sublayers each; got {[*map(len, names)]}")
    return names[0]


def _key(pipe: Any, plan: Plan, training: RouterTraining) -> str:
    """Digest of what a training belongs to; it may be made longer."""
    about = asdict(training) | {"iterations": None, "save_every": None}
    weights = [fingerprint(network) for network in denoisers(pipe).values()]
    return hashlib.sha256(json.dumps([weights, plan.to_json(), about]).encode()).hexdigest()
