"""A short run of a plan that checks what cannot be seen without running."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .attach import PlanWarning, attach
from .diagnosis import Finding
from .errors import InputError
from .network import denoisers, output_rows
from .plan import Plan
from .stats import Stats

STEPS = 2
"Steps of the self-test, where the plan has no grid."


@dataclass(frozen=True)
class _Trial:
    """One call of the pipeline.

    Attributes:
        result: tensors that it returned, float64.
        outputs: what the denoisers returned, in order.
        stats: the count, None without a plan.
    """

    result: list[Tensor]
    outputs: list[Tensor]
    stats: Stats | None = None


def self_test(
    pipe: Any, plan: Plan, arguments: Callable[[], Mapping[str, Any]], resources: Mapping[str, Any]
) -> list[Finding]:
    """Runs the pipeline four times: without the plan, with it, with it again, and without it.

    Args:
        pipe: a pipeline that no plan is attached to.
        plan: what to test.
        arguments: makes the arguments of one call, with fresh generators each time.
        resources: as for `attach`.

    Returns:
        What was found.
    """
    steps = {} if plan.nominal_steps or not _takes_steps(pipe) else {"num_inference_steps": STEPS}
    try:
        before = _try(pipe, {**steps, **arguments()})
    except Exception as error:  # the pipeline's own, with these arguments
        return [Finding("self-test", "refused", f"the pipeline fails without the plan: {_line(error)}")]
    try:
        with warnings.catch_warnings(action="ignore", category=PlanWarning), attach(pipe, plan, resources) as handle:
            first, second = (_try(pipe, {**steps, **arguments()}, lambda: handle.stats) for _ in range(2))
    except Exception as error:  # whatever it is, it is the answer
        return [Finding("self-test", "refused", f"the run fails: {_line(error)}")]
    after = _try(pipe, {**steps, **arguments()})
    findings = [_about_steps(first, plan)]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in first.result):
        findings.append(Finding("self-test", "refused", "the result has NaN or infinite values"))
    if not _same(first, second):
        findings.append(
            Finding("self-test", "refused", "two runs on the same seeds differ: noise comes from elsewhere")
        )
    if not _same(before, after):
        findings.append(Finding("self-test", "refused", "the pipeline is not as it was before the plan"))
    if plan.caches:
        findings += [_about_skips(first), *_about_guidance(before, first)]
    return findings


def _takes_steps(pipe: Any) -> bool:
    return "num_inference_steps" in inspect.signature(type(pipe).__call__).parameters


def _try(pipe: Any, arguments: Mapping[str, Any], stats: Callable[[], Stats | None] = lambda: None) -> _Trial:
    with _watched(pipe) as outputs:
        output = pipe(**arguments)
    leaves = tree_leaves(list(output) if isinstance(output, tuple) else list(vars(output).values()))
    tensors = [torch.as_tensor(leaf).double().cpu() for leaf in leaves if hasattr(leaf, "shape")]
    return _Trial(tensors, list(outputs), stats())


@contextlib.contextmanager
def _watched(pipe: Any) -> Iterator[list[Tensor]]:
    """What the pipeline's denoisers return in the block."""
    outputs: list[Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        with contextlib.suppress(InputError):
            outputs.append(output_rows(output).detach().clone())

    hooks = [network.register_forward_hook(note) for network in denoisers(pipe).values()]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _same(a: _Trial, b: _Trial) -> bool:
    return len(a.result) == len(b.result) and all(map(torch.equal, a.result, b.result))


def _about_steps(trial: _Trial, plan: Plan) -> Finding:
    stats = trial.stats
    assert stats is not None
    if not stats.steps:
        return Finding("self-test", "refused", "the pipeline never stepped its scheduler: the plan does not reach it")
    evaluations = max(step.evaluations for step in stats.steps)
    text = f"{len(stats.steps)} steps, {stats.nfe:g} evaluations per sample, at most {evaluations} at once in a step"
    return Finding("self-test", "runs", text)


def _about_skips(trial: _Trial) -> Finding:
    stats = trial.stats
    assert stats is not None
    run = sum(rows.run for rows in stats.modules.values())
    skipped = sum(rows.skipped for rows in stats.modules.values())
    share = f"{skipped} of {run + skipped} rows of {len(stats.modules)} modules were reused"
    kept = f"at most {stats.cache_bytes / 2**20:.2f} MiB kept"
    if not skipped:
        return Finding("caches", "refused", f"never fired: {share}; raise the threshold or take more steps")
    return Finding("caches", "runs", f"{share}; {kept}")


def _about_guidance(before: _Trial, cached: _Trial) -> list[Finding]:
    """Whether |cond - uncond| is there wherever it is without the plan."""
    stats = cached.stats
    assert stats is not None
    if max(step.rows for step in stats.steps) != 2 * stats.images:
        return []
    in_turn = max(step.evaluations for step in stats.steps) == 2
    plain, kept = (_differences(trial.outputs, in_turn) for trial in (before, cached))
    if not plain or min(plain) == 0:
        return []
    if not kept or min(kept) == 0:
        return [Finding("guidance", "refused", "the two branches became the same: a cache mixes them")]
    how = "in turn" if in_turn else "in one batch"
    return [Finding("guidance", "runs", f"two branches, {how}, told apart in every step")]


def _differences(outputs: list[Tensor], in_turn: bool) -> list[float]:
    """Largest difference of the two branches, one for each step."""
    if in_turn:
        pairs = list(zip(outputs[::2], outputs[1::2], strict=False))
    else:
        pairs = [(output.chunk(2)[0], output.chunk(2)[1]) for output in outputs]
    return [float((a - b).abs().max()) for a, b in pairs if a.shape == b.shape]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
