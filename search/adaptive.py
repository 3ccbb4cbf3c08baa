"""Trains the policy of an `AdaptiveSteps` grid by policy gradient (AdaDiff, arXiv:2311.14768).

Every sample is rendered once with each grid and scored; the scores are kept in a file, so that a search that was
stopped goes on where it was. The policy is then trained on the file alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..samplers import InputError, Part, Plan, attach, denoisers, fingerprint
from ..samplers.adaptive_steps import AdaptiveSteps
from ..samplers.files import read_tensors, write_tensors
from ..samplers.samples import conditions_of, count_samples
from ..samplers.scoring import images_in, score
from ..samplers.step_policy import SHAPES, embedding_features, label_keys, policy_logits, write_policy

Call = Callable[[Sequence[int]], dict[str, Any]]
"""From the numbers of some samples to the arguments of a call for them, seeds included."""

Progress = Callable[[int, int], None]
"""Told the samples rendered and how many there will be."""

SCORES_FILE, POLICY_FILE = "scores.safetensors", "policy.safetensors"


@dataclass(frozen=True)
class RewardRule:
    """What a number of steps u is worth for one sample (arXiv:2311.14768).

    R(u) = O(u) + weight Q(u) where the score of u is among the sample's ``top`` best, else -penalty; Q is the score,
    and O(u) = 1 - u / u_max the share of steps saved. (The paper's weight and penalty are not published; ours are 1.)

    Attributes:
        top: how many of the choices count as good, at least 1; equal scores rank equal. 3 of 10 in the paper.
        weight: lambda, at least 0, per unit of the score.
        penalty: gamma, at least 0.
    """

    top: int = 3
    weight: float = 1.0
    penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top < 1 or self.weight < 0 or self.penalty < 0:
            raise InputError(f"a reward needs top of at least 1, weight and penalty of at least 0; got {self}")

    def rewards(self, scores: Tensor, counts: Sequence[int]) -> Tensor:
        """Rewards (n, choices) float64 of scores (n, choices) of ``counts`` steps.

        Raises:
            InputError: when there are fewer choices than ``top``.
        """
        if self.top > len(counts):
            raise InputError(f"top is {self.top} and there are {len(counts)} choices; give at most as many")
        worst_good = scores.topk(self.top, dim=1).values[:, -1:]
        saved = 1 - torch.tensor(counts, dtype=torch.float64) / max(counts)
        return torch.where(scores >= worst_good, saved + self.weight * scores, -self.penalty)


@dataclass(frozen=True)
class PolicyTraining:
    """How the policy is trained.

    Attributes:
        iterations: gradient steps of Adam.
        batch_size: samples in each.
        lr: learning rate.
        hidden: width of the policy network's hidden layer.
        seed: of everything that is drawn.
    """

    iterations: int = 1000
    batch_size: int = 64
    lr: float = 0.02
    hidden: int = 64
    seed: int = 0


def search_adaptive(
    pipe: Any,
    plan: Plan,
    grids: Sequence[Part],
    scorer: Any,
    call: Call,
    n: int,
    folder: Path,
    *,
    condition: str | None = None,
    reward: RewardRule | None = None,
    training: PolicyTraining | None = None,
    batch_size: int = 16,
    resources: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """The plan with an adaptive grid whose policy was trained on scored samples.

    Args:
        pipe: the pipeline, with no plan attached; as it was afterwards.
        plan: the rest of the plan; its grid is replaced.
        grids: grid parts to choose from, with more steps from one to the next.
        scorer: judges images; see `fewstep.samplers.scoring.Scorer`.
        call: from the numbers of some samples, of 0 to n - 1, to the arguments of a call for them, seeds included.
        n: number of training samples; each is rendered with each of the grids.
        folder: keeps the scores, and the policy network where the condition is an embedding. It belongs to this
            plan, scorer and call; save the plan there.
        condition: the call's argument that the policy looks at: class_labels or prompt for a table, an embedding for
            a network; None for class_labels if the calls have them, else prompt_embeds.
        reward: what a choice is worth.
        training: how the policy is trained.
        batch_size: samples rendered at once.
        resources: objects that parts of the plan ask for.
        progress: told what was rendered.

    Raises:
        InputError: when the grids do not fit together, or the folder was made with other settings.
    """
    reward, training = reward or RewardRule(), training or PolicyTraining()
    scores = render_scores(
        pipe, plan, grids, scorer, call, n, folder, batch_size=batch_size, resources=resources, progress=progress
    )
    rewards = reward.rewards(scores, [getattr(grid, "nominal_steps") for grid in grids])  # noqa: B009  of each grid
    arguments = call(range(n))
    conditions = conditions_of(arguments, count_samples("adaptive-steps", arguments))
    name = condition or ("class_labels" if "class_labels" in conditions else "prompt_embeds")
    if name not in conditions:
        raise InputError(f"the calls have no {name!r} for the policy to look at; they have {', '.join(conditions)}")
    values = conditions[name]
    options: dict[str, Any] = {"grids": tuple(grids), "condition": condition}
    if name == "class_labels" or all(isinstance(value, str) for value in values):
        options["table"] = train_table(rewards, label_keys(values), training)
    else:
        write_policy(folder / POLICY_FILE, train_network(rewards, embedding_features(values), training))
        options["policy"] = POLICY_FILE
    found = plan.model_copy(update={"grid": AdaptiveSteps(**options), "evidence": ()})
    found._folder = folder.resolve()
    return found


def render_scores(
    pipe: Any,
    plan: Plan,
    grids: Sequence[Part],
    scorer: Any,
    call: Call,
    n: int,
    folder: Path,
    *,
    batch_size: int = 16,
    resources: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scores (n, grids) float64 of every sample with every grid; what ``folder`` has is not rendered again.

    Args and errors are those of `search_adaptive`.
    """
    path, key = Path(folder) / SCORES_FILE, _key(pipe, plan, grids, n)
    scores = torch.full((n, len(grids)), torch.nan, dtype=torch.float64)
    if path.exists():
        tensors, header = read_tensors(path)
        if header.get("key") != key or "scores" not in tensors:
            raise InputError(f"{path} is of another plan, grids, weights or n; give another folder")
        scores = tensors["scores"]
    for choice, grid in enumerate(grids):
        missing = scores[:, choice].isnan().nonzero()[:, 0].tolist()
        if not missing:
            continue
        with attach(pipe, plan.model_copy(update={"grid": grid}), resources):
            for first in range(0, len(missing), batch_size):
                numbers = missing[first : first + batch_size]
                arguments = call(numbers) | {"output_type": "pt"}
                count = count_samples("adaptive-steps", arguments)
                if count != len(numbers):
                    raise InputError(f"the call for {len(numbers)} samples asks for {count}; ask for one each")
                images = images_in(pipe(**arguments))
                scores[numbers, choice] = score(scorer, images, conditions_of(arguments, count))
                write_tensors(path, {"scores": scores}, {"key": key})
                if progress is not None:
                    progress(int((~scores.isnan()).sum()), scores.numel())
    return scores


def train_table(rewards: Tensor, keys: Sequence[str], training: PolicyTraining) -> dict[str, tuple[float, ...]]:
    """Logits for each condition, in the order in which conditions first appear.

    Args:
        rewards: (n, choices) float64.
        keys: n conditions.
        training: how.
    """
    rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    of_sample = torch.tensor([rows[key] for key in keys])
    logits = torch.zeros(len(rows), rewards.shape[1], requires_grad=True)
    reinforce(rewards, lambda samples: logits[of_sample[samples]], [logits], training)
    return {key: tuple(logits[row].tolist()) for key, row in rows.items()}


def train_network(rewards: Tensor, features: Tensor, training: PolicyTraining) -> dict[str, Tensor]:
    """A policy network over features, as `fewstep.samplers.step_policy` runs it.

    Args:
        rewards: (n, choices) float64.
        features: (n, D) float32.
        training: how.
    """
    draw = torch.Generator().manual_seed(training.seed)
    sizes = {"features": features.shape[1], "hidden": training.hidden, "choices": rewards.shape[1]}
    tensors = {name: torch.zeros([sizes[d] for d in dimensions]) for name, dimensions in SHAPES.items()}
    tensors["mean"] = features.mean(0)
    tensors["std"] = features.std(0, correction=0).clamp(min=1e-6)
    tensors["hidden.weight"].normal_(std=sizes["features"] ** -0.5, generator=draw)
    learned = [tensors[name].requires_grad_() for name in SHAPES if name not in ("mean", "std")]
    reinforce(rewards, lambda samples: policy_logits(tensors, features[samples]), learned, training)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def reinforce(
    rewards: Tensor, logits: Callable[[Tensor], Tensor], parameters: list[Tensor], training: PolicyTraining
) -> None:
    """Policy gradient: the mean of (R(u) - b) grad log pi(u) over sampled choices u (arXiv:2311.14768).

    The baseline b is the policy's expected reward for the sample, which is known because every choice was rendered.
    It leaves the gradient's expectation as it is and takes most of its variance away; the paper has none.

    Args:
        rewards: (n, choices) float64.
        logits: from samples (B,) int64 to logits (B, choices).
        parameters: what is learned, in place.
        training: how.
    """
    draw = torch.Generator().manual_seed(training.seed)
    optimizer = torch.optim.Adam(parameters, lr=training.lr)
    for _ in range(training.iterations):
        samples = torch.randint(len(rewards), (training.batch_size,), generator=draw)
        log_policy = logits(samples).log_softmax(-1)
        policy = log_policy.detach().exp()
        chosen = torch.multinomial(policy, 1, generator=draw)
        baseline = (policy * rewards[samples]).sum(1, keepdim=True)
        advantage = rewards[samples].gather(1, chosen) - baseline
        loss = -(advantage * log_policy.gather(1, chosen)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def _key(pipe: Any, plan: Plan, grids: Sequence[Part], n: int) -> str:
    """What scores in a folder belong to."""
    rest = plan.model_copy(update={"grid": None, "evidence": (), "tuned_for": None, "name": None})
    networks = {name: fingerprint(network) for name, network in denoisers(pipe).items()}
    said = [rest.to_json(), [grid.model_dump(mode="json") for grid in grids], networks, n]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
