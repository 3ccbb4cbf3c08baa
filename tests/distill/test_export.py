"""A student on disk samples as the trained one does, by its plan alone."""

from types import SimpleNamespace

import pytest
import torch
from method_cases import CASES, method_of, team_of
from tiny import call_arguments, tiny_dit, tiny_sd3, tiny_stable_diffusion

import fewstep.distill.methods  # noqa: F401  registers
from fewstep.distill.export import Student, deployed_plan, export_student, origin, write_network
from fewstep.distill.lora import LoraSetting
from fewstep.distill.team import make_team
from fewstep.samplers import Plan, Process, attach
from fewstep.samplers.errors import InputError
from fewstep.samplers.files import read_tensors

METHOD = method_of("lcm")
FAMILIES = {
    "dit": (tiny_dit, "transformer"),
    "stable-diffusion": (tiny_stable_diffusion, "unet"),
    "sd3": (tiny_sd3, "transformer"),
}


def trained(pipe, component, lora=None, average=False, method=METHOD):
    """A team whose roles differ from the teacher and from each other."""
    process = Process.from_scheduler(pipe.scheduler)
    team = make_team(getattr(pipe, component), process, method, lora, guidance=2.0, average=average)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in team.trainable("student").values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if average:
            team.update_ema("average", 0.5)
    return team


def export(pipe, component, team, folder, steps=(2, 1), method=METHOD, base=None, **options):
    plans = {count: method.plan(team.process, count) for count in steps}
    student = Student(pipe, component, team, "student", method, plans)
    return export_student(student, folder, base=base or origin(pipe), **options)


def sampled(pipe, plan, network=None, component=None):
    """Images of a pipeline by a plan, with another network in it where one is given."""
    if network is not None:
        setattr(pipe, component, network)
    with attach(pipe, plan) as handle:
        return torch.as_tensor(pipe(**call_arguments(pipe)).images), handle


@pytest.mark.parametrize(("lora", "average"), [(None, True), (LoraSetting(2, 3.0), False), (LoraSetting(2, 3.0), True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_is_loaded_samples_as_the_student_does(family, lora, average, tmp_path):
    build, component = FAMILIES[family]
    pipe = build()
    base = origin(pipe)
    team = trained(pipe, component, lora, average)
    made = export(pipe, component, team, tmp_path, base=base)
    assert made.role == ("average" if average else "student")
    assert (made.lora is None) == (lora is None)
    for steps, name in ((2, "plan.json"), (1, "plan-1.json")):
        assert made.plan_file(steps) == tmp_path / name
        plan = Plan.load(tmp_path / name)
        assert plan == made.plans[steps]
        images, handle = sampled(build(), plan)
        assert handle.warnings == ()
        assert handle.stats.nfe == steps  # one branch: the guidance is in the weights
        bare = plan.model_copy(update={"weights": (), "tuned_for": None})
        with team.roles.use(made.role, grad=False, frozen=True) as network:
            wanted, _ = sampled(pipe, bare, network, component)
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-6)
        teacher, _ = sampled(build(), bare)
        assert (images - teacher).abs().max() > 1e-3


@pytest.mark.parametrize("name", sorted(CASES))
def test_students_of_every_method_ship(name, tmp_path):
    method, pipe = method_of(name), tiny_dit()
    lora = method.lora_rank > 0
    team = team_of(method, lora)
    steps = CASES[name].steps
    plans = {steps: method.plan(team.process, steps)}
    role = method.students[0]
    made = export_student(Student(pipe, "transformer", team, role, method, plans), tmp_path, base=origin(pipe))
    assert (made.lora is not None) == lora
    images, handle = sampled(tiny_dit(), Plan.load(tmp_path / "plan.json"))
    assert handle.warnings == ()
    with team.roles.use(role, grad=False, frozen=True) as network:
        bare = made.plans[steps].model_copy(update={"weights": (), "tuned_for": None})
        wanted, _ = sampled(pipe, bare, network, "transformer")
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-6)


def test_the_origin_is_that_of_the_network_before_it_carried_adapters(tmp_path):
    pipe = tiny_dit()
    base = origin(pipe)
    team = trained(pipe, "transformer", LoraSetting(2, 3.0))
    plan = export(pipe, "transformer", team, tmp_path, base=base).plans[2]
    assert plan.tuned_for == base.model_copy(update={"steps": 2})
    assert origin(tiny_dit()) == base != origin(pipe)


def test_half_precision(tmp_path):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    export(pipe, "transformer", team, tmp_path, dtype=torch.float16)
    tensors, _ = read_tensors(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    state = team.trainable("student")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensor, state[name].detach().half()) for name, tensor in tensors.items())


