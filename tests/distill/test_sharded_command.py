"""The command of a distillation whose networks are cut over two processes leaves what that of one process does."""

import json
import os
import signal

import pytest
import torch
from small_runs import assert_same_roles
from test_interruptions import forked
from test_killed_runs import WEIGHTS, command, lcm
from test_sharding import in_two, log_of, process_of_two

from fewstep.distill.sources import Batches
from fewstep.samplers.files import read_tensors


def distilled(rank, folder, arguments, kill_at=None):
    """The command; dies before batch ``kill_at``."""
    batch = Batches.batch

    def deadly(self, index, positions):
        if index == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(self, index, positions)

    Batches.batch = deadly
    command(arguments)


def test_the_command_exports_what_one_process_does_and_goes_on_after_a_kill(given, tmp_path):
    common = {
        "updates": 4, "adam_epsilon": 1e-6, "lora_rank": 0, "use_ema": True, "ema_decay": 0.5, "validation_steps": 2,
        "num_validation_images": 1, "validation_num_inference_steps": (2,), "gradient_checkpointing": True,
    }  # fmt: skip
    alone = forked(command, lcm(given, tmp_path / "one", **common, train_batch_size=4))
    shared = common | {"train_batch_size": 2, "shard_networks": True}
    for name in ("whole", "killed"):
        (tmp_path / f"at-{name}").mkdir()
    in_two(tmp_path / "at-whole", distilled, lcm(given, tmp_path / "whole", **shared))
    killed = [
        forked(process_of_two, rank, tmp_path / "at-killed", distilled, (lcm(given, tmp_path / "on", **shared), 3))
        for rank in (0, 1)
    ]
    for child in killed:
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
    (tmp_path / "at-killed" / "rendezvous").unlink()
    in_two(tmp_path / "at-killed", distilled, lcm(given, tmp_path / "on", **shared))
    alone.join()
    assert alone.exitcode == 0
    assert_same_roles(tmp_path / "whole" / "checkpoint-4", tmp_path / "on" / "checkpoint-4")
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "on" / WEIGHTS).read_bytes()
    one, two = (read_tensors(tmp_path / name / WEIGHTS)[0] for name in ("one", "whole"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-5)
    names = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("one", "whole")]
    assert names[0] == names[1]
    for first, second in zip(log_of(tmp_path / "one"), log_of(tmp_path / "whole"), strict=True):
        assert {key: value for key, value in first.items() if key != "seconds"} == pytest.approx(
            {key: value for key, value in second.items() if key != "seconds"}, rel=1e-3, abs=1e-6
        )
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "whole")]
    assert runs[0]["trained_parameters"] == runs[1]["trained_parameters"]


def test_the_command_tries_and_leaves_nothing(given, tmp_path):
    flags = lcm(given, tmp_path / "out", dry_run=True, shard_networks=True, train_batch_size=1, lora_rank=2)
    in_two(tmp_path, distilled, flags)
    assert not (tmp_path / "out").exists()
