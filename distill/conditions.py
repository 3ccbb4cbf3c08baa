"""What a pipeline tells its denoiser besides samples and time: captured once, cut and joined by sample, kept in files.

A `Condition` holds the arguments with which one pipeline calls its denoiser, for each branch of guidance, and the
`Layout` of these calls: how the samples, the time and the branches are laid out. `fewstep.distill.encode` makes them
from any pipeline's own call; `fewstep.distill.predict` uses them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..samplers.errors import InputError
from ..samplers.files import read_tensors, write_tensors
from . import row_trees

BESIDE = "beside"
"Among the inputs of a branch: what the pipeline shows the network beside the samples, in the same tensor."

_FORMAT = "fewstep-condition-1"


@dataclass(frozen=True)
class Layout:
    """How a pipeline calls its denoiser.

    Attributes:
        pipeline: class name of the pipeline.
        component: the pipeline's name of the network.
        state: the network's argument for the samples.
        time: the network's argument for the time.
        divisor: what the scheduler's time is divided by for the network.
        from_one: whether the network is told 1 minus that.
        time_dtype: in which the network is told it.
        dtype: in which the network is shown the samples.
        shape: of one sample as the scheduler sees it.
        unit_dim: dimension of length 1 that the network's samples have besides; None for none.
        listed: whether the network takes a list of samples.
        beside_dim: dimension along which something follows the samples that is no sample; None for none.
        sign: what the pipeline multiplies the network's output with for the scheduler, 1 or -1.
        branches: in the order in which the pipeline evaluates them: ``cond``, and ``uncond`` where it guides.
        stacked: whether it evaluates them in one batch.
    """

    pipeline: str
    component: str
    state: str
    time: str
    divisor: float
    from_one: bool
    time_dtype: str
    dtype: str
    shape: tuple[int, ...]
    unit_dim: int | None
    listed: bool
    beside_dim: int | None
    sign: float
    branches: tuple[str, ...]
    stacked: bool

    def told(self, t: Tensor) -> Tensor:
        """The scheduler's times ``t`` as the network is told them, of the same shape."""
        t = t.to(getattr(torch, self.time_dtype))
        t = t if self.divisor == 1 else t / self.divisor
        return 1 - t if self.from_one else t


@dataclass(frozen=True)
class Branch:
    """The arguments of the network for one branch of guidance, besides samples and time.

    Attributes:
        inputs: by name; `BESIDE` among them where the pipeline shows something beside the samples.
        rowed: paths of what has one entry a sample (see `row_trees`).
    """

    inputs: Mapping[str, Any]
    rowed: frozenset[str]


