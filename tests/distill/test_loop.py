import json
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType
from tiny import tiny_unet
from torch import nn
from toy_method import TRUTH, WIDTH, Toy, ToyRoles, ToySource, fresh_accelerator, options, train

from fewstep.distill.loop import Loop
from fewstep.distill.lora import LoraSetting
from fewstep.distill.method import METHODS, Loss, Moment
from fewstep.distill.optimisers import RoleOptimiser
from fewstep.distill.role_kinds import Adapter, Base, Ema, FullCopy
from fewstep.distill.roles import Roles
from fewstep.distill.run_log import make_accelerator
from fewstep.samplers.errors import InputError


def assert_same(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_loop_is_a_plain_loop_written_out(tmp_path):
    method = Toy(dropout=0.0, fakes=2)
    ours, _ = train(options(tmp_path, 5, lr_scheduler="linear", lr_warmup_steps=2, max_grad_norm=0.5), method)

    roles, source = ToyRoles(), ToySource()
    rates = {"student": 0.05, "fake": 0.1}
    optimisers = {role: torch.optim.AdamW(roles[role].parameters(), weight_decay=0.01) for role in rates}
    factors = [0.0, 0.5, 1.0, 2 / 3, 1 / 3]
    for turn in range(10):
        step, x = turn // 2, source.batch(turn, range(4))
        moment = Moment(step, turn, 0, step, (), 0, range(4))
        noise = torch.stack([torch.randn(WIDTH, generator=generator) for generator in moment.generators])
        made = roles["student"](x)
        match = (made - x @ TRUTH - 0.1 * noise).square().sum(1).mean() + 0.01 * made.abs().sum(1).mean()
        follow = (roles["fake"](x) - made.detach()).square().sum(1).mean()
        for role, loss in (("fake", follow), ("student", match))[: 1 + turn % 2]:
            optimisers[role].zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(roles[role].parameters(), 0.5)
            optimisers[role].param_groups[0]["lr"] = rates[role] * factors[step]
            optimisers[role].step()
        if turn % 2:
            roles.update_ema("target", 0.9)
    assert_same(ours, roles.state(), 1e-6)


def test_it_learns_what_the_method_says(tmp_path):
    method = Toy(dropout=0.0, noise=0.0, fakes=1)
    settings = options(tmp_path, 150, train_batch_size=8, lr_scheduler="cosine", checkpointing_steps=150)
    tensors, _ = train(settings, method)
    torch.testing.assert_close(tensors["student.weight"], TRUTH.T, rtol=0, atol=0.05)
    torch.testing.assert_close(tensors["fake.weight"], TRUTH.T, rtol=0, atol=0.1)


def test_each_role_makes_its_own_number_of_updates(tmp_path):
    roles = ToyRoles()
    settings = options(tmp_path, 3)
    loop = Loop(Toy(fakes=5), roles, ToySource(), settings, fresh_accelerator(settings))
    loop.run()
    steps = {role: loop.optimisers[role].state()["weight/step"].item() for role in ("student", "fake")}
    assert steps == {"student": 3, "fake": 15}
    assert (loop.counters.step, loop.counters.turn) == (3, 15)


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path):
    method = Toy(dropout=0.0)
    big, _ = train(options(tmp_path / "big", 4, train_batch_size=6), method)
    small, _ = train(options(tmp_path / "small", 4, train_batch_size=2, gradient_accumulation_steps=3), method)
    assert_same(big, small, 1e-6)
    metrics = [log_of(tmp_path / name)[-1] for name in ("big", "small")]
    for name in ("train/student/match", "train/fake/follow", "grad_norm/student"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5)


def test_learning_rates_count_updates_of_the_student(tmp_path):
    changes = {"lr_scheduler": "linear", "gradient_accumulation_steps": 2}
    train(options(tmp_path, 4, **changes), Toy(fakes=3))
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["learning_rate/student"] for line in lines] == pytest.approx([0.05, 0.0375, 0.025, 0.0125])
    assert [line["learning_rate/fake"] for line in lines] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_loss_reaches_its_own_role_only(tmp_path):
    class Leaky(Toy):
        def losses(self, batch, roles, moment):
            yield Loss("follow", "fake", (roles["fake"](batch) - roles["student"](batch)).square().sum(1))
            if "student" in moment.updates:
                assert all(parameter.grad is None for parameter in roles["student"].parameters())
                yield Loss("match", "student", (roles["student"](batch) - roles["fake"](batch)).square().sum(1))

    roles = ToyRoles()
    before = roles.state()
    train(options(tmp_path, 1), Leaky(fakes=1), roles, watch=lambda step: {})
    after = roles.state()
    assert not torch.equal(before["fake.weight"], after["fake.weight"])

    class OnlyFake(Leaky):
        def losses(self, batch, roles, moment):
            yield next(super().losses(batch, roles, moment))

    with pytest.raises(ValueError, match="updates 'student', but no loss of it reaches a parameter of that role"):
        train(options(tmp_path / "b", 1), OnlyFake(fakes=1))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda x, roles: Loss("a", "student", x.sum(1)), "a trains 'student', but no gradient flows from it"),
        (
            lambda x, roles: Loss("a", "student", roles["student"](x).sum()),
            r"a must be one loss per sample, \(B,\); got",
        ),
        (lambda x, roles: Loss("a", "target", roles["fake"](x).sum(1)), "a trains 'target', but the turn updates fake"),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(tmp_path, loss, words):
    class Wrong(Toy):
        def losses(self, batch, roles, moment):
            yield loss(batch, roles)

    with pytest.raises(ValueError, match=words):
        train(options(tmp_path), Wrong(fakes=1))


