"""The aligner part, and the fit of its ratios against a plain loop."""

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from tiny import TINY, call_arguments, generators, tiny_dit, tiny_scheduler, tiny_unet

from fewstep.samplers import (
    ConstantGuidance,
    DiffusersSolver,
    InputError,
    Plan,
    PlanWarning,
    SpacingGrid,
    attach,
    fingerprint,
)
from fewstep.samplers.aligner import Aligner
from fewstep.search.aligner import fit_aligner

RATIOS = (1.01, 0.98, 1.03, 0.95)
TIMES = (999, 749, 499, 249)
FOUR = SpacingGrid(steps=4, spacing="trailing")


@pytest.mark.parametrize("name", TINY)
def test_ratios_of_one_are_bit_identical(name):
    pipe = TINY[name]()
    plain = pipe(**call_arguments(pipe), num_inference_steps=4).images
    with attach(pipe, Plan(conditioning=Aligner(ratios=(1.0,) * 4))):
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, plain)


class Ddim:
    """DDIM of a v-network by hand, which can be told another time than the step's."""

    def __init__(self, pipe):
        self.table = pipe.scheduler.alphas_cumprod

    def eps(self, x, t, told):
        a, s = self.table[t].sqrt(), (1 - self.table[t]).sqrt()
        return a * self.network(x, told) + s * x

    def step(self, x, index, told):
        t = TIMES[index]
        a, s = self.table[t].sqrt(), (1 - self.table[t]).sqrt()
        v = self.network(x, told)
        end = self.table[TIMES[index + 1]] if index + 1 < len(TIMES) else torch.tensor(1.0)
        return end.sqrt() * (a * x - s * v) + (1 - end).sqrt() * (a * v + s * x)

    def noised(self, clean, noise, t):
        return self.table[t].sqrt() * clean + (1 - self.table[t]).sqrt() * noise


class UNetByHand(Ddim):
    def __init__(self, pipe):
        super().__init__(pipe)
        self.network = lambda x, told: pipe.unet(x, torch.as_tensor(told).expand(len(x))).sample


class DiTByHand(Ddim):
    """Guided at 3; sample i has class i % 10."""

    def __init__(self, pipe):
        super().__init__(pipe)
        self.transformer, self.index = pipe.transformer, None

    def network(self, x, told):
        labels = torch.tensor([position % 10 for position in self.index] + [1000] * len(x))
        told = torch.as_tensor(told).expand(2 * len(x))
        cond, null = self.transformer(torch.cat([x, x]), timestep=told, class_labels=labels).sample.chunk(2)
        return null + 3.0 * (cond - null)


def test_is_ddim_by_hand_told_other_times():
    pipe = tiny_unet()
    with attach(pipe, Plan(grid=FOUR, conditioning=Aligner(ratios=RATIOS))):
        got = pipe(batch_size=2, generator=generators(2), output_type="np").images
    x, hand = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in generators(2)]), UNetByHand(pipe)
    with torch.no_grad():
        for index, (t, ratio) in enumerate(zip(TIMES, RATIOS, strict=True)):
            x = hand.step(x, index, t * ratio)
    np.testing.assert_allclose(got, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=2e-5)


def fitted_by_hand(hand, samples, mode, iterations, batch, lr, seed):
    """The paper's algorithm as a plain loop; returns the ratios."""
    generator = torch.Generator().manual_seed(seed)
    ratios = [torch.ones((), requires_grad=True) for _ in TIMES[:-1]]
    optimizers = [torch.optim.Adam([ratio], lr=lr) for ratio in ratios]

    def learn(index, clean, noise):
        with torch.no_grad():
            if mode == "parallel":
                x = hand.noised(clean, noise, TIMES[index])
            else:
                x = hand.noised(clean, noise, TIMES[0])
                for before in range(index):
                    x = hand.step(x, before, TIMES[before] * ratios[before])
            wanted = hand.eps(x, TIMES[index], float(TIMES[index]))
        landed = hand.step(x, index, TIMES[index] * ratios[index])
        found = hand.eps(landed, TIMES[index + 1], float(TIMES[index + 1]))
        loss = (wanted - found).square().flatten(1).sum(1).mean()
        (ratios[index].grad,) = torch.autograd.grad(loss, ratios[index])
        optimizers[index].step()

    def draw():
        hand.index = torch.randperm(len(samples), generator=generator)[:batch].tolist()
        clean = samples[hand.index]
        return clean, torch.randn(clean.shape, generator=generator)

    if mode == "parallel":
        for _ in range(iterations):
            clean, noise = draw()
            for index in range(len(ratios)):
                learn(index, clean, noise)
    else:
        for index in range(len(ratios)):
            for _ in range(iterations):
                learn(index, *draw())
    return [float(ratio.detach()) for ratio in ratios]


