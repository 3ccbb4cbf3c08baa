"""Token caches: whether they see what no cache sees along its trajectories, and what they answer by themselves.

``python -m fewstep.scripts.bench.token_caches --pipe demo:tokens --work DIR --out docs/results/tokens-caches.json``

*Agreement.* What a recipe decodes without a cache is decoded again with one, the tokens and their order given, so that
one wrong token does not lead to others. In each step the logits of the open positions are compared. Counted apart are
positions of the answer, up to its end in the uncached decoding: what lies behind is easy, and there is a lot of it.

*Accuracy.* The same recipes decode by themselves, on the same questions.

Each cell is a file of ``--work``; a run that was stopped goes on, and with ``--kinds`` two runs share the work, after
which one of both kinds only writes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.eval.environment import environment
from fewstep.eval.record import digest
from fewstep.eval.tokens import Question, TokenModels, answers, load_token_models, task_questions
from fewstep.eval.tokens.accuracy import Accuracy, accuracy_of
from fewstep.samplers.files import read_json, write_json, write_text
from fewstep.samplers.tokens import Decoded, DecodeState, Denoiser, DenoiserSpec, Recipe, decode

from .token_cases import NO_CACHE, Case, Policy, accuracy_cases, agreement_cases

SEED = 7_000_000
"Of the first question; nothing was chosen on these."
DEPENDENT = ("replace-random", "shuffle", "latin-3", "latin-4")
"Tasks in which several answers are right, so that a token decides about others."
TIE = 1e-4
"Tokens whose log-probabilities are this near are equally likely."
KINDS = ("agreement", "accuracy")
SUMS = ("positions", "same", "kl", "committed", "committed_same")
AREAS = ("answer", "open")
DIGITS = 5


@dataclass
class Trajectory:
    """What no cache decodes for some questions, and what it saw on the way.

    Attributes:
        prompts: token ids.
        decoded: the answers.
        own: (B, L) bool, the answers up to their first end.
        steps: of each step, the known positions (B, L) and their log-probabilities (N, V).
    """

    prompts: list[list[int]]
    decoded: Decoded
    own: Tensor
    steps: list[tuple[Tensor, Tensor]]


def uncached(denoiser: Denoiser, prompts: list[list[int]], recipe: Recipe, gen_length: int, seed: int) -> Trajectory:
    """Decodes without a cache, and keeps what each step saw.

    Args:
        denoiser: the network.
        prompts: token ids.
        recipe: how, whatever its cache.
        gen_length: masks after each prompt.
        seed: of the first row; the others count up.
    """
    steps: list[tuple[Tensor, Tensor]] = []

    def watch(state: DecodeState) -> None:
        steps.append((state.known.clone(), state.log_probs.clone()))

    plain = recipe.replace(cache=NO_CACHE)
    decoded = decode(denoiser, prompts, gen_length, plain, seeds=seed, watch=watch)
    ended = torch.isin(decoded.tokens, torch.tensor(denoiser.spec.eos_ids, dtype=torch.long)).long()
    ended[:, : decoded.answer_start] = 0
    own = (ended.cumsum(1) - ended == 0) & (torch.arange(ended.shape[1]) >= decoded.answer_start)
    return Trajectory(prompts, decoded, own, steps)


def compared(denoiser: Denoiser, along: Trajectory, recipe: Recipe, seed: int) -> tuple[Tensor, Decoded]:
    """Follows a trajectory with the cache of ``recipe``.

    Returns:
        (B, areas, sums) float64, sums over steps and positions: those compared, those whose likeliest token is the
        same, the divergence KL(uncached | cached) in nats, those committed in this step, and those of them whose
        likeliest token is the same; and what was spent.
    """
    sums = torch.zeros(len(along.prompts), len(AREAS), len(SUMS), dtype=torch.float64)
    count = 0

    def watch(state: DecodeState) -> None:
        nonlocal count
        known, whole = along.steps[count]
        count += 1
        both = known & state.known & state.open
        theirs, mine = whole[both[known]], state.log_probs[both[state.at]]
        same = theirs.gather(1, mine.argmax(1, keepdim=True))[:, 0] >= theirs.amax(1) - TIE
        parts = torch.where(theirs > -torch.inf, theirs.exp() * (theirs - mine), 0.0).double()
        now = (along.decoded.reveal_step == state.step[:, None])[both]
        values = torch.stack([torch.ones_like(now), same, parts.sum(1), now, now & same], dim=1).double()
        rows, own = both.nonzero()[:, 0], along.own[both]
        sums[:, 0].index_add_(0, rows[own], values[own])
        sums[:, 1].index_add_(0, rows, values)

    length = along.decoded.tokens.shape[1] - along.decoded.answer_start
    lazy = decode(denoiser, along.prompts, length, recipe, seeds=seed, watch=watch, follow=along.decoded)
    differ = int((sums[:, 1, 0] - sums[:, 1, 1]).sum())
    if lazy.exact and differ:
        raise RuntimeError(f"the {recipe.cache.type} cache calls itself exact and differs at {differ} positions")
    if recipe.cache.exactness(denoiser.spec) and not lazy.exact:
        raise RuntimeError(f"the {recipe.cache.type} cache claims to be exact for this denoiser, and was not")
    return sums, lazy


def share(part: Tensor, whole: Tensor) -> list[float] | None:
    """Sum over sum of (rows,), and its standard error over rows; None for nothing out of nothing."""
    total = float(whole.sum())
    if not total:
        return None
    ratio, rows = float(part.sum()) / total, len(part)
    spread = float((part - ratio * whole).square().sum())
    error = math.sqrt(spread * rows / (rows - 1)) / total if rows > 1 else 0.0
    return rounded(ratio, error)


def rounded(value: float, error: float) -> list[float]:
    """A number and its standard error for a file; no negative zeros."""
    return [round(value, DIGITS) + 0.0, round(error, DIGITS) + 0.0]


def pools(tasks: Sequence[str]) -> dict[str, list[int]]:
    """Rows by task, and those of all tasks, of the dependent ones, and of the others, which are certain."""
    found = {"total": list(range(len(tasks)))}
    for name, held in (("certain", False), ("dependent", True)):
        found[name] = [row for row, task in enumerate(tasks) if (task in DEPENDENT) == held]
    for name in dict.fromkeys(tasks):
        found[name] = [row for row, task in enumerate(tasks) if task == name]
    return {name: rows for name, rows in found.items() if rows}


def agreement(sums: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
    """From the sums of `compared` to shares by task: of answers, and in total of everything that was open."""

    def said(part: Tensor) -> dict[str, Any]:
        positions, same, kl, committed, committed_same = part.unbind(1)
        return {
            "same": share(same, positions),
            "kl": share(kl, positions),
            "committed_same": share(committed_same, committed),
        }

    own = {name: said(sums[rows, 0]) for name, rows in pools(tasks).items()}
    return {"answer": own, "open": said(sums[:, 1])}


def accuracy(right: Sequence[bool], tasks: Sequence[str], plain: Sequence[bool] | None) -> dict[str, Any]:
    """Shares of right answers by task with standard errors, and paired differences to no cache.

    ``mean``, ``certain`` and ``dependent`` are means over tasks.
    """
    by_task = {name: rows for name, rows in pools(tasks).items() if name in tasks}
    groups = {"mean": list(by_task), "certain": [name for name in by_task if name not in DEPENDENT]}
    groups["dependent"] = [name for name in by_task if name in DEPENDENT]
    whole = accuracy_of({name: (sum(right[row] for row in rows), len(rows)) for name, rows in by_task.items()})
    found: dict[str, Any] = {"tasks": {name: rounded(each.value, each.se) for name, each in whole.tasks.items()}}
    found["worst"] = whole.worst_task
    found["less_uncached"] = {}
    for name, members in groups.items():
        if members:
            mean = Accuracy({member: whole.tasks[member] for member in members}).mean
            found[name] = rounded(mean.value, mean.se)
            if plain is not None:
                pairs = {member: [(right[row], plain[row]) for row in by_task[member]] for member in members}
                found["less_uncached"][name] = _less(pairs)
    return found


def _less(pairs: dict[str, list[tuple[bool, bool]]]) -> list[float]:
    """The mean over tasks of the mean difference of pairs, and its standard error."""
    total, errors = 0.0, 0.0
    for each in pairs.values():
        values = torch.tensor([float(mine) - float(theirs) for mine, theirs in each], dtype=torch.float64)
        total += float(values.mean())
        errors += float(values.var()) / len(values) if len(values) > 1 else 0.0
    return rounded(total / len(pairs), math.sqrt(errors) / len(pairs))


@dataclass(frozen=True)
class CacheBench:
    """Measures cells, each once.

    Attributes:
        models: that answer.
        work: folder of the cells.
        n: questions of an agreement.
        answers: questions of an accuracy.
        gen_length: masks after a prompt.
        batch_size: questions at a time.
    """

    models: TokenModels
    work: Path
    n: int
    answers: int
    gen_length: int
    batch_size: int = 64
    _kept: dict[str, list[Trajectory]] = field(default_factory=dict)

    @cached_property
    def denoisers(self) -> dict[str, DenoiserSpec]:
        """The first of each kind of attention, by name."""
        found: dict[str, tuple[str, DenoiserSpec]] = {}
        for name, denoiser in self.models.denoisers.items():
            found.setdefault(denoiser.spec.attention, (name, denoiser.spec))
        return dict(found.values())

    def agreement(self, model: str, case: Case, policy: Policy) -> dict[str, Any]:
        """The row of a cache along uncached trajectories."""
        path = self._path("agreement", model, case, policy, self.n)
        if not path.is_file():
            denoiser, recipe = self.models.denoisers[model], case.recipe(policy)
            sums, spent, plain, exact = [], 0, 0, True
            for index, along in enumerate(self._trajectories(model, recipe)):
                found, lazy = compared(denoiser, along, recipe, SEED + index * self.batch_size)
                sums.append(found)
                spent += int(lazy.token_forwards.sum())
                plain += int(along.decoded.token_forwards.sum())
                exact &= lazy.exact
            row: dict[str, Any] = {"exact": exact, "token_forwards": round(spent / plain, 6)}
            tasks = [question.task for question in self._questions(self.n)]
            write_json(path, row | agreement(torch.cat(sums), tasks))
        return self._said(model, case, policy) | dict(read_json(path))

    def accuracy(self, model: str, case: Case, policy: Policy) -> dict[str, Any]:
        """The row of a cache that decodes by itself."""
        found = self._answered(model, case, policy)
        plain = None
        if case.cache != NO_CACHE:
            plain = self._answered(model, Case("none", "", NO_CACHE, blocks=case.blocks), policy)["right"]
        tasks = [question.task for question in self._questions(self.answers)]
        scores = accuracy(found["right"], tasks, plain)
        spent = {name: found[name] for name in ("exact", "nfe", "token_forwards", "new_tokens")}
        return self._said(model, case, policy) | spent | scores

    def _answered(self, model: str, case: Case, policy: Policy) -> dict[str, Any]:
        path = self._path("answers", model, case, policy, self.answers)
        if not path.is_file():
            recipe, questions = case.recipe(policy), self._questions(self.answers)
            found = answers(self.models, questions, recipe, self.gen_length, denoiser=model, batch_size=self.batch_size)
            means = {
                name: round(sum(getattr(answer, name) for answer in found) / len(found), 3)
                for name in ("nfe", "token_forwards", "new_tokens")
            }
            exact, right = all(answer.exact for answer in found), [answer.right for answer in found]
            write_json(path, {"exact": exact, **means, "right": right})
        return dict(read_json(path))

    def _questions(self, count: int) -> list[Question]:
        return task_questions(range(SEED, SEED + count))

    def _trajectories(self, model: str, recipe: Recipe) -> Iterator[Trajectory]:
        """Those of the recipe without its cache; the last ones are kept."""
        plain = recipe.replace(cache=NO_CACHE)
        key = digest([model, plain.to_json()])
        if key not in self._kept:
            self._kept.clear()
            prompts = [self.models.ids(question.prompt) for question in self._questions(self.n)]
            self._kept[key] = [
                uncached(
                    self.models.denoisers[model],
                    prompts[start : start + self.batch_size],
                    plain,
                    self.gen_length,
                    SEED + start,
                )
                for start in range(0, self.n, self.batch_size)
            ]
        yield from self._kept[key]

    def _said(self, model: str, case: Case, policy: Policy) -> dict[str, Any]:
        return {
            "model": model,
            "policy": policy,
            "family": case.family,
            "setting": case.setting,
            "interval": case.interval,
            "frozen": case.frozen,
            "cache": case.cache.model_dump(mode="json"),
            "blocks": case.blocks.model_dump(mode="json"),
            "claims": case.cache.exactness(self.models.denoisers[model].spec),
        }

    def _path(self, kind: str, model: str, case: Case, policy: Policy, count: int) -> Path:
        recipe = case.recipe(policy).to_json()
        said = [self.models.prints[model], recipe, count, self.gen_length, SEED]
        return self.work / kind / f"{digest(said)}.json"


def main() -> None:
    """Writes ``--out`` after each cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:tokens")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=64, help="questions that trajectories are followed for")
    parser.add_argument("--answers", type=int, default=320, help="questions behind each accuracy")
    parser.add_argument("--gen_length", type=int, default=64, help="masks after each prompt")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to measure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = load_token_models(options.pipe)
    bench = CacheBench(models, options.work, options.n, options.answers, options.gen_length)
    result: dict[str, Any] = {name: getattr(options, name) for name in ("pipe", "n", "answers", "gen_length")}
    found = environment("cpu")
    result |= {"seed": SEED, "cpu": found["cpu"], "torch": found["packages"]["torch"]}
    result["models"] = {
        name: {"attention": spec.attention, "block_length": spec.block_length, "fingerprint": models.prints[name]}
        for name, spec in bench.denoisers.items()
    }
    for kind, row in rows(bench, options.kinds):
        result.setdefault(kind, []).append(row)
        write_rows(options.out, result)
        print(f"{kind}: {row['model']}, {row['policy']}, {row['family']} {row['setting']}", flush=True)  # noqa: T201


def write_rows(path: Path, result: dict[str, Any]) -> None:
    """Writes the results with each row on a line: indented, their many pairs of numbers would fill thousands."""
    lists = {name: value for name, value in result.items() if isinstance(value, list)}
    text = json.dumps({name: value for name, value in result.items() if name not in lists}, indent=2)[:-2]
    for name, found in lists.items():
        lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in found)
        text += f',\n  "{name}": [\n{lines}\n  ]'
    write_text(path, text + "\n}\n")


def rows(bench: CacheBench, kinds: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All cells of these kinds, those of one trajectory together."""
    for model, spec in bench.denoisers.items():
        cells = [(case, policy) for case in agreement_cases(spec) for policy in case.policies]
        for case, policy in sorted(cells, key=lambda cell: str(cell[0].recipe(cell[1], NO_CACHE).to_json())):
            if "agreement" in kinds:
                yield "agreement", bench.agreement(model, case, policy)
        for case in accuracy_cases(spec):
            for policy in case.policies:
                if "accuracy" in kinds:
                    yield "accuracy", bench.accuracy(model, case, policy)


if __name__ == "__main__":
    main()
