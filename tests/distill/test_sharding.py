"""Networks that are cut over two processes train as whole ones do."""

import copy
import json
import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from method_cases import CASES, TinySource, method_of, team_of
from test_interruptions import forked, meet
from tiny import tiny_dit
from torch import nn
from toy_method import Toy, ToyRoles, ToySource, fresh_accelerator, options

from fewstep.distill import course, shards
from fewstep.distill.beginning import begin
from fewstep.distill.course import sharing_of
from fewstep.distill.dry_run import table_of
from fewstep.distill.loop import Loop
from fewstep.distill.optimisers import RoleOptimiser
from fewstep.distill.options import DistillOptions
from fewstep.distill.role_kinds import Base, Ema, FullCopy
from fewstep.distill.roles import Roles
from fewstep.distill.shards import Share, Sharing, cut, shape_of, size_of
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_tensors, write_json
from fewstep.samplers.network import own_class

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
    meet(rank, folder)
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


def checks_of_two(rank, folder):
    """What two processes find out; the asserts of each test are in its own function."""
    facts = {}
    for check in (resumed, held, overflow, broken, disorder, kept, guided_in_one, begun, joined):
        facts[check.__name__] = check(rank, folder)
    write_json(folder / f"facts-{rank}.json", facts)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """What two processes found out, by check: that of the first and that of the second."""
    folder = tmp_path_factory.mktemp("facts")
    in_two(folder, checks_of_two)
    first, second = (json.loads((folder / f"facts-{rank}.json").read_text()) for rank in (0, 1))
    return {name: (first[name], second[name]) for name in first}


PARTS = Run("dmd2", average=True, updates=4)


def resumed(rank, folder):
    loop_of(PARTS, folder / "whole")[0].run()
    loop_of(PARTS, folder / "parts", updates=2)[0].run()
    loop_of(PARTS, folder / "parts", resume="latest")[0].run()
    whole, parts = (tensors_in(folder / name, 4) for name in ("whole", "parts"))
    return [len(whole), whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)]


def test_a_resumed_run_is_the_uninterrupted_one(facts):
    assert facts["resumed"][0] == facts["resumed"][1]
    assert facts["resumed"][0][0] > 100
    assert facts["resumed"][0][1] is True


def test_one_process_goes_on_with_what_two_wrote(two, tmp_path):
    run = RUNS["average"]
    (tmp_path / "on").mkdir()
    (tmp_path / "on" / "checkpoint-2").symlink_to(two / "average" / "checkpoint-2")
    loop_of(run, tmp_path / "on", resume="latest")[0].run()
    one, on = (tensors_in(folder, 3) for folder in (two / "average", tmp_path / "on"))
    for key in one:
        torch.testing.assert_close(one[key], on[key], rtol=1e-5, atol=1e-5)


def held(rank, folder):
    """Bytes of weights, gradients and moments here and over both; the table of the dry run; which roles are cut."""
    loop, team = loop_of(Run("lcm", average=True, updates=1), folder / "held")
    grads = []
    gather = RoleOptimiser.gather

    def counted(self, accelerator):
        grads.extend(each.grad.nbytes for each in self.parameters.values() if each.grad is not None)
        return gather(self, accelerator)

    RoleOptimiser.gather = counted
    loop.run()
    RoleOptimiser.gather = gather
    weights = [p for network in team.roles._networks() for p in network.parameters()]
    moments = [m for state in loop.optimisers["student"].optimiser.state.values() for m in state.values() if m.ndim]
    return {
        "weights": sum(each.nbytes for each in weights),
        "gradients": sum(grads),
        "moments": sum(each.nbytes for each in moments),
        "whole": 4 * size_of(weights),
        "student": 4 * size_of(team.trainable("student").values()),
        "table": list(table_of(team.roles).columns[3].cells),
    }


def test_each_process_holds_half(facts):
    for fact in facts["held"]:
        assert fact["weights"] < 0.6 * fact["whole"]
        assert fact["gradients"] < 0.6 * fact["student"]
        assert fact["moments"] < 0.6 * 2 * fact["student"]
        assert fact["table"] == list(table_of(team_of(method_of("lcm"), False, True).roles).columns[3].cells)


def overflow(rank, folder):
    """Whether a gradient that overflows in the second process's part keeps the first from its update."""
    loop, team = loop_of(Run("lcm"), folder / "overflow")
    scaler = loop.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimiser = loop.optimisers["student"]
    before = team.state()
    scaler.scale(torch.zeros(()))
    for parameter in optimiser.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    last = [each for each in optimiser.parameters.values() if isinstance(each, Share)][-1]
    last.grad[0] = float("inf") if rank == 1 else 1.0
    norm = optimiser.gather(loop.accelerator)
    optimiser.step(0.1, scaler)
    scaler.update()
    after = team.state()
    same = all(rank == 1 or torch.equal(before[key], after[key]) for key in before)
    return [same, scaler.get_scale(), bool(norm.isfinite())]