@dataclass(frozen=True)
class Condition:
    """What a pipeline tells its denoiser about some samples.

    Attributes:
        layout: how it calls it.
        count: number of samples, B.
        cond: what guidance moves towards.
        uncond: what it moves away from; None where the pipeline does not guide, or does it inside the network.
    """

    layout: Layout
    count: int
    cond: Branch
    uncond: Branch | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def dtype(self) -> torch.dtype:
        """In which the network is shown the samples."""
        dtype: torch.dtype = getattr(torch, self.layout.dtype)
        return dtype

    def branch(self, name: str) -> Branch:
        """The branch that is called ``cond`` or ``uncond``.

        Raises:
            InputError: when there is no unconditional one.
        """
        branch = self.cond if name == "cond" else self.uncond
        if branch is None:
            raise InputError(
                f"{self.layout.pipeline} was called without guidance, so there is no unconditional branch; encode with "
                "a guidance scale above 1, and a negative prompt where the pipeline needs one"
            )
        return branch

    def rows(self, index: Tensor | Sequence[int]) -> Condition:
        """The condition of some of the samples, copied.

        Args:
            index: int64 (m,) which ones, in order; repeats are allowed.

        Raises:
            InputError: when there is no such sample.
        """
        picks = torch.as_tensor(index, dtype=torch.int64).reshape(-1)
        wrong = picks[(picks < 0) | (picks >= self.count)]
        if len(wrong) or not len(picks):
            what = f"no sample {int(wrong[0])}" if len(wrong) else "nothing picked"
            raise InputError(f"a condition of {self.count} samples has rows 0 to {self.count - 1}; {what}")
        changed = self._changed(lambda branch: row_trees.picked(branch.inputs, branch.rowed, picks, self.count))
        return replace(changed, count=len(picks))

    @classmethod
    def cat(cls, conditions: Sequence[Condition]) -> Condition:
        """Several conditions of one layout, one below the other.

        Raises:
            InputError: when there are none, or their layouts, shapes or shared arguments differ.
        """
        if not conditions:
            raise InputError("there are no conditions to join; give at least one")
        first = conditions[0]
        for other in conditions[1:]:
            if other.layout != first.layout:
                name = next(name for name, value in asdict(first.layout).items() if asdict(other.layout)[name] != value)
                raise InputError(
                    f"conditions can be joined where their layouts agree; {name} is {getattr(first.layout, name)} and "
                    f"{getattr(other.layout, name)}; encode them by one pipeline, at one size"
                )

        def join(name: str) -> Branch:
            branches = [condition.branch(name) for condition in conditions]
            if any(branch.rowed != branches[0].rowed for branch in branches):
                raise InputError("conditions can be joined where the same inputs have rows; encode them alike")
            rowed = branches[0].rowed
            return Branch(row_trees.joined([branch.inputs for branch in branches], rowed), rowed)

        uncond = None if first.uncond is None else join("uncond")
        return cls(first.layout, sum(condition.count for condition in conditions), join("cond"), uncond)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """The condition on a device; what is floating point, and the samples for the network, in a dtype."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        moved = self._changed(lambda branch: tree_map_only(Tensor, move, dict(branch.inputs)))
        name = self.layout.dtype if dtype is None else str(dtype).removeprefix("torch.")
        return replace(moved, layout=replace(self.layout, dtype=name))

    def without(self, dropped: Tensor) -> Condition:
        """The condition in which the conditional branch of some samples is replaced by their unconditional one.

        Args:
            dropped: bool (B,), of which samples.

        Raises:
            InputError: when there is no unconditional branch, or it has another shape.
        """
        if dropped.dtype != torch.bool or dropped.shape != (self.count,):
            raise InputError(f"dropped is bool ({self.count},); got {dropped.dtype} of shape {tuple(dropped.shape)}")
        rowed = self.cond.rowed
        both = row_trees.joined([self.cond.inputs, self.branch("uncond").inputs], rowed)
        picks = torch.arange(self.count) + self.count * dropped.cpu()
        return replace(self, cond=Branch(row_trees.picked(both, rowed, picks, 2 * self.count), rowed))

    def telling(self, **inputs: Any) -> Condition:
        """The condition with some arguments of the network replaced or added, in all branches.

        Args:
            inputs: by name, such as ``timestep_cond`` or ``guidance``; tensors (B, ...) have one row a sample.

        Raises:
            InputError: when a tensor has another number of rows.
        """
        for name, value in inputs.items():
            if isinstance(value, Tensor) and (not value.ndim or len(value) != self.count):
                raise InputError(f"{name} needs one row for each of {self.count} samples; got {tuple(value.shape)}")
        rowed = frozenset(name for name, value in inputs.items() if isinstance(value, Tensor))

        def tell(branch: Branch) -> Branch:
            kept = frozenset(path for path in branch.rowed if path.split("/")[0] not in inputs)
            return Branch({**branch.inputs, **inputs}, kept | rowed)

        uncond = None if self.uncond is None else tell(self.uncond)
        return replace(self, cond=tell(self.cond), uncond=uncond)

    def save(self, path: str | Path, header: Mapping[str, str] | None = None) -> None:
        """Writes a safetensors file that is complete or absent.

        Args:
            path: of the file.
            header: more to write down in it, read back by `read_header`.

        Raises:
            InputError: when it cannot be written, or an argument cannot be kept in a file.
        """
        tensors: dict[str, Tensor] = {}
        branches = {
            name: {"inputs": row_trees.to_json(dict(branch.inputs), tensors, name), "rowed": sorted(branch.rowed)}
            for name, branch in (("cond", self.cond), ("uncond", self.uncond))
            if branch is not None
        }
        text = json.dumps({"layout": asdict(self.layout), "count": self.count, "branches": branches})
        tensors = tensors or {"none": torch.zeros(1)}
        write_tensors(Path(path), tensors, {**(header or {}), "format": _FORMAT, "condition": text})

    @classmethod
    def load(cls, path: str | Path) -> Condition:
        """Reads what `save` wrote, onto the CPU.

        Raises:
            InputError: when the file is missing, damaged, or holds something else.
        """
        return cls.load_with_header(path)[0]

    @classmethod
    def load_with_header(cls, path: str | Path) -> tuple[Condition, dict[str, str]]:
        """As `load`, and the header of the file.

        Raises:
            InputError: as `load`.
        """
        tensors, header = read_tensors(Path(path))
        if header.get("format") != _FORMAT:
            raise InputError(f"{path} holds no condition; delete it and make it again")
        try:
            known = json.loads(header["condition"])
            layout: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in known["layout"].items()
            }
            branches = {
                name: Branch(row_trees.from_json(branch["inputs"], tensors), frozenset(branch["rowed"]))
                for name, branch in known["branches"].items()
            }
            return cls(Layout(**layout), known["count"], branches["cond"], branches.get("uncond")), header
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is corrupted ({error}); delete it and make it again") from None

    def _changed(self, change: Callable[[Branch], Any]) -> Condition:
        """The condition with the inputs of its branches changed."""

        def of(branch: Branch) -> Branch:
            return replace(branch, inputs=change(branch))

        return replace(self, cond=of(self.cond), uncond=None if self.uncond is None else of(self.uncond))
