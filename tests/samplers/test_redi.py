"""ReDi: retrieval, the landing it gives, the forgotten history, and what does not fit."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    IPNDMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file
from tiny import call_arguments, generators, tiny_dit, tiny_unet

from fewstep.samplers import (
    ConstantGuidance,
    DiffusersSolver,
    ExplicitGrid,
    InputError,
    Plan,
    PlanWarning,
    SpacingGrid,
    attach,
    fingerprint,
)
from fewstep.samplers.build_knowledge import build_knowledge_base
from fewstep.samplers.explicit import grid_adapter
from fewstep.samplers.history import forget_history
from fewstep.samplers.knowledge import HEADER_BYTES, KnowledgeBase
from fewstep.samplers.process import Process
from fewstep.samplers.redi import ReDi
from fewstep.samplers.wrapped import wrap_scheduler

TIMES = (999.0, 799.0, 399.0, 199.0)
DPMPP = DiffusersSolver(scheduler="DPMSolverMultistepScheduler")


def plan(solver=DPMPP, times=TIMES, **options):
    start = ReDi(**({"key_step": 2, "condition": "class_labels"} | options))
    return Plan(solver=solver, grid=ExplicitGrid(timesteps=times), start=start)


def calls(pipe, count, batch=4, first=100):
    return [call_arguments(pipe, batch=batch, seed=first + batch * index) for index in range(count)]


MULTISTEP = [
    DPMSolverMultistepScheduler(solver_order=3, lower_order_final=False),
    DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    DPMSolverSinglestepScheduler(),
    UniPCMultistepScheduler(solver_order=3),
    DEISMultistepScheduler(),
    SASolverScheduler(),
    LMSDiscreteScheduler(),
    PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True),
    IPNDMScheduler(),
    EDMDPMSolverMultistepScheduler(),
]


def stepped(scheduler, grid, start, states, forget_at=None):
    """Where steps of fixed outputs land, from position ``start`` of the grid; ``states`` replaces the first state."""
    wrap_scheduler(scheduler, grid_adapter(scheduler, grid))
    scheduler.set_timesteps(len(grid))
    x, generator, landed = states["x"], torch.Generator(), []
    times = scheduler.timesteps.tolist()
    begin = next(index for index, time in enumerate(times) if abs(time - grid[start]) < 1e-4)
    for index in range(begin, len(times)):
        if index == states["jump"](times):
            x = states["value"]
            if forget_at:
                forget_history(scheduler)
        getattr(scheduler, "init_noise_sigma", None)  # x is in the scheduler's state space
        scheduler.scale_model_input(x, scheduler.timesteps[index])
        options = {"generator": generator.manual_seed(index)} if "SASolver" in type(scheduler).__name__ else {}
        if getattr(scheduler.config, "algorithm_type", "").startswith("sde"):
            options = {"generator": generator.manual_seed(index)}
        output = torch.sin(3 * x + times[index])
        x = scheduler.step(output, scheduler.timesteps[index], x, **options).prev_sample
        landed.append(x)
    return landed


@pytest.mark.parametrize("scheduler", MULTISTEP, ids=lambda scheduler: type(scheduler).__name__)
def test_after_forgetting_the_steps_are_those_of_a_fresh_scheduler(scheduler):
    """Forgotten in the middle of a grid, and a fresh scheduler that starts there: every later step is the same."""
    edm, quarter = "EDM" in type(scheduler).__name__, "IPNDM" in type(scheduler).__name__
    grid = (950.0, 820.0, 600.0, 431.0, 250.0, 102.0, 14.0)
    grid = tuple(t / 1000 for t in grid) if edm or quarter else grid
    draw = torch.Generator().manual_seed(0)
    states = {"x": torch.randn(2, 3, generator=draw), "value": torch.randn(2, 3, generator=draw)}
    states["jump"] = lambda times: next(i for i, time in enumerate(times) if abs(time - grid[3]) < 1e-4)

    def fresh():
        return type(scheduler).from_config(scheduler.config)

    forgotten = stepped(fresh(), grid, 0, states, forget_at=True)[-4:]
    remembered = stepped(fresh(), grid, 0, states)[-4:]
    if isinstance(scheduler, LMSDiscreteScheduler):  # takes a wrong order when it starts inside its grid
        anew = stepped(fresh(), grid[3:], 0, states)
    else:
        anew = stepped(fresh(), grid, 3, states)
    assert not torch.allclose(remembered[0], anew[0], atol=1e-3)  # there was something to forget
    for ours, theirs in zip(forgotten, anew, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_first_step_after_forgetting_is_ddims():
    """The first-order step of every deterministic VP solver for noise is DDIM's landing."""
    grid, draw = (950.0, 820.0, 600.0, 431.0, 250.0), torch.Generator().manual_seed(0)
    states = {"x": torch.randn(2, 3, generator=draw), "value": torch.randn(2, 3, generator=draw)}
    states["jump"] = lambda times: times.index(431.0)
    for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler, LMSDiscreteScheduler):
        scheduler = cls()
        process = Process.from_scheduler(scheduler)
        landed = stepped(scheduler, grid, 0, states, forget_at=True)[3]
        here, there = process.scheduler_state_scale(431.0), process.scheduler_state_scale(250.0)
        output = torch.sin(3 * states["value"] + 431.0)
        expected = process.jump((states["value"] / here).float(), 431.0, 250.0, out=output) * there
        torch.testing.assert_close(landed, expected.float(), rtol=1e-5, atol=1e-5)