def test_an_overflow_in_one_part_skips_the_update_of_all(facts):
    assert facts["overflow"] == ([True, 2.0, False], [True, 2.0, False])


def broken(rank, folder):
    """The words of both processes when a weight of one is not finite."""
    loop, team = loop_of(Run("lcm"), folder / "broken")
    share = team.trainable("student")["transformer_blocks.0.attn1.to_q.weight"]
    assert isinstance(share, Share)
    if rank == 1:
        share.data[0] = float("nan")
    with pytest.raises(InputError) as error:
        loop._save()
    return str(error.value)


def test_a_weight_that_is_not_finite_in_one_part_stops_all(facts):
    assert facts["broken"][0] == facts["broken"][1]
    assert "student: transformer_blocks.0.attn1.to_q.weight is not finite after update 0" in facts["broken"][0]


def disorder(rank, folder):
    """The words of both processes when they ask for different weights of one size."""
    layers = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
    sharing = Sharing(torch.device("cpu"), 2, rank)
    cut([layers], sharing)
    layers[0](torch.ones(1, 8))
    sharing.refuse_disorder()
    layers[rank](torch.ones(1, 8))
    with pytest.raises(InputError) as error:
        sharing.refuse_disorder()
    return str(error.value)


def test_processes_that_ask_for_different_weights_are_stopped(facts):
    assert facts["disorder"][0] == facts["disorder"][1]
    assert "the processes asked for different weights, so the network decides by its input" in facts["disorder"][0]


def kept(rank, folder):
    """Bytes of the matrices in a student's blocks, and those that its forward pass keeps: plain, and checkpointed."""
    network = tiny_dit(layers=6).transformer
    cut([network], Sharing(torch.device("cpu"), 2, rank))
    roles = Roles(network, {"student": FullCopy()})
    student = roles.trainable("student")
    facts = [4 * size_of(student[name] for name in student if ".attn1." in name or ".ff." in name)]
    for _ in range(2):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), roles.use("student") as network:
            out = network(torch.ones(1, 4, 4, 4), torch.tensor([5]), torch.tensor([1])).sample
        facts.append(sum(storages.values()))
        out.sum().backward()
        roles.enable_gradient_checkpointing()
    return facts


def test_checkpointing_lets_go_of_gathered_weights(facts):
    for whole, plain, checkpointed in facts["kept"]:
        assert plain > whole
        assert checkpointed < 0.3 * whole, (plain, checkpointed, whole)


def guided_in_one(rank, folder):
    """The clean samples that a teacher of two calls predicts at a scale of 1 in one process, and of 2 in the other."""
    _, team = loop_of(Run("lcm"), folder / "guided")
    samples = guided_at(team, 1.0 + rank)
    team.sharing.refuse_disorder()
    return samples


def guided_at(team, scale):
    batch = TinySource().batch(0, range(2))
    condition = replace(batch.condition, layout=replace(batch.condition.layout, stacked=False))
    teacher = team.guided("teacher", condition, torch.full((2,), scale))
    return teacher(batch.x0, torch.tensor([300.0, 700.0])).x0.flatten().tolist()


def test_a_scale_of_1_in_one_process_does_not_hold_up_the_other(facts):
    team = team_of(method_of("lcm"), False)
    for rank in (0, 1):
        assert facts["guided_in_one"][rank] == pytest.approx(guided_at(team, 1.0 + rank), rel=1e-5, abs=1e-5)


def begun(rank, folder):
    """Whether a student that begins with given weights has them, and its average."""
    _, team = loop_of(Run("lcm", average=True), folder / "begun")
    draw = torch.Generator().manual_seed(3)
    given = {name: torch.randn(shape_of(p), generator=draw) for name, p in team.trainable("student").items()}
    begin(team, given)
    state = team.state()
    roles = ("student", "average")
    return all(rank == 1 or torch.equal(state[f"{role}/{name}"], given[name]) for role in roles for name in given)


def test_a_student_begins_with_given_weights(facts):
    assert facts["begun"] == (True, True)


