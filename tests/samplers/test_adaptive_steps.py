"""Adaptive steps: each sample by the grid that the policy picks, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from test_attach import state_of
from tiny import TINY, call_arguments, generators, tiny_dit, tiny_stable_diffusion, tiny_unet

from fewstep.samplers import DiffusersSolver, ExplicitGrid, InputError, Plan, SpacingGrid, attach
from fewstep.samplers.adaptive_steps import AdaptiveSteps
from fewstep.samplers.escalate import Escalate
from fewstep.samplers.files import write_tensors
from fewstep.samplers.rule_grid import RuleGrid
from fewstep.samplers.step_policy import (
    embedding_features,
    label_keys,
    policy_logits,
    read_policy,
    write_policy,
)

SPACED = (
    SpacingGrid(steps=2, spacing="trailing"),
    SpacingGrid(steps=3, spacing="trailing"),
    SpacingGrid(steps=5, spacing="trailing"),
)
LISTED = (
    ExplicitGrid(timesteps=(999, 300)),
    RuleGrid(rule="power", steps=3),
    ExplicitGrid(timesteps=(999, 800.5, 600, 300, 20)),
)
TABLE = {"0": (1.0, 0.0, 0.0), "1": (0.0, 0.0, 2.0), "2": (0.0, 3.0, 0.0)}


def adaptive(grids=SPACED, **options):
    return AdaptiveSteps(grids=grids, **({"table": TABLE} | options))


def network(features, choices=3, hidden=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "mean": 0.1 * torch.randn(features, generator=draw),
        "std": torch.rand(features, generator=draw) + 0.5,
        "hidden.weight": torch.randn(hidden, features, generator=draw),
        "hidden.bias": torch.randn(hidden, generator=draw),
        "out.weight": torch.randn(choices, hidden, generator=draw),
        "out.bias": torch.zeros(choices),
    }


def row(arguments, index):
    """The call for one of its samples."""
    cut = {
        key: value[index : index + 1] if isinstance(value, list | torch.Tensor) else value
        for key, value in arguments.items()
    }
    return cut | ({"batch_size": 1} if "batch_size" in cut else {})


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("grid", [SpacingGrid(steps=3), ExplicitGrid(timesteps=(950, 400.5, 20))])
def test_one_grid_is_that_grid(name, grid):
    pipe = TINY[name]()
    images = []
    for part in (grid, AdaptiveSteps(grids=(grid,))):
        with attach(pipe, Plan(grid=part)) as handle:
            images.append(pipe(**call_arguments(pipe)).images)
        assert len(handle.stats.steps) == 3
    np.testing.assert_array_equal(*images)


@pytest.mark.parametrize("grids", [SPACED, LISTED], ids=["spaced", "listed"])
@pytest.mark.parametrize("solver", [None, "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_each_sample_of_a_batch_runs_its_grid(grids, solver):
    """Against each grid on its own; the batches differ in size, so up to rounding."""
    pipe = tiny_dit()
    before = state_of(pipe)
    solver = solver and DiffusersSolver(scheduler=solver)
    labels = [1, 0, 2, 1]
    call = {"class_labels": labels, "generator": generators(4), "output_type": "np"}
    with attach(pipe, Plan(solver=solver, grid=adaptive(grids))) as handle:
        images = pipe(**call).images
    assert [step.rows for step in handle.stats.steps] == [2] * 2 + [2] * 3 + [4] * 5
    assert handle.stats.nfe == 2 * (2 + 3 + 5 + 5) / 4
    for index, choice in enumerate((2, 0, 1, 2)):
        with attach(pipe, Plan(solver=solver, grid=grids[choice])):
            alone = pipe(class_labels=[labels[index]], generator=generators(1, first=index), output_type="np").images
        np.testing.assert_allclose(images[index], alone[0], atol=2e-5)
    assert state_of(pipe) == before


@pytest.mark.parametrize("grids", [SPACED, LISTED], ids=["spaced", "listed"])
def test_a_batch_of_one_class_is_bit_for_bit_its_grid(grids):
    pipe = tiny_dit()
    for label, choice in ((0, 0), (1, 2), (2, 1)):
        call = {"class_labels": [label] * 3, "output_type": "np"}
        with attach(pipe, Plan(grid=grids[choice])):
            expected = pipe(**call, generator=generators(3)).images
        with attach(pipe, Plan(grid=adaptive(grids))):
            np.testing.assert_array_equal(pipe(**call, generator=generators(3)).images, expected)


def test_no_grid_is_left_over_from_the_call_before():
    pipe = tiny_dit()
    with attach(pipe, Plan(grid=adaptive(LISTED))) as handle:
        call = {"class_labels": [1], "output_type": "np"}
        first = pipe(**call, generator=generators(1)).images
        with pytest.raises(InputError):
            pipe(**call, num_inference_steps=4)
        pipe(class_labels=[0, 2], generator=generators(2))
        np.testing.assert_array_equal(pipe(**call, generator=generators(1)).images, first)
        assert [step.timestep for step in handle.stats.steps] == [999, 800.5, 600, 300, 20]


@pytest.mark.parametrize("name", ["stable-diffusion", "sd3"])
def test_a_policy_over_embeddings(tmp_path, name):
    pipe = TINY[name]()
    call = call_arguments(pipe, batch=4)
    features = call["prompt_embeds"].mean(1)
    tensors = network(features.shape[1])
    write_policy(tmp_path / "policy.safetensors", tensors)
    grids = (SpacingGrid(steps=2), SpacingGrid(steps=3), SpacingGrid(steps=5))
    Plan(grid=AdaptiveSteps(grids=grids, policy="policy.safetensors")).save(tmp_path / "plan.json")
    hidden = ((features - tensors["mean"]) / tensors["std"]) @ tensors["hidden.weight"].T + tensors["hidden.bias"]
    logits = (hidden * hidden.sigmoid()) @ tensors["out.weight"].T + tensors["out.bias"]
    torch.testing.assert_close(policy_logits(tensors, features), logits)
    chosen = logits.argmax(1).tolist()
    assert len(set(chosen)) > 1
    with attach(pipe, Plan.load(tmp_path / "plan.json")) as handle:
        images = pipe(**call).images
    assert handle.stats.rows == 2 * sum((2, 3, 5)[choice] for choice in chosen)
    for index, choice in enumerate(chosen):
        with attach(pipe, Plan(grid=grids[choice])):
            alone = pipe(**row(call_arguments(pipe, batch=4), index)).images
        np.testing.assert_allclose(images[index], alone[0], atol=2e-5)


def test_a_policy_by_prompt():
    table = {"a cat": (1.0, 0.0, 0.0), "a dog": (0.0, 1.0, 0.0)}
    part = adaptive(table=table, condition="prompt")
    assert part.choose(["a dog", "a cat"], None) == [1, 0]
    assert part.choose("a dog", None) == [1]
    with pytest.raises(InputError, match="policy has no entry for 'a cow'; it knows a cat, a dog"):
        part.choose(["a cow"], None)


def test_conditions_as_keys_and_features():
    assert label_keys(torch.tensor([3, 1])) == ["3", "1"]
    assert label_keys([np.int64(2), "x"]) == ["2", "x"]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(embedding_features(x), x.mean(1))
    torch.testing.assert_close(embedding_features([x[0], x[1, :2]])[1], x[1, :2].mean(0))
    torch.testing.assert_close(embedding_features(x[0].half()), x[0].half().float())
    with pytest.raises(InputError, match=r"embeddings \(B, D\) or \(B, tokens, D\); got \(2, 3, 4, 1\)"):
        embedding_features(x[..., None])


def test_escalation_works_within_each_bucket():
    pipe = tiny_dit()
    seen = []

    def judge(samples, conditions):
        seen.append(conditions["class_labels"])
        return torch.tensor([float(label == 2) for label in conditions["class_labels"]])

    escalate = Escalate(teacher=Plan(grid=SpacingGrid(steps=4)), strength=0.5, threshold=0.5)
    with attach(pipe, Plan(grid=adaptive(), models=escalate), {"scorer": judge}) as handle:
        images = pipe(class_labels=[1, 0, 2], generator=generators(3), output_type="np").images
    assert seen == [[0], [2], [1]]
    assert [step.rows for step in handle.stats.steps] == [2] * 2 + [2] * 2 + [2] * 3 + [2] * 5 + [2] * 2
    with attach(pipe, Plan(grid=SPACED[2], models=escalate), {"scorer": judge}):
        alone = pipe(class_labels=[1], generator=generators(1), output_type="np").images
    np.testing.assert_allclose(images[0], alone[0], atol=2e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grids": SPACED[::-1]}, r"the grids must have more steps from one to the next; got \[5, 3, 2\]"),
        ({"grids": (SPACED[0], None)}, "grids with a number of steps; got null"),
        (
            {"grids": ({"type": "adaptive-steps", "grids": [{"type": "spacing", "steps": 2}]},)},
            "got a 'adaptive-steps'",
        ),
        ({"grids": ({"type": "spacign", "steps": 2},)}, "did you mean 'spacing'"),
        ({"table": None}, "3 grids need a table or a policy; got neither"),
        ({"policy": "p.safetensors"}, "3 grids need a table or a policy; got table and policy"),
        ({"grids": SPACED[:1]}, "1 grids need neither table nor policy; got table"),
        ({"table": {"0": (1.0,)}}, "the table has 1 logits for '0' and there are 3 grids"),
        ({"table": {}}, "the table is empty"),
    ],
)
def test_parts_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        adaptive(**options)


@pytest.mark.parametrize(
    ("pipe", "part", "words"),
    [
        (tiny_unet, adaptive(), "DDIMPipeline takes no 'class_labels' for the policy to look at"),
        (
            tiny_dit,
            adaptive((*SPACED[:2], SpacingGrid(steps=5, spacing="leading"))),
            "share a scheduler, and need timestep_spacing='trailing' and 'leading'",
        ),
        (tiny_dit, adaptive((*LISTED[:2], ExplicitGrid(timesteps=(2000, 4, 3, 2)))), "timestep 2000 is out of range"),
        (tiny_dit, adaptive(table=None, policy="p.safetensors"), "takes no 'prompt_embeds' for the policy to look at"),
        (tiny_stable_diffusion, adaptive(table=None, policy="p.safetensors"), r"load the plan with Plan.load(path)"),
    ],
)
def test_plans_that_are_refused_before_the_pipeline_is_touched(pipe, part, words):
    pipe = pipe()
    before = state_of(pipe)
    with pytest.raises(InputError) as caught:
        attach(pipe, Plan(grid=part))
    assert words in str(caught.value)
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"num_inference_steps": 3}, "the plan picks the steps; got num_inference_steps in the call as well"),
        ({"class_labels": [0, 7]}, "the adaptive-steps policy has no entry for '7'; it knows 0, 1, 2"),
        ({"generator": generators(1)[0]}, "give a list of 2 generators instead of one for all"),
        ({"class_labels": [0, 0], "generator": generators(1)[0]}, "give a list of 2 generators instead of one for all"),
    ],
)
def test_calls_that_are_refused(call, words):
    pipe = tiny_dit()
    with attach(pipe, Plan(grid=adaptive())), pytest.raises(InputError, match=words):
        pipe(**({"class_labels": [0, 1], "generator": generators(2)} | call))


def test_policies_that_do_not_fit(tmp_path):
    path = tmp_path / "policy.safetensors"
    write_policy(path, network(4))
    assert read_policy(path, 3).keys() == network(4).keys()
    with pytest.raises(InputError, match=r"out.weight is \(3, 5\); needed \('choices', 'hidden'\)"):
        read_policy(path, 2)
    write_tensors(path, {"mean": torch.zeros(2)})
    with pytest.raises(InputError, match=r"is no policy; it has tensors \['mean'\]"):
        read_policy(path, 3)
    pipe = tiny_stable_diffusion()
    write_policy(path, network(4))
    Plan(grid=adaptive(table=None, policy=path.name)).save(tmp_path / "plan.json")
    with attach(pipe, Plan.load(tmp_path / "plan.json")):
        with pytest.raises(InputError, match="the policy looks at 4 features; prompt_embeds has 8"):
            pipe(**call_arguments(pipe))
        with pytest.raises(InputError, match="policy looks at prompt_embeds; give it in the call"):
            pipe(prompt="a cat")
