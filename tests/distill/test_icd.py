"""Invertible consistency distillation: both students at the true maps, and what each loss is told of guidance."""

import pytest
import torch
from analytic import PROCESSES, Gaussian, consistent, shifted
from analytic_team import AnalyticTeam, moment_at
from method_cases import TinySource, team_of
from tiny import call_arguments, tiny_stable_diffusion

from fewstep.distill.encode import encode
from fewstep.distill.guidance_embedding import told
from fewstep.distill.lora import LoraSetting
from fewstep.distill.methods import ICD
from fewstep.distill.role_kinds import Adapter, FullCopy
from fewstep.distill.sources import Batch
from fewstep.distill.team import Team, make_team
from fewstep.samplers import InputError, Process


def losses_of(method, roles, moment, batch):
    return {(loss.role, loss.term): loss.value for loss in method.losses(batch, roles, moment)}


def end_of(bounds, forward):
    bounds = torch.tensor(bounds, dtype=torch.float64)
    return lambda t: bounds[torch.searchsorted(bounds, t, right=forward) - (0 if forward else 1)]


@pytest.mark.parametrize("name", ["vp", "flow", "edm"])
def test_losses_vanish_at_the_true_maps_alone(name):
    """There and back again, and each loss sees what is wrong with its own student."""
    process, method = PROCESSES[name], ICD(grid_steps=120, segments=3, solver="dpm2")
    teacher = Gaussian(process)
    points, starts = method.points(process), method.forward_points(process)
    assert method.plan(process, 3).grid.timesteps == tuple(points[edge] for edge in (120, 80, 40))
    true = {
        "student": consistent(process, teacher.map, end_of([points[i] for i in (0, 40, 80, 120)], False)),
        "forward_student": consistent(process, teacher.map, end_of([starts[i] for i in (0, 40, 80, 120)], True)),
    }
    batch = Batch(torch.arange(60), None, teacher.draw(60, 3))

    def measured(**changed):
        roles = AnalyticTeam(process, true | changed | {"teacher": teacher})
        return losses_of(method, roles, moment_at(rows=60), batch)

    right = measured()
    assert len(right) == 4
    scale = float(process.sigma(process.time_range.noisiest))
    for value in right.values():
        assert float(value.mean()) < 0.01 * scale
    for role in true:
        wrong = measured(**{role: shifted(true[role], process, 0.3)})
        for key in right:
            if key == (role, "match") or key[1] == "preserve":
                assert float(wrong[key].mean()) > 5 * float(right[key].mean())
            else:
                assert torch.equal(wrong[key], right[key])


def test_each_preservation_has_its_own_weight():
    team, batch = team_of(ICD(grid_steps=6), lora=True), TinySource().batch(0, range(3))
    weights = {"student": "reverse_preserve", "forward_student": "forward_preserve"}
    whole = losses_of(ICD(grid_steps=6), team, moment_at(rows=3), batch)
    for role, field in weights.items():
        without = losses_of(ICD(grid_steps=6, **{field: 0.0}), team, moment_at(rows=3), batch)
        assert set(without) == set(whole) - {(role, "preserve")}
        double = losses_of(ICD(grid_steps=6, **{field: 3.0}), team, moment_at(rows=3), batch)
        torch.testing.assert_close(double[role, "preserve"], 2 * whole[role, "preserve"])


class Noting(Team):
    """A team that notes with which scales its teacher is guided."""

    def guided(self, role, condition, scale, **options):
        self.roles.scales.append((role, scale.tolist()))
        return super().guided(role, condition, scale, **options)


def test_only_the_reverse_student_is_guided():
    method = ICD(grid_steps=6, guidance_scale=(1.0, 8.0), forward_preserve=0.0, reverse_preserve=0.0)
    team = team_of(method, lora=True)
    team.roles.scales = []
    losses_of(method, Noting(team.roles, team.process), moment_at(rows=12), TinySource().batch(0, range(12)))
    (_, reverse), (_, forward) = team.roles.scales
    assert set(reverse) == {1.0, 8.0}
    assert set(forward) == {1.0}


def test_students_may_be_told_the_scale():
    """The forward one and both preservations are told w = 0, whose embedding is another than that of w = 7."""
    pipe = tiny_stable_diffusion()
    method = ICD(grid_steps=6, guidance_scale=(8.0,), embed_guidance=True)
    team = make_team(pipe.unet, Process.from_scheduler(pipe.scheduler), method, None, guidance=4.0)
    condition = encode(pipe, call_arguments(pipe) | {"guidance_scale": 2.0})
    batch = Batch(torch.arange(2), condition, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    seen = []
    for role in method.students:
        with team.roles.use(role) as network:
            network.time_embedding.cond_proj.register_forward_hook(lambda _, args, out: seen.append(args[0].clone()))
    assert len(losses_of(method, team, moment_at(rows=2), batch)) == 4
    guided, plain = (
        told(condition, torch.full((2,), scale, dtype=torch.float64)).cond.inputs["timestep_cond"]
        for scale in (8.0, 1.0)
    )
    is_guided = [torch.equal(vector, guided) for vector in seen]
    assert is_guided == [True, True, *[False] * 6]
    assert all(torch.equal(vector, plain) for vector in seen[2:])
    assert not method.guidance_in_student


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ICD(guidance_scale=(1.0, 8.0)),
            r"students that are not told the guidance scale cannot undo jumps guided by \[1.0, 8.0\]; set guidance_s",
        ),
        (lambda: ICD(segments=51), r"segments must be 1 to 50, the number of steps; got 51"),
        (
            lambda: ICD(embed_guidance=True).kinds(Adapter(LoraSetting(2, 2.0)), None),
            r"an adapter gives the pipeline's network no input for the guidance scale; train all weights, or set",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_all_segments_are_steps():
    process = Process.from_scheduler(tiny_stable_diffusion().scheduler)
    assert len(ICD().plan(process, 4).grid.timesteps) == 4
    assert set(ICD().kinds(FullCopy(), None)) == {*ICD.students, "teacher"}
    with pytest.raises(InputError, match=r"students of 4 segments are sampled in as many steps; got 2"):
        ICD().plan(process, 2)
