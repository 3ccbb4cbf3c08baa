"""Networks that are cut over two processes train as whole ones do."""

import json
import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from method_cases import CASES, TinySource, method_of, team_of
from test_interruptions import forked
from toy_method import fresh_accelerator, options

from fewstep.distill import shards
from fewstep.distill.loop import Loop
from fewstep.distill.shards import Share, Sharing
from fewstep.samplers.files import read_tensors

LEAST = 32
"Elements of the smallest parameter that is cut here: the networks are tiny."
SAMPLES = 4


@dataclass(frozen=True)
class Run:
    """A small run of a method, and how two processes divide its global batch."""

    method: str
    lora: bool = False
    average: bool = False
    checkpointing: bool = False
    accumulation: int = 1
    updates: int = 2
    changes: dict[str, Any] = field(default_factory=dict)


# the loss of mmd is of samples in pairs, which depends on how a batch is divided
RUNS = {name: Run(name) for name in CASES if name != "mmd"} | {
    "average": Run("lcm", average=True, updates=3, changes={"max_grad_norm": 0.1}),
    "checkpointed": Run("lcm", checkpointing=True, average=True),
    "accumulated": Run("lcm", accumulation=2),
    "adapter": Run("lcm-lora", lora=True, checkpointing=True),
    "two adapters": Run("dmd2", lora=True),
    "radam": Run("lcm", changes={"optimizer": "radam"}),
}


def loop_of(run, folder, updates=None, resume=None):
    """The loop of a run in this process, which may be one of two, and its team."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = SAMPLES // (processes * run.accumulation) if processes > 1 else SAMPLES
    settings = options(
        folder, updates or run.updates, learning_rate=1e-3, adam_epsilon=1e-6, use_ema=run.average, ema_decay=0.5,
        train_batch_size=rows, gradient_accumulation_steps=run.accumulation if processes > 1 else 1,
        resume_from_checkpoint=resume, **run.changes,
    )  # fmt: skip
    accelerator = fresh_accelerator(settings)
    sharing = None
    if processes > 1:
        sharing = Sharing(accelerator.device, processes, accelerator.process_index)
    method = method_of(run.method)
    team = team_of(method, run.lora, run.average, sharing)
    if run.checkpointing:
        team.roles.enable_gradient_checkpointing()
    return Loop(method, team, TinySource(), settings, accelerator, sharing=sharing), team


def process_of_two(rank, folder, work, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    shards.LEAST = LEAST
    work(rank, folder, *arguments)


def in_two(folder, work, *arguments):
    """Runs ``work(rank, folder, ...)`` in two processes."""
    children = [forked(process_of_two, rank, folder, work, arguments) for rank in (0, 1)]
    for child in children:
        child.join(120)
    ended = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert ended == [0, 0]


def all_runs(rank, folder):
    for name, run in RUNS.items():
        loop_of(run, folder / name)[0].run()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of all runs by two processes."""
    folder = tmp_path_factory.mktemp("two")
    in_two(folder, all_runs)
    return folder


def tensors_in(folder, updates):
    checkpoint = folder / f"checkpoint-{updates}"
    return {
        f"{path.stem}/{name}": tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in read_tensors(path)[0].items()
    }


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(name, two, tmp_path):
    run = RUNS[name]
    loop_of(run, tmp_path)[0].run()
    one, other = (tensors_in(folder, run.updates) for folder in (tmp_path, two / name))
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: key + text)
    for first, second in zip(log_of(tmp_path), log_of(two / name), strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-6), key
