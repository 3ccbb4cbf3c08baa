"""What each part of a plan costs beside the network, as a share of the network's own time.

``python -m fewstep.scripts.bench.overhead --out overhead.json``

A call's CPU time outside of the network, less that of the same call without the part, over the CPU time of the network
in the call without it. CPU time of one thread, so that a busy machine does not matter; both calls in turn, repeated.
Parts that change how often the network runs are compared at the network's cost of an evaluation all the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from fewstep.eval.assets import load_pipeline
from fewstep.samplers import (
    Aligner,
    AnalyticInit,
    EpsilonScaling,
    ExplicitGrid,
    GuidanceSchedule,
    ModelSwitch,
    Plan,
    StartStatistics,
    TimeShift,
    attach,
    denoisers,
)
from fewstep.samplers.files import write_json
from fewstep.samplers.part import Part
from fewstep.samplers.testing import slot_of

STEPS = 10
GRID = ExplicitGrid(timesteps=tuple(999.0 - 100 * step for step in range(STEPS)))


def parts_of(pipe: Any) -> dict[str, tuple[Part, dict[str, Any]]]:
    """Parts by name, each with what it asks for."""
    network = next(iter(denoisers(pipe).values()))
    config: Any = network.config
    size = config.sample_size
    mean = torch.zeros(config.in_channels, size, size)
    return {
        "time-shift": (TimeShift(window=40, cutoff=0), {}),
        "aligner": (Aligner(ratios=(0.999,) * (STEPS - 1) + (1.0,)), {}),
        "epsilon-scaling": (EpsilonScaling(scale=1.01), {}),
        "analytic-init": (AnalyticInit(), {"start_statistics": StartStatistics(mean, 0.9, 100, "")}),
        "model-switch": (ModelSwitch(networks=("self", "second"), steps=(5,)), {"second": network}),
    }


@contextmanager
def network_time(pipe: Any) -> Iterator[Callable[[], float]]:
    """CPU seconds that the pipeline's denoiser has run for in the block."""
    network = next(iter(denoisers(pipe).values()))
    spent, begun = [0.0], [0.0]

    def begin(*_: Any) -> None:
        begun[0] = time.thread_time()

    def end(*_: Any) -> None:
        spent[0] += time.thread_time() - begun[0]

    hooks = [network.register_forward_pre_hook(begin), network.register_forward_hook(end)]
    try:
        yield lambda: spent[0]
    finally:
        for hook in hooks:
            hook.remove()


def call_time(pipe: Any, plan: Plan, resources: dict[str, Any], arguments: dict[str, Any]) -> tuple[float, float]:
    """CPU seconds of one call in the network, and outside of network and decoder."""
    with attach(pipe, plan, resources), network_time(pipe) as inside:
        generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
        began = time.thread_time()
        pipe(**arguments, generator=generators, output_type="np")
        total = time.thread_time() - began
    return inside(), total - inside()


def overheads(name: str, repeats: int) -> dict[str, Any]:
    """Quartiles of the overhead of every part on one demo, batch 64."""
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    labelled = "vae" in pipe.components
    arguments: dict[str, Any] = {"class_labels": [i % 10 for i in range(64)]} if labelled else {"batch_size": 64}
    if labelled:
        blank = DecoderOutput(sample=torch.zeros(64, 1, 32, 32))  # decoding is the same in all calls
        pipe.vae.decode = lambda latents: blank
    base = Plan(grid=GRID)
    cases = {part: (base.model_copy(update={slot_of(p): p}), needs) for part, (p, needs) in parts_of(pipe).items()}
    if labelled:
        cases["guidance"] = (base.model_copy(update={"guidance": GuidanceSchedule(scale=(4.0,) + (3.0,) * 9)}), {})
    call_time(pipe, base, {}, arguments)
    found: dict[str, Any] = {}
    for part, (plan, needs) in cases.items():
        shares = []
        for _ in range(repeats):
            network, beside = call_time(pipe, base, {}, arguments)
            shares.append((call_time(pipe, plan, needs, arguments)[1] - beside) / network)
        low, median, high = statistics.quantiles(shares, n=4)
        found[part] = {"share_of_network": median, "q1": low, "q3": high}
    return found


def main() -> None:
    """Writes ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    demos = ("demo:fashion-dit", "demo:fashion-unet")
    result = {name: overheads(name, options.repeats) for name in demos}
    write_json(options.out, {"steps": STEPS, "batch_size": 64, "repeats": options.repeats, "overhead": result})
    for name, parts in result.items():
        for part, share in parts.items():
            print(f"{name} {part}: {100 * share['share_of_network']:.2f} %")  # noqa: T201


if __name__ == "__main__":
    main()