def test_not_a_number_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    roles = ToyRoles()
    with pytest.raises(InputError) as caught:
        train(options(tmp_path, 6), Toy(poison=3), roles)
    assert str(caught.value) == (
        f"train/student/match is nan in update 4; the last good checkpoint is {tmp_path / 'checkpoint-2'}; "
        "use a smaller --learning_rate"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "log.jsonl"]
    assert all(torch.isfinite(tensor).all() for tensor in roles.state().values())


def test_divergence_before_the_first_checkpoint(tmp_path):
    with pytest.raises(
        InputError, match=r"follow is .* in update 1, above --loss_limit 0.001; no checkpoint was written yet; use"
    ):
        train(options(tmp_path, loss_limit=0.001))


def test_broken_weights_are_not_written(tmp_path):
    roles = ToyRoles()

    def overflow(step):
        if step == 4:
            roles["fake"].weight.data[0, 0] = math.inf
        return {}

    with pytest.raises(
        InputError, match=r"fake: weight is not finite after update 4; the last good checkpoint is .*checkpoint-2;"
    ):
        train(options(tmp_path), Toy(), roles, watch=overflow)
    assert not (tmp_path / "checkpoint-4").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_first(tmp_path, number):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    whole, _ = train(options(tmp_path / "whole", 6))
    settings = options(tmp_path / "cut", 6, checkpointing_steps=100)
    _, outcome = train(settings, before=lambda turn: os.kill(os.getpid(), number) if turn == 6 else None)
    assert outcome.stopped_by == signal.Signals(number).name
    assert (outcome.step, outcome.checkpoint) == (3, tmp_path / "cut" / "checkpoint-3")
    assert json.loads((outcome.checkpoint / "state.json").read_text())["counters"]["turn"] == 7
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    again, outcome = train(settings.model_copy(update={"resume_from_checkpoint": "latest"}))
    assert outcome.stopped_by is None
    assert_same(whole, again)


def test_a_signal_before_the_first_update_of_the_student(tmp_path):
    whole, _ = train(options(tmp_path / "whole", 2))
    settings = options(tmp_path / "cut", 2)
    _, outcome = train(settings, before=lambda turn: os.kill(os.getpid(), signal.SIGTERM) if turn == 0 else None)
    assert outcome.checkpoint == tmp_path / "cut" / "checkpoint-0"
    again, _ = train(settings.model_copy(update={"resume_from_checkpoint": "latest"}))
    assert_same(whole, again)


