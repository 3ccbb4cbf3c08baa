"""Methods that match distributions: on Gaussian data, where each network is a few numbers, and their own rules."""

from dataclasses import replace

import pytest
import torch
from analytic import FLOW, VP
from method_cases import TinySource, method_of, team_of
from test_methods import moment_of
from torch import nn

from fewstep.distill.conditions import Branch, Condition, Layout
from fewstep.distill.lora import LoraSetting
from fewstep.distill.method import METHODS
from fewstep.distill.role_kinds import Adapter, FullCopy
from fewstep.distill.roles import Roles
from fewstep.distill.rollout import Rollout
from fewstep.distill.schedule import Counters
from fewstep.distill.sources import Batch
from fewstep.distill.team import Team
from fewstep.samplers import InputError
from fewstep.samplers.prediction import Sample

PROCESS = replace(VP, prediction=Sample())
MEAN, STD = 0.7, 0.5
LAYOUT = Layout(
    "Pipeline", "network", "x", "t", 1.0, False, "float64", "float32", (256,), None, False, None, 1.0, ("cond",), False
)


class GaussianNet(nn.Module):
    """E[x0 | x_t] of Gaussian data; the answer to x_t is amplified by a factor of its own for noisy and clean times."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(MEAN)), nn.Parameter(torch.tensor(STD).log())
        self.gain = nn.Parameter(torch.zeros(2))

    def forward(self, x, t, return_dict):
        alpha, sigma = (level(t).float()[:, None] for level in (VP.alpha, VP.sigma))
        variance = (2 * self.log_std).exp()
        answer = alpha * variance / (alpha**2 * variance + sigma**2) * self.gain[(t > 700).long()].exp()[:, None]
        return (self.mean + answer * (x - alpha * self.mean),)


def trained(method, turns, rate):
    """The team after some turns; the student begins as another law than the teacher's, the fake as the teacher."""
    torch.manual_seed(0)
    team = Team(Roles(GaussianNet(), method.kinds(FullCopy(), GaussianNet())), PROCESS)
    with torch.no_grad():
        student = team.trainable("student")
        student["mean"].fill_(-0.3)
        student["gain"].copy_(torch.tensor([1.8, 6.5]))
    schedule, counters = method.turns(), Counters()
    optimisers = {
        role: torch.optim.Adam(team.trainable(role).values(), rate, betas=(0.5, 0.9)) for role in schedule.roles
    }
    batch = Batch(torch.arange(8), Condition(LAYOUT, 8, Branch({}, frozenset())))
    for turn in range(turns):
        updates = schedule.updates(counters)
        moment = replace(moment_of(updates, counters.turn), positions=range(8))
        for loss in method.losses(batch, team, moment):
            loss.value.mean().backward(inputs=list(team.trainable(loss.role).values()))
        optimisers["student"].param_groups[0]["lr"] = rate * (1 - turn / turns)
        for role in updates:
            optimisers[role].step()
            optimisers[role].zero_grad()
        counters = schedule.after(counters)
    return team


def law_of(team, times):
    """Mean and standard deviation of the student's samples."""
    condition = Condition(LAYOUT, 64, Branch({}, frozenset()))
    noise = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    made = Rollout(PROCESS, times)(team.denoiser("student", condition), noise, lambda: noise, "none")
    return float(made.mean()), float(made.std())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swiftbrush", {"fake_rank": 0}),
        ("sim", {}),
        ("sim", {"loss": "sid"}),
        ("dmd2", {"gan_weight": 0.0, "student_steps": 1}),
    ],
    ids=["swiftbrush", "sim", "sid", "dmd2"],
)
def test_the_students_law_becomes_the_teachers(name, options):
    """Student and fake are Gaussian throughout, so that the only law without a gap is the data's."""
    method = METHODS[name](fake_updates=3, **options)
    times = method.times(PROCESS)
    team = trained(method, 270, 0.05)
    begun = law_of(trained(method, 0, 0.05), times)
    assert abs(begun[0] - MEAN) > 0.5
    assert abs(begun[1] - STD) > 0.5
    mean, std = law_of(team, times)
    assert mean == pytest.approx(MEAN, abs=0.05)
    assert std == pytest.approx(STD, abs=0.05)


def exits(method, positions, turn):
    """How often the student was asked before the losses of a turn."""
    team, calls = team_of(method, False), []
    with team.roles.use("student", frozen=True) as network:
        network.register_forward_hook(lambda *given: calls.append(given))
    moment = replace(moment_of(("fake",), turn), positions=positions)
    next(method.losses(TinySource().batch(0, positions), team, moment))
    return len(calls)


def test_dmd2_rolls_out_to_a_random_step_that_all_processes_share():
    method = METHODS["dmd2"](student_steps=3, gan_weight=0.0)
    counts = [exits(method, range(2), turn) for turn in range(8)]
    assert counts == [exits(method, range(2, 4), turn) for turn in range(8)]
    assert set(counts) == {1, 2, 3}