def labelled(index):
    return {"class_labels": [position % 10 for position in index], "guidance_scale": 3.0}


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize(
    ("make", "by_hand", "call", "shape"),
    [(tiny_unet, UNetByHand, None, (12, 1, 8, 8)), (tiny_dit, DiTByHand, labelled, (12, 4, 4, 4))],
    ids=["unconditional", "guided"],
)
def test_the_fit_is_the_papers_loop(mode, make, by_hand, call, shape):
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pipe = make()
    plan = Plan(grid=FOUR)
    options = {"iterations": 3, "batch": 3, "lr": 0.02, "seed": 5}
    fitted = fit_aligner(pipe, plan, samples=samples, mode=mode, call=call, **options)
    by_loop = fitted_by_hand(by_hand(pipe), samples, mode, **options)
    np.testing.assert_allclose(fitted.conditioning.ratios, [*by_loop, 1.0], atol=2e-4)
    assert max(abs(ratio - 1) for ratio in by_loop) > 0.02
    again = fit_aligner(pipe, plan, samples=samples, mode=mode, call=call, **options)
    assert again == fitted
    network = getattr(pipe, "transformer", None) or pipe.unet
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_a_fit_says_what_it_is_for_and_leaves_the_pipeline_as_it_was():
    pipe = tiny_unet()
    before, grad = dict(vars(pipe)), torch.is_grad_enabled()
    plan = Plan(solver=DiffusersSolver(scheduler="DPMSolverMultistepScheduler"), grid=FOUR)
    samples = torch.randn(4, 1, 8, 8)
    seen = []
    fitted = fit_aligner(
        pipe, plan, samples=samples, iterations=2, batch=2, progress=lambda *what: seen.append(what), mode="parallel"
    )
    assert vars(pipe) == before
    assert torch.is_grad_enabled() == grad
    assert [(done, total) for done, total, _ in seen] == [(done, 6) for done in range(1, 7)]
    part, tuned = fitted.conditioning, fitted.tuned_for
    assert (part.solver, part.guidance, len(part.ratios)) == ("DPMSolverMultistepScheduler", None, 4)
    assert (tuned.fingerprint, tuned.pipeline, tuned.steps) == (fingerprint(pipe.unet), "DDIMPipeline", 4)
    assert Plan.from_json(fitted.to_json()) == fitted
    with pytest.warns(PlanWarning, match="were fitted with DPMSolverMultistepScheduler, not with DDIMScheduler"):
        attach(pipe, fitted.model_copy(update={"solver": None})).detach()


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_fit_finds_the_best_ratio_of_a_linear_network(mode, monkeypatch):
    """A network that predicts the noise k(t) x: the noise is the same after the step where k(t r) solves a line."""
    pipe = tiny_unet(scheduler=tiny_scheduler(prediction_type="epsilon"))

    def answer(sample, timestep, **_):
        k = 0.6 + 0.0004 * torch.as_tensor(timestep, dtype=torch.float32).expand(len(sample))
        return UNet2DOutput(sample=k[:, None, None, None] * sample)

    monkeypatch.setattr(pipe.unet, "forward", answer)
    plan = Plan(grid=SpacingGrid(steps=2, spacing="trailing"))
    fitted = fit_aligner(pipe, plan, samples=torch.randn(4, 1, 8, 8), mode=mode, iterations=60, batch=4, lr=4e-3)
    table = pipe.scheduler.alphas_cumprod.double()
    (a, s), (a_next, s_next) = ((table[t].sqrt(), (1 - table[t]).sqrt()) for t in (999, 499))
    carried, of_noise = a_next / a, s_next - s * a_next / a  # x_next = carried x + of_noise eps
    best = ((0.6 + 0.0004 * 999) / (0.6 + 0.0004 * 499) - carried) / of_noise
    ratio = float((best - 0.6) / 0.0004 / 999)
    assert 0.97 < ratio < 0.99
    assert fitted.conditioning.ratios == pytest.approx((ratio, 1.0), abs=1e-3)