def test_large_networks_are_sharded_and_the_network_stays_as_it_was(tmp_path, monkeypatch):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    save = type(pipe.transformer).save_pretrained
    monkeypatch.setattr(
        type(pipe.transformer), "save_pretrained", lambda self, folder: save(self, folder, max_shard_size="50KB")
    )
    export(pipe, "transformer", team, tmp_path)
    shards = list((tmp_path / "transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    images, _ = sampled(tiny_dit(), Plan.load(tmp_path / "plan.json"))
    assert images.isfinite().all()


def test_an_export_replaces_the_one_before_and_a_failed_one_leaves_it(tmp_path):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    export(pipe, "transformer", team, tmp_path, steps=(2, 5))
    export(pipe, "transformer", team, tmp_path, steps=(4, 1))
    names = {"plan.json", "plan-1.json", "transformer"}
    assert {path.name for path in tmp_path.iterdir()} == names
    before = (tmp_path / "plan.json").read_text()
    name, parameter = next(iter(team.trainable("student").items()))
    with torch.no_grad():
        parameter[0] = float("nan")
    with pytest.raises(InputError, match=f"{name} of the student is not finite; export an earlier checkpoint"):
        export(pipe, "transformer", team, tmp_path, steps=(2, 1))
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "plan.json").read_text() == before


def test_guidance_is_switched_off_where_the_pipeline_would_add_a_branch():
    process = Process.from_scheduler(tiny_dit().scheduler)
    plan = METHOD.plan(process, 1)
    pipe = tiny_stable_diffusion()
    assert deployed_plan(pipe, pipe.unet, METHOD, plan).guidance.scale == 1.0
    told = tiny_stable_diffusion(time_cond_proj_dim=4)
    assert deployed_plan(told, told.unet, METHOD, plan).guidance is None
    without = SimpleNamespace(guidance_in_student=False)
    assert deployed_plan(pipe, pipe.unet, without, plan).guidance is None


def test_further_students_of_a_method_have_folders_of_their_names(tmp_path):
    pipe = tiny_dit()
    method = method_of("icd")
    process = Process.from_scheduler(pipe.scheduler)
    base = origin(pipe)
    team = make_team(pipe.transformer, process, method, LoraSetting(2, 3.0), guidance=2.0)
    plans = {2: method.plan(process, 2)}
    second = method.students[1]
    made = [
        export_student(Student(pipe, "transformer", team, role, method, plans), tmp_path, base=base)
        for role in method.students
    ]
    assert [each.folder for each in made] == [tmp_path, tmp_path / second]
    assert not list((tmp_path / second).glob("plan*"))
    with attach(tiny_dit(), Plan.load(tmp_path / "plan.json")) as handle:
        assert handle.warnings == ()


def test_bad_exports(tmp_path):
    pipe = tiny_dit()
    team = trained(pipe, "transformer")
    with pytest.raises(InputError, match="this student has all weights; leave --kohya out"):
        export(pipe, "transformer", team, tmp_path, kohya=True)
    with pytest.raises(InputError, match="Linear is no network of diffusers and cannot be exported as one"):
        write_network(torch.nn.Linear(2, 2), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        export(pipe, "transformer", team, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