def test_what_cannot_forget():
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(5)
    forget_history(scheduler)  # nothing to forget yet
    scheduler.step(torch.zeros(1), scheduler.timesteps[0], torch.zeros(1))
    with pytest.raises(InputError, match="PNDMScheduler on its own even grid cannot forget its history; move a point"):
        forget_history(scheduler)
    with pytest.raises(InputError, match="CogVideoXDPMScheduler has its history from the pipeline"):
        forget_history(CogVideoXDPMScheduler())
    ddim = DDIMScheduler()
    before = dict(vars(ddim))
    forget_history(ddim)
    assert vars(ddim).keys() == before.keys()


def base_of(keys, values, labels=None, grid=TIMES[:3], weights=""):
    return KnowledgeBase(keys.half(), values.half(), labels, grid, weights)


def test_the_nearest_are_those_of_all_distances():
    draw = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(300, 2, 3, 3, generator=draw) + 4, torch.randn(7, 2, 3, 3, generator=draw) + 4
    labels, of = torch.arange(300) % 3, torch.arange(7) % 3
    base = base_of(keys, keys, labels)
    distance = torch.cdist(queries.double().flatten(1), base.keys.double().flatten(1))
    assert torch.equal(base.nearest(queries, None, 5), distance.topk(5, largest=False).indices)
    distance[of[:, None] != labels] = torch.inf
    found = base.nearest(queries, of, 5)
    assert torch.equal(found, distance.topk(5, largest=False).indices)
    assert torch.equal(base.nearest(base.keys[40:44], None, 1)[:, 0], torch.arange(40, 44))


def test_the_nearest_do_not_depend_on_the_chunk(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    base, queries = base_of(*torch.randn(2, 50, 8, generator=draw)), torch.randn(4, 8, generator=draw)
    whole = base.nearest(queries, None, 3)
    monkeypatch.setattr("fewstep.samplers.knowledge._CHUNK", 28)
    assert torch.equal(base.nearest(queries, None, 3), whole)
    with pytest.raises(InputError, match="fewer than 51 trajectories for a query; build a larger one"):
        base.nearest(queries, None, 51)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_a_hand_written_ddim_loop_with_retrieval(neighbours):
    """Network, solver and landing written out; DDIM, so that no history is in it."""
    pipe, times = tiny_unet(), [999.0, 700.0, 300.0, 100.0, -1.0]
    draw = torch.Generator().manual_seed(7)
    base = base_of(*torch.randn(2, 20, 1, 8, 8, generator=draw), grid=(999.0, 700.0, 300.0))
    the_plan = plan(None, tuple(times[:-1]), condition=None, neighbours=neighbours)
    with attach(pipe, the_plan, {"knowledge_base": base}) as handle:
        images = pipe(**call_arguments(pipe, batch=3)).images
    assert handle.stats.nfe == 4
    process = Process.from_scheduler(pipe.scheduler)
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators(3)])
    for here, there in pairwise(times):
        with torch.no_grad():
            output = pipe.unet(x, int(here)).sample
        x0, eps = process.to_x0(output, x, here), process.to_eps(output, x, here)
        if here == 700.0:
            found = []
            for key in x0.flatten(1):
                index = (base.keys.float().flatten(1) - key).norm(dim=1).argsort()[:neighbours]
                keys, values = base.keys[index].double().flatten(1), base.values[index].double().flatten(1)
                weights = (
                    torch.linalg.lstsq(keys.T, key.double()).solution if neighbours > 1 else torch.ones(1).double()
                )
                found.append((weights @ values).reshape(1, 8, 8))
            x0 = torch.stack(found).float()
        x = process.jump(x, here, there, x0=x0, eps=eps)
    np.testing.assert_allclose(images, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=2e-5)