def test_guidance_of_the_plan_is_written_down_and_another_one_warns():
    pipe = tiny_dit()
    plan = Plan(grid=FOUR, guidance=ConstantGuidance(scale=2.5))
    samples = torch.randn(4, 4, 4, 4)
    fitted = fit_aligner(
        pipe, plan, samples=samples, iterations=1, batch=2, call=lambda index: {"class_labels": [1] * len(index)}
    )
    assert fitted.conditioning.guidance == 2.5
    with pytest.warns(PlanWarning, match=r"were fitted at guidance 2\.5, not at 4; fit them again"):
        attach(pipe, fitted.model_copy(update={"guidance": ConstantGuidance(scale=4)})).detach()


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("unet", {"grid": SpacingGrid(steps=3)}, "has 4 ratios and the grid 3 steps; fit it again"),
        ("unet", {"solver": DiffusersSolver(scheduler="HeunDiscreteScheduler")}, "HeunDiscreteScheduler evaluates the"),
        ("unet", {"solver": DiffusersSolver(scheduler="PNDMScheduler")}, "needs a solver with one evaluation a step"),
        ("unet", {"solver": DiffusersSolver(scheduler="EDMEulerScheduler")}, "EDMSchedule has other times"),
    ],
)
def test_what_cannot_work_is_refused(name, plan, message):
    with pytest.raises(InputError, match=message):
        attach(TINY[name](), Plan(**plan, conditioning=Aligner(ratios=RATIOS)))


def test_bad_ratios():
    with pytest.raises(InputError, match="ratios must be positive; got -1 at index 1"):
        Plan.from_json({"fewstep_plan": 1, "conditioning": {"type": "aligner", "ratios": [1, -1]}})


@pytest.mark.parametrize(
    ("pipe", "plan", "options", "message"),
    [
        (tiny_unet, Plan(), {}, "an aligner is fitted on a grid of at least 2 steps; the plan has no grid"),
        (tiny_unet, Plan(grid=FOUR), {"mode": "both"}, "mode is 'sequential' or 'parallel'; got 'both'"),
        (tiny_unet, Plan(grid=FOUR), {"batch": 9}, "takes at least 9 floating point samples and 1 iteration; got 4"),
        (tiny_dit, Plan(grid=FOUR), {"batch": 2}, "DiTPipeline takes no batch_size; give call="),
        (tiny_unet, Plan(grid=FOUR), {"batch": 2, "samples": torch.zeros(4, 1, 4, 4)}, "as the network sees them"),
    ],
)
def test_a_fit_that_cannot_start_says_why(pipe, plan, options, message):
    with pytest.raises(InputError, match=message):
        fit_aligner(pipe(), plan, **({"samples": torch.zeros(4, 1, 8, 8)} | options))


def test_a_scheduler_that_takes_more_steps_is_found_in_the_call():
    pipe = tiny_unet(scheduler=tiny_scheduler())
    with attach(pipe, Plan(conditioning=Aligner(ratios=RATIOS))):
        pipe.scheduler.set_timesteps = lambda *args, **kwargs: None
        pipe.scheduler.timesteps, pipe.scheduler.num_inference_steps = torch.arange(900, 0, -100), 9
        with pytest.raises(InputError, match="has 4 ratios and the scheduler takes more steps"):
            pipe(batch_size=1)