def test_a_longer_run_goes_on_and_its_log_has_each_update_once(tmp_path):
    whole, _ = train(options(tmp_path / "whole", 6))
    train(options(tmp_path / "parts", 3))
    with (tmp_path / "parts" / "log.jsonl").open("a") as stream:
        stream.write('{"step": 4, "train/student/match": 1.0}\n{"step": 5, "trai')
    parts, _ = train(options(tmp_path / "parts", 6, resume_from_checkpoint="latest"))
    assert_same(whole, parts)
    logs = [[{**line, "seconds": 0} for line in log_of(tmp_path / name)] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_resuming_a_complete_run_changes_nothing(tmp_path):
    done, _ = train(options(tmp_path, 3))
    again, outcome = train(options(tmp_path, 3, resume_from_checkpoint="checkpoint-3"))
    assert_same(done, again)
    assert outcome.checkpoint == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("cut", [2, 3, 4])
def test_a_stage_is_entered_once_wherever_the_run_was_cut(tmp_path, cut):
    entered = []

    class Staged(Toy):
        def enter_stage(self, stage, roles):
            entered.append(stage)
            super().enter_stage(stage, roles)

    whole, _ = train(options(tmp_path / "whole", 6), Staged(halves=3))
    assert entered == [1]
    train(options(tmp_path / "parts", cut), Staged(halves=3))
    parts, _ = train(options(tmp_path / "parts", 6, resume_from_checkpoint="latest"), Staged(halves=3))
    assert entered == [1, 1]
    assert_same(whole, parts)
    plain, _ = train(options(tmp_path / "plain", 6), Toy())
    assert not torch.equal(plain["student.weight"], whole["student.weight"])


def test_the_moments_of_other_optimisers_resume_too(tmp_path):
    settings = {"optimizer": "radam", "adam_weight_decay": 0.0}
    whole, _ = train(options(tmp_path / "whole", 8, **settings))
    train(options(tmp_path / "parts", 5, **settings))
    parts, _ = train(options(tmp_path / "parts", 8, resume_from_checkpoint="latest", **settings))
    assert_same(whole, parts)


def test_forward_passes_run_in_the_precision_asked_for(tmp_path):
    seen = []

    class Watched(Toy):
        def losses(self, batch, roles, moment):
            seen.append(roles["student"](batch).dtype)
            yield from super().losses(batch, roles, moment)

    tensors, _ = train(options(tmp_path, 2, mixed_precision="bf16"), Watched())
    assert set(seen) == {torch.bfloat16}
    assert tensors["student.weight"].dtype == torch.float32


def scaled(settings, scale, noise=0.1):
    accelerator = fresh_accelerator(settings)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    roles = ToyRoles()
    return Loop(Toy(noise=noise), roles, ToySource(), settings, accelerator), roles


def test_scaled_gradients_are_unscaled_once_for_each_role(tmp_path):
    plain, _ = train(options(tmp_path / "plain", 6))
    loop, roles = scaled(options(tmp_path / "scaled", 6), 2.0**10)
    loop.run()
    assert_same(plain, roles.state(), 1e-5)


def test_an_overflow_skips_the_update_and_the_scale_is_resumed(tmp_path):
    loop, roles = scaled(options(tmp_path / "whole", 6), 2.0**127, noise=5.0)
    before = roles.state()
    loop.run()
    assert log_of(tmp_path / "whole")[0]["grad_norm/student"] is None
    assert not torch.equal(before["student.weight"], roles["student"].weight)
    assert loop.accelerator.scaler.get_scale() < 2.0**127
    scaled(options(tmp_path / "parts", 3), 2.0**127, noise=5.0)[0].run()
    again, others = scaled(options(tmp_path / "parts", 6, resume_from_checkpoint="latest"), 1.0, noise=5.0)
    again.run()
    assert_same(roles.state(), others.state())
    assert again.accelerator.scaler.get_scale() == loop.accelerator.scaler.get_scale()


def test_the_generators_of_the_user_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    roles = ToyRoles()
    torch.manual_seed(3)
    train(options(tmp_path, 2), roles=roles)
    assert torch.equal(torch.rand(3), expected)


def test_random_numbers_belong_to_the_sample():
    def draw(positions, turn=2, seed=0):
        moment = Moment(0, turn, 0, 0, ("student",), seed, positions)
        first = moment.rows(lambda generator: torch.randn(3, generator=generator))
        return (
            first,
            moment.rows(lambda generator: torch.randn(3, generator=generator)),
            moment.generator.initial_seed(),
        )

    whole, more, shared = draw(range(6))
    part, _, the_same = draw(range(2, 4))
    assert torch.equal(whole[2:4], part)
    assert shared == the_same
    assert len({*map(tuple, torch.cat([whole, more]).tolist())}) == 12
    assert not torch.equal(draw(range(6), turn=3)[0], whole)
    assert not torch.equal(draw(range(6), seed=1)[0], whole)


def test_trackers_get_what_the_log_gets(tmp_path):
    class Kept(GeneralTracker):
        name, requires_logging_directory, main_process_only = "kept", False, True
        tracker = property(lambda self: None)

        def store_init_configuration(self, values):
            self.settings = values

        def log(self, values, step=None, **kwargs):
            self.lines = [*getattr(self, "lines", []), {"step": step, **values}]

    tracker = Kept()
    settings = options(tmp_path, 2)
    accelerator = Accelerator(cpu=True, log_with=tracker)
    Loop(Toy(), ToyRoles(), ToySource(), settings, accelerator, watch=lambda step: {"valid/fd": 7.0 + step}).run()
    assert tracker.lines == log_of(tmp_path)
    assert [line["valid/fd"] for line in tracker.lines] == [8.0, 9.0]
    assert tracker.settings["output_dir"] == str(tmp_path)
    assert tracker.settings["max_train_steps"] == 2


class Unet(Toy):
    """An adapter and its average on a U-Net, a critic that is a copy of it."""

    def losses(self, batch, roles, moment):
        times = torch.zeros(len(batch))
        with roles.use("student") as network:
            made = network(batch, times).sample
        if "student" in moment.updates:
            with roles.use("target", grad=False) as network:
                wanted = network(0.9 * batch, times).sample
            yield Loss("match", "student", (made - wanted - batch).square().mean((1, 2, 3)))
        with roles.use("fake") as network:
            yield Loss("follow", "fake", (network(batch, times).sample - made.detach()).square().mean((1, 2, 3)))


def unet_roles(checkpointing):
    torch.manual_seed(4)
    unet = tiny_unet().unet
    lora = LoraSetting(rank=2, alpha=4.0, dropout=0.3)
    roles = Roles(unet, {"student": Adapter(lora), "target": Ema("student"), "fake": FullCopy(), "teacher": Base()})
    if checkpointing:
        roles.enable_gradient_checkpointing()
    return roles


def train_unet(folder, steps, checkpointing=False, **changes):
    settings, roles = options(folder, steps, train_batch_size=2, **changes), unet_roles(checkpointing)
    images = ToySource(width=(1, 8, 8))
    Loop(Unet(), roles, images, settings, fresh_accelerator(settings)).run()
    return roles.state()


def test_roles_of_a_network_resume_bit_for_bit(tmp_path):
    whole = train_unet(tmp_path / "whole", 3)
    train_unet(tmp_path / "parts", 2)
    assert_same(whole, train_unet(tmp_path / "parts", 3, resume_from_checkpoint="latest"))
    start = unet_roles(False).state()
    assert all(not torch.equal(start[name], whole[name]) for name in start if "lora_A" in name)
    assert {name.split("/")[0] for name in start} == {"student", "target", "fake"}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    assert_same(train_unet(tmp_path / "plain", 2), train_unet(tmp_path / "again", 2, checkpointing=True), 1e-6)


def test_a_tracker_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="--report_to tensorbord is no tracker that is installed; install its package"):
        make_accelerator(options(tmp_path, report_to="tensorbord"))


