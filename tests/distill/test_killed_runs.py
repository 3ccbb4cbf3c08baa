"""The command of a distillation is killed at any moment, or runs in two processes, and its student is the same."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import assert_same_roles, fresh_states, roles_in
from test_interruptions import forked, meet

from fewstep.distill.__main__ import main
from fewstep.distill.checkpoints import Checkpoints, load
from fewstep.distill.sources import Batches
from fewstep.samplers.files import read_tensors

UPDATES = 12
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def lcm(given, folder, **changes):
    """The command of a run that goes on where there is something to go on from."""
    resume = "latest" if Checkpoints(folder).steps() else None
    data = {"train_data_dir": given.images, "class_labels": (), "resume_from_checkpoint": resume}
    return ["lcm", "--grid_steps", "8", *given.flags(folder, **{"updates": UPDATES} | data | changes)]


def command(arguments, pause_s=0.0):
    """A process that runs the command, slowly, and ends with its status."""
    batch = Batches.batch

    def slow(self, index, positions):
        time.sleep(pause_s)
        return batch(self, index, positions)

    Batches.batch = slow
    os.environ["ACCELERATE_USE_CPU"] = "1"
    fresh_states()
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        os._exit(main(arguments))


@pytest.fixture(scope="module")
def whole(given_files, tmp_path_factory):
    """The folder of the run that nobody kills, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("whole")
    began = time.perf_counter()
    child = forked(command, lcm(given_files, folder), 0.02)
    child.join()
    assert child.exitcode == 0
    return folder, time.perf_counter() - began


def killed(given, folder, whole, times, seed):
    moments = random.Random(seed)
    kills = 0
    while kills < times:
        child = forked(command, lcm(given, folder), 0.02)
        child.join(moments.uniform(0.0, whole[1]))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        for step in Checkpoints(folder).steps():
            load(Checkpoints(folder).path(step))
        if child.exitcode == 0:  # it was done: another run, in the same folder, is killed on its way
            for path in (*folder.glob("checkpoint-*/*"), *folder.glob("cache/*/*")):
                path.unlink()
            for path in folder.glob("checkpoint-*"):
                path.rmdir()
    child = forked(command, lcm(given, folder))
    child.join()
    assert child.exitcode == 0
    assert_same_roles(whole[0] / f"checkpoint-{UPDATES}", folder / f"checkpoint-{UPDATES}")
    assert (whole[0] / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert not [path for path in folder.iterdir() if path.name.startswith((".checkpoint", ".export"))]


def test_killed_at_three_random_moments(given, tmp_path, whole):
    killed(given, tmp_path, whole, 3, seed=4)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(given, tmp_path, whole):
    killed(given, tmp_path, whole, 20, seed=5)


def one_of_two(rank, folder, arguments):
    meet(rank, folder)
    command(arguments)


def test_two_processes_train_the_student_of_one(given, tmp_path):
    # the bias of attention keys has no gradient but rounding, which AdamW would blow up
    common = {"updates": 4, "num_validation_images": 1, "validation_steps": 4, "adam_epsilon": 1e-6}
    alone = forked(command, lcm(given, tmp_path / "one", **common, train_batch_size=4))
    alone.join()
    assert alone.exitcode == 0
    arguments = lcm(given, tmp_path / "two", **common, train_batch_size=1, gradient_accumulation_steps=2)
    children = [forked(one_of_two, rank, tmp_path, arguments) for rank in (0, 1)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    one, two = (roles_in(tmp_path / name / "checkpoint-4") for name in ("one", "two"))
    exported = [read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("one", "two")]
    for first, second in ((one, two), exported):
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-5, atol=1e-5)
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "two")]
    assert names[0] == names[1]


def test_two_processes_dry_run_in_one_folder(given, tmp_path):
    arguments = lcm(given, tmp_path / "out", dry_run=True, train_batch_size=1)
    children = [forked(one_of_two, rank, tmp_path, arguments) for rank in (0, 1)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert not (tmp_path / "out").exists()
