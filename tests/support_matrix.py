"""Makes docs/support.md: which cache works on which family of the zoo, found by running it.

Run ``python tests/support_matrix.py`` in a checkout to renew it; ``tests/test_support.py`` compares.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from zoo import ZOO, Family

from fewstep.samplers import (
    BlockMask,
    CachePart,
    CrossAttentionFreeze,
    Gate,
    HostCache,
    InputError,
    Plan,
    PlanWarning,
    Router,
    Stats,
    StepRehash,
    UNetDeep,
    attach,
)
from fewstep.samplers.host_kinds import KINDS
from fewstep.samplers.layer_skip import LayerSkip
from fewstep.samplers.network import output_rows

DOCUMENT = Path(__file__).parents[1] / "docs" / "support.md"
STEPS = 4
ALWAYS = [-1, 1001]
FASTER = {
    "unconditional_batch_skip_range": 2,
    "unconditional_batch_timestep_skip_range": ALWAYS,
    "spatial_attention_timestep_skip_range": ALWAYS,
}
TAYLOR = {"cache_interval": 2, "disable_cache_before_step": 1}
HOST_OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "FasterCacheConfig": (FASTER, FASTER | {"tensor_format": "BCHW"}),
    "FirstBlockCacheConfig": ({"threshold": 1e3},),
    "MagCacheConfig": ({"threshold": 1e3, "mag_ratios": [1.0] * STEPS, "retention_ratio": 0.0},),
    "PyramidAttentionBroadcastConfig": (
        {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": ALWAYS},
    ),
    "SeaCacheConfig": ({"threshold": 1e3},),
    "TaylorSeerCacheConfig": (TAYLOR, TAYLOR | {"cache_identifiers": ["[a-z_]+[.][0-9]+[.]attn1?"]}),
    "TextKVCacheConfig": ({},),
}
"""Settings to try, the first choice first."""

COMPUTES_ALL: dict[str, dict[str, Any]] = {
    "FirstBlockCacheConfig": {"threshold": 0.0},
    "MagCacheConfig": {"threshold": 0.0, "mag_ratios": [0.5] * STEPS},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 1,
        "spatial_attention_timestep_skip_range": ALWAYS,
    },
    "TaylorSeerCacheConfig": {"cache_interval": 1, "disable_cache_before_step": 1},
}
HEAD = f"""# Caches and families of pipelines

Made by `python tests/support_matrix.py`, and compared by a test. Each mark is a tiny pipeline of random weights that
ran {STEPS} steps with the cache: something was reused or left out, two branches of guidance stayed two in every step,
and where the cache has a setting that computes everything, that gave the plain result bit for bit. A number is the note
below the table that says why the cache is refused. `fewstep doctor` says it of a pipeline of yours.

"""


@dataclass(frozen=True)
class Column:
    """One cache.

    Attributes:
        makers: of settings that reuse, for a pipeline and a number of timesteps; the first that works counts.
        everything: one that computes everything, None where there is none.
    """

    makers: tuple[Callable[[Any, int], CachePart], ...]
    everything: Callable[[int], CachePart] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a family makes of a cache.

    Attributes:
        part: the cache, None where it is refused.
        reason: why it is refused, or what went wrong; empty when it works.
    """

    part: CachePart | None
    reason: str = ""


COLUMNS: dict[str, Column] = {
    "block-mask": Column((BlockMask.suggest,), lambda steps: BlockMask(rows=("1",) * steps)),
    "cross-attention-freeze": Column((CrossAttentionFreeze.suggest,), lambda steps: CrossAttentionFreeze(after=steps)),
    "gate": Column((lambda pipe, steps: _checked(Gate(threshold=1e3), pipe),), lambda steps: Gate(threshold=0.0)),
    "layer-skip": Column((LayerSkip.suggest,), lambda steps: LayerSkip(rows=("1",) * steps)),
    "router": Column((Router.suggest,), lambda steps: Router(probabilities=((1.0,),) * steps)),
    "step-rehash": Column((StepRehash.suggest,), lambda steps: StepRehash(changes=(1.0,) * (steps - 1), budget=steps)),
    "unet-deep": Column((UNetDeep.suggest,), lambda steps: UNetDeep(interval=1)),
}
"""Every cache but diffusers' own."""


def columns() -> dict[str, Column]:
    """Every cache by the name of its column."""
    return COLUMNS | {f"host: {config.removesuffix('Config')}": _host_column(config) for config in KINDS}


def _host_column(config: str) -> Column:
    def maker(options: dict[str, Any]) -> Callable[[Any, int], CachePart]:
        return lambda pipe, steps: _checked(HostCache(config=config, options=_for_steps(options, steps)), pipe)

    def everything(steps: int) -> CachePart:
        return HostCache(config=config, options=_for_steps(COMPUTES_ALL[config], steps))

    return Column(tuple(map(maker, HOST_OPTIONS[config])), everything if config in COMPUTES_ALL else None)