def test_the_base_holds_what_the_trajectories_predicted():
    """Grid, keys and values against trajectories sampled here; budget to the byte; file and back."""
    pipe, guided = tiny_dit(), ConstantGuidance(scale=2.0)
    each, room = 2 * 2 * 64 + 8, 6
    the_plan = plan(max_bytes=HEADER_BYTES + room * each + each - 1).model_copy(update={"guidance": guided})
    base = build_knowledge_base(pipe, the_plan, calls(pipe, 3), detail_steps=2)
    assert (len(base.keys), base.nbytes, base.grid) == (room, room * each, TIMES[:3])
    assert base.labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert base.weights == fingerprint(pipe.transformer)
    seen = {}
    detailed = Plan(solver=DPMPP, grid=ExplicitGrid(timesteps=(999, 799, 599, 399)), guidance=guided)
    with attach(pipe, detailed):
        step = type(pipe.scheduler).step

        def watch(scheduler, output, timestep, sample, **options):
            seen[int(timestep)] = Process.from_scheduler(scheduler).to_x0(output, sample, float(timestep))
            return step(scheduler, output, timestep, sample, **options)

        type(pipe.scheduler).step = watch
        pipe(**calls(pipe, 1)[0])
    torch.testing.assert_close(base.keys[:4].float(), seen[799][:4], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(base.values[:4].float(), seen[399][:4], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_batch_is_its_single_images_within_their_classes(guidance):
    """With and without stacked branches; what is retrieved is of the class, and of another image for another class."""
    pipe = tiny_dit()
    the_plan = plan().model_copy(update={"guidance": ConstantGuidance(scale=guidance)})
    base = build_knowledge_base(pipe, the_plan, calls(pipe, 3))
    resources = {"knowledge_base": base}
    with attach(pipe, the_plan, resources) as handle:
        both = pipe(**call_arguments(pipe, batch=3)).images
        assert handle.stats.nfe == (8 if guidance > 1 else 4)
        for index in range(3):
            own = {"class_labels": [index], "generator": generators(1, index), "output_type": "np"}
            np.testing.assert_allclose(pipe(**own).images[0], both[index], atol=1e-5)
        with pytest.raises(InputError, match=r"does not have all classes of this call, \[.*7"):
            pipe(class_labels=[7, 1], generator=generators(2), output_type="np")
    with attach(pipe, the_plan.model_copy(update={"start": None})):
        assert np.abs(pipe(**call_arguments(pipe, batch=3)).images - both).max() > 1e-3


def test_a_stochastic_solver_whose_stacked_samples_differ():
    """After a step each branch of guidance has noise of its own; the pipeline keeps the first."""
    pipe = tiny_dit()
    solver = DiffusersSolver(scheduler="DPMSolverMultistepScheduler", config={"algorithm_type": "sde-dpmsolver++"})
    the_plan = plan(solver).model_copy(update={"guidance": ConstantGuidance(scale=2.0)})
    base = build_knowledge_base(pipe, the_plan, calls(pipe, 1, batch=10))
    images = []
    for _ in range(2):
        with attach(pipe, the_plan, {"knowledge_base": base}):
            images.append(pipe(**call_arguments(pipe) | {"generator": torch.Generator().manual_seed(1)}).images)
    np.testing.assert_array_equal(images[0], images[1])


def test_the_solver_goes_on_as_if_it_had_started_at_the_value_time():
    """The images are those of the rest of the grid, sampled alone from the state where the retrieval landed."""
    pipe = tiny_unet()
    base = base_of(*torch.randn(2, 5, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    landed = []
    handle = attach(pipe, plan(condition=None), {"knowledge_base": base})
    hook = handle._run.hooks[0]

    def made():
        retrieval = hook()
        after = retrieval.after_step

        def watch(step):
            after(step)
            landed.append(step.x_next)

        retrieval.after_step = watch
        return retrieval

    handle._run.hooks[0] = made
    with handle:
        images = pipe(**call_arguments(pipe)).images
    scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    wrap_scheduler(scheduler, grid_adapter(scheduler, TIMES[2:]))
    scheduler.set_timesteps(2)
    x = landed[1]
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    np.testing.assert_allclose(images, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_the_file_beside_the_plan(tmp_path):
    pipe, the_plan = tiny_dit(), plan(max_bytes=HEADER_BYTES + 24 * 264)
    base = build_knowledge_base(pipe, the_plan, calls(pipe, 2, batch=12))
    the_plan.save(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"the redi part names 'knowledge.safetensors', which is not in"):
        attach(pipe, Plan.load(tmp_path / "plan.json"))
    path = tmp_path / "knowledge.safetensors"
    base.save(path)
    assert path.stat().st_size <= the_plan.start.max_bytes
    again = KnowledgeBase.load(path)
    for name in ("keys", "values", "labels"):
        assert torch.equal(getattr(again, name), getattr(base, name))
    assert (again.grid, again.weights) == (base.grid, base.weights)
    with attach(pipe, the_plan, {"knowledge_base": base}) as handle:
        assert handle.warnings == ()
        expected = pipe(**call_arguments(pipe)).images
    with attach(pipe, Plan.load(tmp_path / "plan.json")):
        np.testing.assert_array_equal(pipe(**call_arguments(pipe)).images, expected)
    plan(max_bytes=HEADER_BYTES).save(tmp_path / "small.json")
    with pytest.raises(InputError, match=f"has {path.stat().st_size} bytes; the redi part allows {HEADER_BYTES}"):
        attach(pipe, Plan.load(tmp_path / "small.json"))
    save_file({"keys": torch.zeros(1)}, path, {"format": "fewstep-knowledge-base-1", "grid": json.dumps([1, 2])})
    with pytest.raises(InputError, match="holds no knowledge base; make it with build_knowledge_base"):
        attach(pipe, Plan.load(tmp_path / "plan.json"))


def refused_in_attach(the_plan=None, base=None):
    base = base or base_of(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))
    attach(tiny_dit(), the_plan or plan(condition=None), {"knowledge_base": base})


def built(**options):
    pipe = tiny_dit()
    return build_knowledge_base(pipe, plan(**options), calls(pipe, 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: refused_in_attach(plan(times=(999, 700, 399), condition=None)), r"got \[999.0, 700.0, 399.0\]; build"),
        (lambda: refused_in_attach(plan(key_step=1, condition=None)), "for key_step 2; the redi part has 1"),
        (lambda: refused_in_attach(plan()), "has no labels; leave condition 'class_labels' out"),
        (lambda: refused_in_attach(base=3), "is int; give a KnowledgeBase"),
        (lambda: built(times=(999, 799)), "key_step 2 leaves no value time in a grid of 2 points; lower it"),
        (lambda: built(condition="label"), "takes no class labels as 'label'; its inputs are hidden_states, timestep"),
        (lambda: built(max_bytes=HEADER_BYTES), "one trajectory takes 264 bytes and the file's header 4096; raise"),
        (lambda: build_knowledge_base(tiny_dit(), Plan(), []), "start is a redi part; got None"),
        (lambda: build_knowledge_base(tiny_dit(), plan(), []), "at least one call of the pipeline; got none"),
        (lambda: build_knowledge_base(tiny_dit(), plan(), [], detail_steps=0), "at least 1; got 0"),
        (
            lambda: build_knowledge_base(tiny_dit(), plan().model_copy(update={"grid": SpacingGrid(steps=4)}), []),
            "give the plan a grid of type explicit or rule",
        ),
        (lambda: base_of(torch.zeros(2, 3), torch.zeros(3, 3)), "not of one size; build it again"),
        (lambda: base_of(torch.full((2, 3), 1e6), torch.zeros(2, 3)), "not finite in half precision"),
        (lambda: base_of(torch.zeros(0, 3), torch.zeros(0, 3)), "is empty"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_calls_that_do_not_fit_the_base():
    pipe = tiny_dit()
    small = base_of(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    with (
        attach(pipe, plan(condition=None), {"knowledge_base": small}),
        pytest.raises(InputError, match=r"samples \(4, 2, 2\), this call's are \(4, 4, 4\); build one at this"),
    ):
        pipe(**call_arguments(pipe))
    fits = base_of(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4))
    with (
        attach(
            pipe, plan(DiffusersSolver(scheduler="HeunDiscreteScheduler"), condition=None), {"knowledge_base": fits}
        ),
        pytest.raises(InputError, match="HeunDiscreteScheduler evaluates more than once at timestep 799"),
    ):
        pipe(**call_arguments(pipe))
    the_plan = Plan(grid=SpacingGrid(steps=3), start=ReDi(key_step=2))
    with (
        attach(pipe, the_plan, {"knowledge_base": fits}),
        pytest.raises(InputError, match=r"grid that starts \[999.0, 799.0, 399.0\]; got \[666.0, 333.0, 0.0\]"),
    ):
        pipe(**call_arguments(pipe))


def test_other_weights_warn():
    base = base_of(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), weights="0" * 64)
    with pytest.warns(PlanWarning, match="the knowledge base is of other weights"):
        attach(tiny_dit(), plan(condition=None), {"knowledge_base": base}).detach()
