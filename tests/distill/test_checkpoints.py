import errno
import json
import os

import pytest
import torch
from toy_method import Toy, ToyRoles, ToySource, fresh_accelerator, options, train

from fewstep.distill.checkpoints import Checkpoints
from fewstep.distill.loop import Loop
from fewstep.samplers.errors import InputError


def resume(folder, wanted="latest", method=None, roles=None, **changes):
    return train(options(folder, 6, resume_from_checkpoint=wanted, **changes), method, roles)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(tmp_path):
    train(options(tmp_path, 4))
    return tmp_path


def test_only_json_and_safetensors_are_written(run):
    assert names(run) == ["checkpoint-2", "checkpoint-4", "log.jsonl"]
    files = ["optimizer-fake.safetensors", "optimizer-student.safetensors", "roles.safetensors", "state.json"]
    assert names(run / "checkpoint-4") == files


def test_older_checkpoints_go_when_the_new_one_is_there(tmp_path, monkeypatch):
    train(options(tmp_path, 3, checkpointing_steps=1, checkpoints_total_limit=2))
    assert Checkpoints(tmp_path).steps() == [2, 3]
    rename = type(tmp_path).rename

    def refuse(self, target):
        if target.name == "checkpoint-4":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)
    with pytest.raises(InputError, match=r"cannot write .*checkpoint-4: No space left"):
        resume(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    assert Checkpoints(tmp_path).steps() == [2, 3]
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "log.jsonl"]


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_is_one_line_and_spares_the_older_checkpoints(run, monkeypatch, after):
    before = {path: path.read_bytes() for path in run.glob("checkpoint-*/*")}
    settings = options(run, 6, resume_from_checkpoint="latest")
    loop = Loop(Toy(), ToyRoles(), ToySource(), settings, fresh_accelerator(settings))
    calls = iter(range(1000))
    sync = os.fsync

    def fill_up(handle):
        if next(calls) >= after + 1:  # the first is the log's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fill_up)
    with pytest.raises(InputError) as caught:
        loop.run()
    last = run / "checkpoint-4"
    assert str(caught.value) == (
        f"cannot write {run / 'checkpoint-6'}: No space left on device; the last good checkpoint is {last}"
    )
    assert {path: path.read_bytes() for path in run.glob("checkpoint-*/*")} == before
    assert names(run) == ["checkpoint-2", "checkpoint-4", "log.jsonl"]


def test_what_was_left_half_written_is_swept_away(run):
    left = run / ".checkpoint-5.x1y2.aside"
    left.mkdir()
    (left / "roles.safetensors").write_bytes(b"half")
    (run / "checkpoint-9").mkdir()
    _, outcome = resume(run)
    assert outcome.checkpoint.name == "checkpoint-6"
    assert not left.exists()


@pytest.mark.parametrize(
    ("method", "changes", "field"),
    [
        (Toy(fakes=3), {}, "method.fakes = 2, this run has 3"),
        (Toy(), {"seed": 5}, "seed = 0, this run has 5"),
        (Toy(), {"gradient_accumulation_steps": 2}, "global_batch = 4, this run has 8"),
        (Toy(), {"optimizer": "radam"}, "optimizer = adamw, this run has radam"),
        (Toy(), {"mixed_precision": "bf16"}, "mixed_precision = no, this run has bf16"),
    ],
)
def test_another_run_is_refused_by_the_field_that_differs(run, method, changes, field):
    roles = ToyRoles()
    before = roles.state()
    with pytest.raises(InputError) as caught:
        resume(run, method=method, roles=roles, **changes)
    words = f"{run / 'checkpoint-4'} was written with {field}; use the same or start anew in another --output_dir"
    assert str(caught.value) == words
    assert all(torch.equal(before[name], tensor) for name, tensor in roles.state().items())


def test_another_method_is_refused_by_its_name(run):
    class Other(Toy):
        type: str = "other"
        strength: float = 1.0

    with pytest.raises(InputError, match=r"was written with method.type = toy, this run has other; use the same"):
        resume(run, method=Other())


def test_the_same_global_batch_in_other_pieces_may_resume(tmp_path):
    method = Toy(dropout=0.0)
    whole, _ = train(options(tmp_path / "whole", 6), method)
    train(options(tmp_path / "parts", 4), method)
    changes = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    parts, _ = resume(tmp_path / "parts", method=method, **changes)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-5, atol=1e-6)


def test_other_shapes_are_refused(run):
    with pytest.raises(InputError) as caught:
        resume(run, roles=ToyRoles(width=3))
    assert str(caught.value) == (
        f"{run / 'checkpoint-4'} holds float32 (4,) as fake.bias, this run float32 (3,); "
        "use the same networks or start anew in another --output_dir"
    )


def test_a_role_too_many_is_refused(run):
    class More(ToyRoles):
        def state(self):
            return super().state() | {"discriminator.weight": torch.zeros(2)}

    with pytest.raises(InputError, match=r"holds nothing as discriminator.weight, this run float32 \(2,\)"):
        resume(run, roles=More())


def test_latest_must_exist(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(InputError) as caught:
        resume(tmp_path)
    assert str(caught.value) == (
        f"--resume_from_checkpoint latest: {tmp_path} holds no complete checkpoint; leave the flag out to begin anew"
    )
    with pytest.raises(InputError, match=r"--resume_from_checkpoint .*checkpoint-3 is no checkpoint \(no state.json\)"):
        resume(tmp_path, str(tmp_path / "checkpoint-3"))


def test_an_earlier_run_is_not_overwritten(run):
    with pytest.raises(InputError, match=r"holds checkpoint-4 of an earlier run; add --resume_from_checkpoint latest"):
        train(options(run, 6))
    with pytest.raises(InputError, match=r"checkpoint-4 is later than that; delete it or give another --output_dir"):
        resume(run, "checkpoint-2")


def test_a_checkpoint_can_begin_a_run_elsewhere(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    here, _ = resume(run)
    there, _ = resume(elsewhere, str(run / "checkpoint-2"))
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert Checkpoints(elsewhere).steps() == [4, 6]


def test_damage_is_named(run):
    state = run / "checkpoint-4" / "state.json"
    facts = json.loads(state.read_text())
    state.write_text(json.dumps({**facts, "counters": {"turns": 3}}))
    with pytest.raises(InputError, match=r"state.json is damaged; resume from an earlier checkpoint"):
        resume(run)
    state.write_text(json.dumps({**facts, "format": 2}))
    with pytest.raises(InputError, match=r"state.json is not of format 1; resume with the fewstep that wrote it"):
        resume(run)
    state.write_text(json.dumps(facts))
    (run / "checkpoint-4" / "roles.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match=r"roles.safetensors is corrupted"):
        resume(run)