def _for_steps(options: dict[str, Any], steps: int) -> dict[str, Any]:
    ratios = {"mag_ratios": options["mag_ratios"][:1] * steps} if "mag_ratios" in options else {}
    return options | ratios


def _checked(part: CachePart, pipe: Any) -> CachePart:
    part.modules(pipe)
    return part


class Cage:
    """A pipeline of one family, and its plain result."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.pipe = family.build()
        self.steps = round(STEPS / family.share)
        self.plain, self.plain_outputs, _ = self.run(Plan())

    def run(self, plan: Plan) -> tuple[torch.Tensor, list[torch.Tensor], Stats]:
        """Samples of a plan, what the network returned, and the count."""
        outputs: list[torch.Tensor] = []
        network = getattr(self.pipe, self.family.denoiser)
        hook = network.register_forward_hook(lambda *given: outputs.append(output_rows(given[-1]).clone()))
        try:
            with warnings.catch_warnings(action="ignore", category=PlanWarning), attach(self.pipe, plan) as handle:
                samples = self.family.call(self.pipe, batch=1, steps=STEPS)
        finally:
            hook.remove()
        assert handle.stats is not None
        return samples, outputs, handle.stats

    def verdict(self, column: Column) -> Verdict:
        """Whether a cache works here; of several settings the first that does."""
        if self.family.tokens:
            return Verdict(None, "its network predicts tokens")
        found = [Verdict(None)]
        for make in column.makers:
            found.append(self._verdict(column, make))
            if not found[-1].reason:
                break
        return found[-1]

    def _verdict(self, column: Column, make: Callable[[Any, int], CachePart]) -> Verdict:
        try:
            part = make(self.pipe, self.steps)
            _, outputs, stats = self.run(Plan(caches=part))
        except InputError as error:
            return Verdict(None, _plain(str(error), self.pipe))
        return Verdict(part, self._wrong(part, column, outputs, stats))

    def _wrong(self, part: CachePart, column: Column, outputs: list[torch.Tensor], stats: Stats) -> str:
        if not any(rows.skipped for rows in stats.modules.values()):
            return "it never reused anything"
        pairs = zip(self._apart(self.plain_outputs), self._apart(outputs), strict=True)
        if any(plain > 0 and kept == 0 for plain, kept in pairs):
            return "it made the branches of guidance equal"
        if column.everything is not None:
            everything = column.everything(self.steps)
            if isinstance(part, HostCache) and isinstance(everything, HostCache):
                everything = everything.model_copy(update={"options": part.options | everything.options})
            samples, _, all_stats = self.run(Plan(caches=everything))
            if not torch.equal(samples, self.plain) or any(rows.skipped for rows in all_stats.modules.values()):
                return "computing everything it gives another result"
        return ""

    def _apart(self, outputs: list[torch.Tensor]) -> list[float]:
        """How far apart the two branches are in each step; a branch that the network was not asked for is far."""
        if self.family.guidance == "separate":
            pairs = list(zip(outputs[::2], outputs[1::2], strict=True))
        elif self.family.guidance == "doubled":
            pairs = [tuple(output.chunk(2)) if len(output) > 1 else (output, -output) for output in outputs]
        else:
            return []
        return [float((a - b).abs().max()) for a, b in pairs]


def _plain(reason: str, pipe: Any) -> str:
    """A reason without the names of one pipeline, so that families share notes."""
    head, _, rest = reason.partition(f"cannot work on {type(pipe).__name__}: ")
    text = re.sub(r"^\w+Config:? ", "", rest or head)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    for network in {type(part).__name__ for part in modules}:
        text = text.replace(network, "the network")
    blocks = {type(module).__name__ for part in modules for module in part.modules()}
    for block in sorted((block for block in blocks if block.endswith("Block")), key=len, reverse=True):
        text = re.sub(rf"(the )?\b{block}\b", "the block", text)
    return text.replace(type(pipe).__name__, "the pipeline")


def verdicts() -> dict[str, dict[str, Verdict]]:
    """What every family makes of every cache."""
    found = {}
    for name, family in ZOO.items():
        cage = Cage(family)
        found[name] = {column: cage.verdict(made) for column, made in columns().items()}
    return found


def document(found: dict[str, dict[str, Verdict]]) -> str:
    """The text of docs/support.md."""
    notes: dict[str, int] = {}
    names = list(columns())
    lines = ["| family | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for family, row in found.items():
        marks = [_mark(row[name], notes) for name in names]
        lines.append(f"| {family} | " + " | ".join(marks) + " |")
    listed = [f"{number}. {note}" for note, number in notes.items()]
    return HEAD + "\n".join([*lines, "", *listed]) + "\n"


def _mark(verdict: Verdict, notes: dict[str, int]) -> str:
    return "✓" if not verdict.reason else str(notes.setdefault(verdict.reason, len(notes) + 1))


if __name__ == "__main__":
    DOCUMENT.write_text(document(verdicts()), encoding="utf-8")