def test_dmd2_asks_for_data_only_with_an_adversary():
    assert METHODS["dmd2"]().needs == "data"
    plain = METHODS["dmd2"](gan_weight=0.0)
    assert plain.needs == "conditions"
    assert set(plain.turns().roles) == {"fake", "student"}
    moment = moment_of(("fake", "student"))
    batch = replace(TinySource().batch(0, moment.positions), x0=None)
    assert [loss.role for loss in plain.losses(batch, team_of(plain, False), moment)] == ["student", "fake"]
    assert [stage.cycle.count(("fake",)) for stage in plain.turns().stages] == [4]


def test_the_discriminator_learns_at_a_rate_of_its_own():
    assert METHODS["dmd2"](fake_rate=2.0, disc_rate=5.0).turns().rates == {"fake": 2.0, "disc": 5.0}
    assert METHODS["dmd2"](disc_rate=5.0, gan_weight=0.0).turns().rates == {"fake": 1.0}
    assert METHODS["adversarial-consistency"](disc_rate=5.0).turns().rates == {"disc": 5.0}


@pytest.mark.parametrize("name", ["dmd2", "adversarial-consistency"])
def test_the_discriminator_looks_through_so_much_noise_and_no_more(name):
    method = method_of(name).model_copy(update={"disc_noise": 0.3})
    team, moment = team_of(method, False), moment_of(("disc", "student"), rows=64)
    batch, asked = TinySource().batch(0, moment.positions), []
    adversary = method.adversary(batch, team, moment)
    with team.roles.use("teacher", frozen=True) as network:
        network.register_forward_hook(
            lambda module, args, kwargs, output: asked.append(kwargs["timestep"]), with_kwargs=True
        )
    adversary.discriminator(batch.x0, batch.x0 + 1)
    adversary.student(batch.x0)
    assert len(asked) == 3
    assert torch.equal(*asked[:2]), "what is compared is under the same noise level"
    for times in asked:
        assert 200 < times.max() <= 0.3 * 999


def test_dmd2s_plan_is_its_rollout():
    method = METHODS["dmd2"]()
    assert method.times(VP) == (999.0, 749.0, 499.0, 249.0)
    assert method.plan(VP, 2).to_json()["grid"]["timesteps"] == [999.0, 749.0]
    with pytest.raises(InputError, match="dmd2 trains a student of 1 to 4 steps; it cannot be sampled in 5"):
        method.plan(VP, 5)
    with pytest.raises(InputError, match=r"student_times go from noise to data; got \[499.0, 999.0\]"):
        METHODS["dmd2"](student_times=(499.0, 999.0)).plan(VP, 2)
    with pytest.raises(
        InputError, match="the first time is 500, but pipelines of this process start from the noise of"
    ):
        METHODS["dmd2"](student_times=(500.0,)).plan(FLOW, 1)


@pytest.mark.parametrize("name", ["swiftbrush", "sim", "mmd"])
def test_other_numbers_of_steps_are_refused(name):
    trained_for = {"mmd": 2}.get(name, 1)
    with pytest.raises(InputError, match=f"{name} trains a student of {trained_for} steps?; it cannot be sampled in 3"):
        method_of(name).plan(VP, 3)


def test_the_fake_is_held_as_the_student_or_as_the_rank_says():
    student, network = Adapter(LoraSetting(2, 3.0)), GaussianNet()
    assert METHODS["sim"]().kinds(student, network)["fake"] == student
    assert METHODS["sim"](fake_rank=0).kinds(student, network)["fake"] == FullCopy()
    assert METHODS["swiftbrush"]().kinds(FullCopy(), network)["fake"] == Adapter(LoraSetting(64, 64.0))


@pytest.mark.parametrize("guided", [True, False])
def test_swiftbrushs_fake_learns_untold_where_it_is_guided(guided):
    method = METHODS["swiftbrush"](drop_rate=0.5, guided_fake=guided)
    condition = TinySource().batch(0, range(64)).condition
    told = method.told(condition, moment_of(("fake",), rows=64)).cond.inputs["class_labels"]
    untold = (told == condition.uncond.inputs["class_labels"]).float().mean()
    assert 0.3 < untold < 0.7 if guided else untold == 0


def test_the_match_of_adversarial_consistency_is_that_of_lcm():
    options = {"grid_steps": 10, "guidance_scale": (3.0,)}
    adversarial, plain = METHODS["adversarial-consistency"](gan_loss="softplus", **options), METHODS["lcm"](**options)
    moment = moment_of(("student", "disc"))
    batch, team = TinySource().batch(0, moment.positions), team_of(adversarial, False)
    jump, disc = adversarial.losses(batch, team, moment)
    (match,) = plain.losses(batch, team, replace(moment, updates=("student",)))
    torch.testing.assert_close(jump.parts["match"], match.value)
    torch.testing.assert_close(jump.value, jump.parts["match"] + 0.1 * jump.parts["gan"])
    other = replace(batch, x0=batch.x0 + 1)
    assert not torch.equal(list(adversarial.losses(other, team, moment))[1].value, disc.value)


def test_mmd_has_the_same_gradient_with_its_steps_recomputed():
    gradients = []
    for again in (False, True):
        method = METHODS["mmd"](student_steps=3, checkpoint_steps=again)
        team, moment = team_of(method, True), moment_of(("student",))
        (loss,) = method.losses(TinySource().batch(0, moment.positions), team, moment)
        gradients.append(torch.autograd.grad(loss.value.mean(), list(team.trainable("student").values())))
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