class Root(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.table = nn.Parameter(scale * torch.arange(35.0).view(5, 7))


def joined(rank, folder):
    """What a network with a parameter of its own is after it was joined, in each process."""
    root = Root()
    cut([root], Sharing(torch.device("cpu"), 2, rank))
    made = type(root)(scale=2.0)  # the class still makes whole ones
    shards.join(root)
    return [type(root) is Root, root._parameters["table"].tolist(), made.table.tolist()]


def test_a_joined_network_is_whole_in_the_main_process(facts):
    whole, doubled = (Root(scale).table.tolist() for scale in (1.0, 2.0))
    assert facts["joined"][0] == [True, whole, doubled]
    own, part, made = facts["joined"][1]
    assert (own, made) == (False, doubled)
    assert part == [*range(18, 35), 0.0]


def test_a_module_looks_as_it_did(monkeypatch):
    monkeypatch.setattr(shards, "LEAST", LEAST)
    tied = nn.Linear(8, 8)
    network = nn.ModuleDict({"one": tied, "two": nn.Linear(8, 8), "conv": nn.Conv2d(3, 4, 3)})
    network["two"].weight = tied.weight
    names = dict(network.named_parameters()).keys()
    cut([network], Sharing(torch.device("cpu"), 2, 0))
    copied = copy.deepcopy(network)
    for each in (network, copied):
        found = dict(each.named_parameters())
        assert found.keys() == names
        assert {name: isinstance(p, Share) for name, p in found.items()} == {
            "one.weight": True, "one.bias": False, "two.bias": False, "conv.weight": True, "conv.bias": False,
        }  # fmt: skip
        assert shape_of(found["conv.weight"]) == (4, 3, 3, 3)
        assert found["conv.weight"].shape == (54,)
        assert [own_class(each[name]) for name in ("one", "conv")] == [nn.Linear, nn.Conv2d]
        assert type(each["one"]).__name__ == "Linear"
    assert found["one.weight"] is not dict(network.named_parameters())["one.weight"]
    assert len({p.number for each in (network, copied) for p in each.parameters() if isinstance(p, Share)}) == 4


def test_copies_of_a_half_precision_network_are_shares_in_float32(monkeypatch):
    monkeypatch.setattr(shards, "LEAST", LEAST)
    network = tiny_dit().transformer.to(torch.bfloat16)
    name = "transformer_blocks.0.attn1.to_q.weight"
    half = network.get_parameter(name).detach().flatten().chunk(2)[1]
    cut([network], Sharing(torch.device("cpu"), 2, 1))
    roles = Roles(network, {"student": FullCopy(), "teacher": Base(), "target": Ema("student")})
    share = roles.trainable("student")[name]
    assert isinstance(share, Share)
    assert (share.dtype, share.requires_grad) == (torch.float32, True)
    assert torch.equal(share, half.float())
    with roles.use("target") as target, roles.use("teacher") as teacher:
        assert torch.equal(target.get_submodule(name.removesuffix(".weight"))._parameters["weight"], half.float())
        frozen = teacher.get_submodule(name.removesuffix(".weight"))._parameters["weight"]
    assert (frozen.dtype, frozen.requires_grad, frozen.numel()) == (torch.bfloat16, False, half.numel())


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])


def test_what_cannot_be_cut_is_refused(tmp_path, given, monkeypatch):
    with pytest.raises(InputError, match=r"Experts asks experts that its input decides.*leave --shard_networks out"):
        cut([Experts()], Sharing(torch.device("cpu"), 2, 0))
    monkeypatch.setattr(course, "load_pipeline", None)
    with pytest.raises(InputError, match="--shard_networks true cuts the networks over several processes, and this is"):
        given.run("lcm", tmp_path, {}, teacher_samples=2, shard_networks=True)
    accelerator = fresh_accelerator(options(tmp_path))
    accelerator.state.distributed_type = DistributedType.FSDP
    plain = DistillOptions(output_dir=tmp_path)
    with pytest.raises(InputError, match="accelerate's FSDP cuts the networks over several processes, and this is one"):
        sharing_of(plain, accelerator)
    with pytest.raises(InputError, match="accelerate is configured for FSDP, and the networks are whole"):
        Loop(Toy(), ToyRoles(), ToySource(), options(tmp_path), accelerator)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    eight = DistillOptions(output_dir=tmp_path, use_8bit_adam=True)
    with pytest.raises(InputError, match="--use_8bit_adam scales moments in blocks of each process's own, which acc"):
        sharing_of(eight, accelerator)
    with pytest.warns(UserWarning, match="cut as by --shard_networks true, and FSDP's other settings are not used"):
        assert sharing_of(plain, accelerator).count == 2
    accelerator.state.distributed_type = DistributedType.MULTI_GPU
    assert sharing_of(plain, accelerator) is None