def test_a_precision_that_this_process_cannot_have_any_more_is_refused(tmp_path):
    fresh_accelerator(options(tmp_path, mixed_precision="no"))
    with pytest.raises(InputError, match="--mixed_precision bf16: AcceleratorState has already been initialized"):
        make_accelerator(options(tmp_path, mixed_precision="bf16"), cpu=True)


def test_sharded_networks_are_refused(tmp_path):
    settings = options(tmp_path)
    accelerator = fresh_accelerator(settings)
    accelerator.state.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(InputError, match="cannot be sharded by DEEPSPEED; run accelerate with plain multi-GPU, and "):
        Loop(Toy(), ToyRoles(), ToySource(), settings, accelerator)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_updates_are_those_of_plain_adamw_however_the_weights_lie(tmp_path, layout):
    """The fused one goes by memory, and is wrong where gradients lie otherwise than their weights."""
    settings = options(tmp_path, adam_weight_decay=0.1)
    ours, plain = (nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=layout)) for _ in range(2))
    plain.data.copy_(ours.data)
    optimiser = RoleOptimiser("student", {"w": ours}, settings)
    reference = torch.optim.AdamW([plain], weight_decay=0.1, fused=False)
    for _ in range(3):
        ours.grad = torch.randn(4, 3, 3, 3)
        plain.grad = ours.grad.clone()
        optimiser.step(1e-3, None)
        reference.step()
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)
    assert bool(optimiser.optimiser.defaults["fused"]) is (layout == torch.contiguous_format)


def test_what_cannot_be_trained_is_refused(tmp_path):
    half = {"w": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))}
    with pytest.raises(InputError, match="student: w is bfloat16; train float32 weights and set --mixed_precision"):
        RoleOptimiser("student", half, options(tmp_path))
    with pytest.raises(InputError, match="the role 'fake' has no parameter to train; the method updates it"):
        RoleOptimiser("fake", {}, options(tmp_path))
    with pytest.raises(InputError, match="--use_8bit_adam is for --optimizer adamw, not radam"):
        RoleOptimiser(
            "fake", {"w": nn.Parameter(torch.zeros(2))}, options(tmp_path, optimizer="radam", use_8bit_adam=True)
        )


def test_8_bit_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="--use_8bit_adam needs the package bitsandbytes; install it or leave"):
        RoleOptimiser("fake", {"w": nn.Parameter(torch.zeros(2))}, options(tmp_path, use_8bit_adam=True))


def test_an_unknown_method_gets_a_suggestion():
    with pytest.raises(InputError, match="unknown distillation method 'no-such-method'"):
        METHODS["no-such-method"]
