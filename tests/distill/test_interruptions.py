"""Runs that are killed, and runs of two processes."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from toy_method import Toy, ToyRoles, die, options, train

from fewstep.distill import checkpoints as module
from fewstep.distill.checkpoints import Checkpoints
from fewstep.samplers.files import read_tensors, write_tensors

STEPS = 12


def forked(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def go_on(folder, kill_at=None, pause_s=0.0):
    """Begins or resumes; dies before turn ``kill_at``."""

    def before(turn):
        time.sleep(pause_s)
        if turn == kill_at:
            die()

    resume = "latest" if Checkpoints(folder).steps() else None
    settings = options(folder, STEPS, checkpoints_total_limit=2, resume_from_checkpoint=resume)
    return train(settings, before=before)


def assert_same_end(folder, whole):
    ended, outcome = go_on(folder)
    assert outcome.step == STEPS
    assert all(torch.equal(whole[name], ended[name]) for name in whole)
    saved, _ = read_tensors(outcome.checkpoint / "roles.safetensors")
    assert all(torch.equal(whole[name], saved[name]) for name in whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return go_on(tmp_path_factory.mktemp("whole"))[0]


def test_killed_at_random_turns(tmp_path, whole):
    turns = sorted(random.Random(1).sample(range(2 * STEPS), 6))
    for turn in turns:
        child = forked(go_on, tmp_path, turn)
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, whole):
    moments = random.Random(2)
    for _ in range(20):
        child = forked(go_on, tmp_path, None, 0.02)
        child.join(moments.uniform(0.05, 0.5))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        for step in Checkpoints(tmp_path).steps():
            module.load(Checkpoints(tmp_path).path(step))
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("at", ["roles.safetensors", "optimizer-fake.safetensors", "state.json", "rename"])
def test_killed_while_it_writes(tmp_path, monkeypatch, whole, at):
    def fragile_tensors(path, tensors):
        if path.name == at:
            path.write_bytes(b"half")
            die()
        write_tensors(path, tensors)

    def fragile_json(path, value):
        if path.name == at:
            die()
        write_json(path, value)

    def fragile_sync(folder):
        if at == "rename":
            die()
        sync(folder)

    settings = options(tmp_path, 2)
    train(settings)
    write_json, sync = module.write_json, module._sync
    monkeypatch.setattr(module, "write_tensors", fragile_tensors)
    monkeypatch.setattr(module, "write_json", fragile_json)
    monkeypatch.setattr(module, "_sync", fragile_sync)
    child = forked(go_on, tmp_path)
    child.join()
    monkeypatch.undo()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob(".checkpoint-4.*")] != []
    assert Checkpoints(tmp_path).steps() == [2]
    assert_same_end(tmp_path, whole)
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_sigterm_from_outside(tmp_path, whole):
    child = forked(go_on, tmp_path, None, 0.05)
    while not (tmp_path / "log.jsonl").is_file() or not (tmp_path / "log.jsonl").read_text():
        time.sleep(0.01)
    child.terminate()
    child.join()
    assert child.exitcode == 0
    assert Checkpoints(tmp_path).steps()[-1] < STEPS
    assert_same_end(tmp_path, whole)


def meet(rank, folder):
    """Makes this process one of two."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


def one_of_two(rank, folder, settings, method, stop_at):
    meet(rank, folder)

    def before(turn):
        if turn == stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    roles = ToyRoles()
    _, outcome = train(settings, method, roles, before)
    write_tensors(folder / f"{rank}-{outcome.step}.safetensors", roles.state())
    torch.distributed.destroy_process_group()


def two_processes(folder, settings, method, stop_at=None):
    folder.mkdir()
    children = [forked(one_of_two, rank, folder, settings, method, stop_at) for rank in (0, 1)]
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_two_processes_are_one_at_the_same_global_batch(tmp_path):
    method, common = Toy(dropout=0.0), {"lr_scheduler": "cosine", "lr_warmup_steps": 2}
    one, _ = train(options(tmp_path / "one", 6, train_batch_size=8, **common), method)
    settings = options(tmp_path / "out", 6, train_batch_size=2, gradient_accumulation_steps=2, **common)
    two_processes(tmp_path / "two", settings, method)
    for rank in (0, 1):
        two, _ = read_tensors(tmp_path / "two" / f"{rank}-6.safetensors")
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)
    lines = [(tmp_path / name / "log.jsonl").read_text().count("\n") for name in ("one", "out")]
    assert lines == [6, 6]


def test_a_signal_to_one_process_stops_both_and_one_process_can_go_on(tmp_path):
    method = Toy(dropout=0.0)
    whole, _ = train(options(tmp_path / "one", 6, train_batch_size=8), method)
    two_processes(tmp_path / "two", options(tmp_path / "out", 6, train_batch_size=4), method, stop_at=5)
    assert sorted(path.name for path in (tmp_path / "two").glob("*.safetensors")) == [
        "0-3.safetensors",
        "1-3.safetensors",
    ]
    on, _ = train(options(tmp_path / "out", 6, train_batch_size=8, resume_from_checkpoint="latest"), method)
    for name in whole:
        torch.testing.assert_close(whole[name], on[name], rtol=1e-5, atol=1e-5)
