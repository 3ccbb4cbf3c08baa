"""What the training loop costs beside the forward and backward passes that an update needs.

``python -m fewstep.scripts.bench.throughput --methods lcm dmd2 --out throughput.json``

For each method the updates of a short run are timed, and the networks' calls of the last one are kept. Then these
calls are made again, each forward and, where it was recorded, backward, and nothing else. Medians of both, in one
process and alternately, so that what else the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from fewstep.distill.course import prepare
from fewstep.distill.loop import Loop
from fewstep.distill.method import METHODS
from fewstep.distill.options import DistillOptions
from fewstep.eval.progress import meter
from fewstep.samplers.files import write_json

WARM_UP, UPDATES = 2, 5


@dataclass(frozen=True)
class Pass:
    """One call of a network in an update."""

    role: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    recorded: bool
    frozen: bool


@contextmanager
def listening(roles: Any) -> Iterator[list[Pass]]:
    """Collects the calls of all networks while roles are used."""
    calls: list[Pass] = []
    use = roles.use

    @contextmanager
    def heard(name: str, **how: Any) -> Iterator[nn.Module]:
        def keep(network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            positional, named = tree_map_only(
                Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), (args, kwargs)
            )
            calls.append(Pass(name, positional, named, torch.is_grad_enabled(), how.get("frozen", False)))

        with use(name, **how) as network:
            handle = network.register_forward_pre_hook(keep, with_kwargs=True)
            try:
                yield network
            finally:
                handle.remove()

    roles.use = heard
    try:
        yield calls
    finally:
        del roles.use


def replayed(roles: Any, calls: list[Pass]) -> float:
    """Seconds that the calls of an update take by themselves."""
    begun = time.perf_counter()
    for call in calls:
        with roles.use(call.role, grad=call.recorded, frozen=call.frozen) as network:
            output = network(*call.args, **call.kwargs)
        if call.recorded:
            output = output if isinstance(output, Tensor) else output[0]
            inputs = [x for x in tree_flatten((call.args, call.kwargs))[0] if isinstance(x, Tensor) and x.requires_grad]
            trains = call.role in roles.trained and not call.frozen
            trained = roles.trainable(call.role).values() if trains else ()
            output.float().square().mean().backward(inputs=[*trained, *inputs])
    return time.perf_counter() - begun


def measured(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One method's row."""
    method = METHODS[name].model_validate({"type": name})
    settings = DistillOptions(
        pipe=options.pipe, output_dir=folder, cache_dir=options.work, train_batch_size=options.batch,
        max_train_steps=WARM_UP + UPDATES, num_validation_images=0, encode_batch_size=64,
        **({} if method.needs == "conditions" else {"teacher_samples": options.samples}),
        teacher=options.teacher,
    )  # fmt: skip
    with meter(Console(), shown=False) as bar:
        course = prepare(method, settings, bar)
    roles = course.team.roles
    seconds: list[float] = []
    passes: list[float] = []
    names: Counter[str] = Counter()
    begun = time.perf_counter()
    with listening(roles) as calls:

        def watch(step: int) -> dict[str, float]:
            nonlocal begun
            took = time.perf_counter() - begun
            kept = list(calls)
            if step > WARM_UP:
                seconds.append(took)
                passes.append(replayed(roles, kept))
                names.clear()
                names.update(f"{call.role} {'forward and backward' if call.recorded else 'forward'}" for call in kept)
            calls.clear()
            for role in roles.trained:
                for parameter in roles.trainable(role).values():
                    parameter.grad = None
            begun = time.perf_counter()
            return {}

        Loop(course.method, course.team, course.source, settings, course.accelerator, watch).run()
    what = "; ".join(f"{count} x {name}" if count > 1 else name for name, count in names.items())
    return {"update_s": statistics.median(seconds), "passes_s": statistics.median(passes), "passes": what}


def main() -> None:
    """Writes ``--out`` after each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipe", default="demo:fashion-dit")
    parser.add_argument("--methods", nargs="+", default=["lcm", "lcm-lora", "pcm", "scm", "swiftbrush", "dmd2"])
    parser.add_argument("--teacher", type=Path, help="plan by which the teacher makes its samples")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for method in options.methods:
        with tempfile.TemporaryDirectory() as folder:
            rows[method] = measured(method, options, Path(folder))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU core"
        command = shlex.join(["python", "-m", "fewstep.scripts.bench.throughput", *sys.argv[1:]])
        write_json(options.out, {"rows": rows, "batch": options.batch, "device": device, "command": command})


if __name__ == "__main__":
    main()
